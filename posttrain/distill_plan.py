"""What `--dry-run` says of a distillation, beside what all stages say."""

from __future__ import annotations

import os

from posttrain.recipe import DatasetSection, DistillRecipe, EndpointSection


def distill_lines(recipe: DistillRecipe) -> list[str]:
    """The plan, one fact a line."""
    return [*_teacher(recipe), *_amount(recipe), *_judged(recipe), *_kept(recipe)]


def _teacher(recipe: DistillRecipe) -> list[str]:
    if recipe.teacher.endpoint is not None:
        return _endpoint(recipe.teacher.endpoint)
    if recipe.teacher.recordings is not None:
        return [f"teacher     recordings in {recipe.teacher.recordings.path}"]
    return []  # said as the policy


def _endpoint(section: EndpointSection) -> list[str]:
    key = "no key"
    if section.api_key_env is not None:
        state = "set" if os.environ.get(section.api_key_env) else "not set"
        key = f"key from {section.api_key_env}, which is {state}"
    rate = f", {section.requests_per_minute:g} a minute" if section.requests_per_minute else ""
    lines = [
        f"teacher     {section.model} at {section.base_url or 'the default address'}, {key}",
        f"            up to {section.max_concurrency} requests at a time{rate}, {section.max_retries + 1} attempts each",
    ]
    if section.max_cost is not None:
        lines.append(f"            begins no request once the answers have cost {section.max_cost:g}")
    return lines


def _amount(recipe: DistillRecipe) -> list[str]:
    drawn, each = recipe.generation, recipe.num_generations
    if each is None:
        return ["answers     all that are recorded"]
    how = f"up to {drawn.max_completion_length} tokens each, temperature {drawn.temperature:g}"
    sizes = [dataset.size for dataset in recipe.datasets]
    if any(size is None for size in sizes):
        return [f"answers     {each} to each prompt, {how}"]
    total = sum(size or 0 for size in sizes)
    lines = [f"answers     {total:,} prompts x {each} = {total * each:,}, {how}"]
    endpoint = recipe.teacher.endpoint
    if endpoint is not None and endpoint.completion_price:
        most = total * each * drawn.max_completion_length * endpoint.completion_price / 1e6
        lines.append(f"cost        at most {most:.4g} for what is written, and what is read on top")
    return lines


def _judged(recipe: DistillRecipe) -> list[str]:
    rules = recipe.rejection
    rewards = ", ".join(f"{reward.weight:g} x {reward.label}" for reward in recipe.rewards) or "none"
    names = [f"{name} below {least:g}" for name, least in rules.correctness.items()]
    names += [name for name in ("format", "language", "length", "repetition") if getattr(rules, name) is not None]
    names += ["truncated"] if rules.truncated else []
    return [f"reward      {rewards}", f"rejects     {', '.join(['unjudged', 'empty', *names])}"]


def _kept(recipe: DistillRecipe) -> list[str]:
    section = recipe.selection
    limit = "" if section.limit is None else f", at most {section.limit}"
    lines = [f"keeps       {section.pick} of a prompt's answers{limit}"]
    if section.deduplicate:
        lines.append("            of equal prompts and chats the first")
    if section.decontamination is not None:
        sets = ", ".join(map(_name, section.decontamination.datasets))
        lines.append(f"            nothing of {sets} ({section.decontamination.ngram} words in a row)")
    rows = ", ".join(recipe.output.kinds)
    lines.append(f"file        dataset.{recipe.output.format}, rows: {rows}")
    if recipe.output.pairs_per_prompt:
        most = recipe.output.pairs_per_prompt
        lines.append(f"            pairs.{recipe.output.format}, at most {most} pairs of a prompt: right over wrong")
    return lines


def _name(section: DatasetSection) -> str:
    return section.path or f"{section.task} {list(section.levels)}"
