"""Evaluation: `suite` runs it, `statistics` gives intervals, `report` the page. `python -m eval recipe.yaml`."""
