"""What a run directory says of its run, samples left out: as plain lists and mappings, ready for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain.sections import RewardSection

MAX_STEPS = 4000  # points of a curve; of longer runs evenly spaced ones are kept, the last among them
MAX_ROUTER_CELLS = 4_000_000  # steps x layers x experts
LABELS = {"pass_at_1": "pass@1, sampled", "greedy": "greedy"}


def stage_directories(run_dir: Path) -> list[Path]:
    """The run itself, or of a pipeline its stages in their order, as far as they have begun.

    Raises:
        FileNotFoundError: there is no run in the directory.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise FileNotFoundError(
            f"{run_dir} is no run directory: it has no recipe.yaml; give what a stage or pipeline wrote"
        )
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text()) or {}
    if recipe.get("stage") != "pipeline":
        return [run_dir]
    found = [run_dir / str(stage["name"]) for stage in recipe.get("stages", ())]
    return [directory for directory in found if (directory / "recipe.yaml").exists()]


def read_run(directory: Path, read: Callable[[Path], list[dict[str, Any]]] | None = None) -> dict[str, Any]:
    """Recipe, environment, curves, router loads, evaluations, alarms and data funnel of a stage's run.

    A run that is still going on has no summary yet, and may have no metrics.

    Args:
        directory: of the stage.
        read: reads JSON Lines, e.g. one that remembers; None takes `read_lines`.

    Raises:
        FileNotFoundError: no recipe.yaml in it.
    """
    read = read or read_lines
    recipe_text = (directory / "recipe.yaml").read_text()
    recipe = yaml.safe_load(recipe_text) or {}
    summary = read_json(directory / "summary.json")
    metrics = read(directory / "metrics.jsonl")
    last = metrics[-1] if metrics else {}
    return {
        "stage": summary.get("stage") or recipe.get("stage", ""),
        "steps": summary.get("steps", last.get("step", 0)),
        "max_steps": recipe.get("max_steps") or (recipe.get("training") or {}).get("max_steps"),
        "seconds": summary.get("seconds", last.get("seconds", 0)),
        "finished": summary.get("finished"),
        "recipe": recipe_text,
        "rewards": [_reward(section) for section in recipe.get("rewards") or ()],
        "environment": read_json(directory / "environment.json"),
        "metrics": columns(evenly(metrics, MAX_STEPS)),
        "router": router_columns(read(directory / "router.jsonl")),
        "evaluation": list(evaluations(summary, metrics)),
        "comparison": (directory / "comparison.md").read_text() if (directory / "comparison.md").exists() else "",
        "summary": {key: value for key, value in summary.items() if key not in ("metrics", "eval", "stages")},
        "alarms": read(directory / "alarms.jsonl"),
        "funnel": funnel(directory, metrics),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, null for numbers that are not finite; empty where there is no such file yet."""
    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda _: None) if path.exists() else {}
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file. What is still being written, a last line without its end, is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def evenly(rows: Sequence[Any], limit: int) -> list[Any]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (limit - 1))] for place in range(limit)]


def columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Metric name -> its value at each step, null where it was not logged; `step` and `seconds` among them."""
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [short(line.get(name)) for line in lines] for name in names}


def router_columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Steps, and the load of each layer and expert at each as one flat list; None for a dense policy."""
    if not lines:
        return None
    layers, experts = len(lines[0]["load"]), len(lines[0]["load"][0])
    kept = evenly(lines, max(2, MAX_ROUTER_CELLS // (layers * experts)))
    load = [value for line in kept for row in line["load"] for value in row]
    return {"steps": [line["step"] for line in kept], "layers": layers, "experts": experts, "load": load}


def evaluations(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each figure: moment, name, value, and the interval with its n where there is one."""
    for moment, result in (summary.get("eval") or {}).items():
        yield from _figures(moment, result)
    held_out = summary.get("held_out")
    if isinstance(held_out, dict):
        yield from _figures("held-out pairs", held_out)
    during = [line for line in metrics if line.get("eval/pass_at_1") is not None]
    if not summary and during:
        yield {
            "moment": f"step {during[-1]['step']}",
            "name": LABELS["pass_at_1"],
            "value": during[-1]["eval/pass_at_1"],
        }


def _figures(moment: str, found: Mapping[str, Any], prefix: str = "") -> Iterator[dict[str, Any]]:
    for key, value in found.items():
        name = prefix + LABELS.get(key, key.replace("_", " ") if not prefix else key)
        if isinstance(value, dict) and "value" in value:
            yield {"moment": moment, "name": name, **{part: short(number) for part, number in value.items()}}
        elif isinstance(value, dict):
            yield from _figures(moment, value, "" if key in ("by_level", "metrics") else f"{name}: ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield {"moment": moment, "name": name, "value": short(value)}


def funnel(directory: Path, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many records or completions were left after each thing that takes some away: label, count, unit."""
    steps = (read_json(directory / "summary.json").get("funnel") or {}).get("steps", ())
    data = read_json(directory / "data.json")
    if steps:
        found = [(str(row["step"]), row["left"], "answers") for row in steps]
    elif data:
        sources = data.get("preparation", {}).get("sources", ())
        loaded = sum(source.get("loaded", 0) for source in sources) or data.get("chats", 0)
        rest = [("without duplicates and held-out problems", "chats"), ("fit the length", "kept")]
        found = [("loaded", loaded, "chats"), *((label, data.get(key, 0), "chats") for label, key in rest)]
        found += [
            ("in packed rows", data.get("tokens", 0), "tokens"),
            ("with loss", data.get("trained_tokens", 0), "tokens"),
        ]
    else:
        sampled = sum(line.get("groups/sampled") or 0 for line in metrics)
        if not sampled:
            return []
        useful = sum((line.get("groups/sampled") or 0) * (line.get("groups/with_signal") or 0) for line in metrics)
        found = [("prompts sampled from", round(sampled), "groups"), ("rewards differ", round(useful), "groups")]
    return [{"label": label, "count": count, "unit": unit} for label, count, unit in found]


def _reward(section: Mapping[str, Any]) -> dict[str, Any]:
    # Only what is shown: a recipe of another version may have other keys.
    shown = {key: section[key] for key in ("func", "name", "weight", "clip") if key in section}
    reward = RewardSection.model_validate(shown)
    return {"name": reward.label, "func": reward.func, "weight": reward.weight, "clip": reward.clip}


def short(value: Any, digits: int = 6) -> Any:
    """A float with so many significant digits, null for one that is not finite; all else as it is."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
