"""What a recipe will need: memory, time, machines, money. Imports no torch, looks nothing up and starts nothing."""
