"""README.md of an exported checkpoint: what it is, how it was made, on what, how good it is, and where it came from.

Everything is read from the run directory that the checkpoint lies in; of a checkpoint from elsewhere the card says its format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from eval.report_run import evaluations, funnel, read_json
from posttrain.lineage import FILE as LINEAGE
from posttrain.pipeline_progress import clock

METHODS = {
    "sft": "supervised fine-tuning",
    "grpo": "reinforcement learning with GRPO",
    "reward_model": "training as a reward model",
    "upcycle": "sparse upcycling",
}
FORMATS = {
    "fp8": "FP8 (e4m3) with a float32 scale for each block of 128 x 128, DeepSeek-V3's layout; the rest bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
}


def model_card(source: Path, title: str, record: Mapping[str, Any]) -> str:
    """The card as Markdown with the hub's front matter.

    Args:
        source: the checkpoint that was exported.
        title: of the card.
        record: what was exported, see `posttrain.export`; with `check` once it was checked.
    """
    run = run_directory(source)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) if run else {}
    front = yaml.safe_dump(_front_matter(recipe), sort_keys=False).strip()
    parts = [f"---\n{front}\n---\n\n# {title}\n\n{_origin(source, run, recipe, record)}", _weights(record)]
    if run is not None:
        parts += [_data(run, recipe), _evaluation(run), _lineage(source, run), _training(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_directory(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to: RUN/checkpoints/step-N; None where it lies elsewhere."""
    path = checkpoint.resolve()
    run = path.parent.parent
    return run if path.parent.name == "checkpoints" and (run / "recipe.yaml").is_file() else None


def short_name(path: Path) -> str:
    """A checkpoint's name without the place on this machine: RUN/checkpoints/step-N, below its pipeline's name."""
    found = next((parent for parent in path.parents if (parent / "recipe.yaml").is_file()), None)
    if found is None:
        return path.name
    if (found.parent / "recipe.yaml").is_file():
        found = found.parent
    return str(path.relative_to(found.parent))


def _front_matter(recipe: Mapping[str, Any]) -> dict[str, Any]:
    base = str((recipe.get("model") or {}).get("model_name_or_path") or "")
    names = [section.get("path") for section in recipe.get("datasets") or ()]
    hub = [str(name) for name in names if name and _is_hub_name(str(name))]
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", *([recipe["stage"]] if recipe else [])],
    }
    if base and _is_hub_name(base):
        found["base_model"] = base
    return found | ({"datasets": sorted(set(hub))} if hub else {})


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _origin(source: Path, run: Path | None, recipe: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if run is None:
        return f"Exported from {record['source']} with `python -m posttrain.export`."
    method = METHODS.get(recipe["stage"], recipe["stage"])
    summary = read_json(run / "summary.json")
    state = "" if summary.get("finished") else " of a run that had not finished"
    return (
        f"Made by {method} with posttrain: checkpoint {source.name}{state} ({short_name(source)}), exported with `python -m "
        f"posttrain.export`."
    )


def _weights(record: Mapping[str, Any]) -> str:
    lines = [
        "## Weights",
        "",
        f"- {record['parameters']:,} parameters, {record['tensors']:,} tensors: {FORMATS[record['format']]}.",
        f"- Before the export: {record['source_format']}.",
        f"- Multi-token prediction module: {'included, as one layer more' if record['mtp'] else 'none'}.",
    ]
    if record["adapter"]:
        lines.append(f"- LoRA adapters merged: {record['adapter']}.")
    check = record.get("check")
    if check is None:
        return "\n".join([*lines, "- Not loaded by the export (`--check` does)."])
    lines.append(
        f"- Checked: {check['loaded']}. Logprobs of {check['tokens']} tokens agree within {check['gap_max']:.1e} (limit "
        f"{check['limit']:g}), greedy continuations in {check['same_greedy']} of {check['continuations']} cases."
    )
    if check["drift_mean"] is not None:
        lines.append(
            f"- Against the checkpoint it came from, logprobs differ by {check['drift_mean']:.1e} on average and "
            f"{check['drift_max']:.1e} at most."
        )
    return "\n".join(lines)


def _data(run: Path, recipe: Mapping[str, Any]) -> str:
    rows = ["## Data", ""]
    for section in recipe.get("datasets") or ():
        more = {key: value for key, value in section.items() if key not in ("task", "path")}
        what = f"generated problems of `{section['task']}`" if section.get("task") else f"`{_public(section['path'])}`"
        rows.append(f"- {what}: {', '.join(f'{key} {value}' for key, value in more.items() if value is not None)}")
    rows += [f"- {row['label']}: {row['count']:,} {row['unit']}" for row in funnel(run, _metrics(run))]
    rewards = [f"`{_public(reward['func'])}` x {reward['weight']:g}" for reward in recipe.get("rewards") or ()]
    if rewards:
        rows.append(f"- Rewards: {', '.join(rewards)}")
    return "\n".join(rows) if len(rows) > 2 else ""


def _public(name: str) -> str:
    """A file's name without the place on this machine; hub names and modules stay."""
    return Path(name).name if name.startswith(("/", "~")) else name


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _evaluation(run: Path) -> str:
    rows = list(evaluations(read_json(run / "summary.json"), []))
    shown = [row for row in rows if "low" in row]
    if not shown:
        return ""
    lines = ["## Evaluation", "", "| when | figure | value | 95% interval | problems |", "|---|---|---|---|---|"]
    for row in shown:
        interval = f"{_percent(row['low'])} to {_percent(row['high'])}"
        lines.append(
            f"| {row['moment']} | {row['name']} | {_percent(row['value'])} | {interval} | {row.get('n', '')} |"
        )
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _lineage(source: Path, run: Path) -> str:
    """The stages that this checkpoint stands on, by the pipeline's lineage; nothing for a run by itself."""
    found = read_json(run.parent / LINEAGE)
    stages = found.get("stages") or {}
    if run.name not in stages:
        return ""
    lines = ["## Lineage", ""]
    lines += [f"- {line}" for line in _stage_lines(run.name, stages, set())]
    made = (found.get("artefacts") or {}).get(f"{run.name}/checkpoints/{source.name}")
    if made:
        lines.append(f"- this checkpoint before the export: sha256 {made['sha256']}")
    return "\n".join(lines)


def _stage_lines(name: str, stages: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    """A stage after those that it used."""
    if name in seen or name not in stages:
        return
    seen.add(name)
    stage = stages[name]
    inputs = []
    for row in stage["inputs"]:
        if row["stage"]:
            yield from _stage_lines(row["stage"], stages, seen)
        digest = f" (sha256 {row['sha256'][:12]})" if row["sha256"] else ""
        inputs.append(f"{_public(row.get('artefact') or row['name'])}{digest}")
    origin = f", from {', '.join(inputs)}" if inputs else ""
    yield f"**{name}**: {stage['kind']} by `{_public(stage['recipe'])}`, {clock(stage['seconds'])}{origin}"


def _training(run: Path) -> str:
    summary, environment = read_json(run / "summary.json"), read_json(run / "environment.json")
    packages = ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items())
    lines = ["## Training", ""]
    if summary:
        lines.append(f"{summary.get('steps', 0):,} steps in {clock(float(summary['seconds']))}; {packages}.")
    text = _without_home((run / "recipe.yaml").read_text().strip(), run)
    return "\n".join([*lines, "", "The recipe, every default spelled out:", "", "```yaml", text, "```"])


def _without_home(text: str, run: Path) -> str:
    """A recipe without the place of the run on this machine."""
    return text.replace(f"{run.parent.parent.resolve()}/", "").replace(f"{Path.home()}/", "~/")
