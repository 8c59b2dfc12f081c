"""A look at an SFT run before its first step: what would spoil it silently is shown, warned of or refused.

Each check is a small function from facts to problems; `inspect_run` calls them all, `preflight_view.show` prints what they
found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from data.templates import check_template
from posttrain.errors import RunStopped
from posttrain.memory import available_memory, expected_memory
from posttrain.model.lora import ParameterRow, trained_parameters
from posttrain.recipe import SftRecipe
from posttrain.sft_data import IGNORED, RowCounts

LOW_SHARE = 0.05  # of tokens in the loss
LOW_FILL = 0.8
MANY_DROPPED = 0.01
SELF_TEST_TOKENS = 512
TOLERANCE = 1e-4  # of logits, float32
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Findings:
    """Problems in plain words, each with its cure."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(self.errors + other.errors, self.warnings + other.warnings)


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What was found, and the facts behind it (JSON-able)."""

    findings: Findings
    facts: dict[str, Any]
    table: list[ParameterRow] = field(default_factory=list)


def inspect_run(
    recipe: SftRecipe, *, policy: Any, tokenizer: Any, rows: Sequence[Row], counts: RowCounts, teacher: Any = None
) -> PreflightReport:
    """Look at everything that can be looked at without training.

    Args:
        recipe: of the run.
        policy: the model as it will be trained, adapters on.
        tokenizer: with the template that is used.
        rows: packed rows; of a stream, the first.
        counts: what became of the chats.
        teacher: the model whose distributions are learnt, if there is one.
    """
    stop_ids = stop_tokens(policy, tokenizer)
    loss_on = recipe.training.loss_on
    template = check_template(tokenizer, loss_on=loss_on, stop_ids=stop_ids)
    table = trained_parameters(policy)
    isolation = isolation_gap(policy, rows) if recipe.training.packing else None
    memory = expected_memory(recipe, policy, len(tokenizer), teacher)
    stopped = stop_share(rows, stop_ids)
    findings = (
        check_counts(counts)
        + check_rows(rows, policy.config, bos_token_id=tokenizer.bos_token_id)
        + check_stop(stopped, tokenizer, stop_ids, loss_on)
        + Findings(errors=template.problems if loss_on != "all" else (), warnings=())
        + check_table(table)
        + check_isolation(isolation, recipe.model.attn_implementation)
        + check_memory(memory, available_memory())
    )
    facts = {
        **counts.to_dict(),
        "trained_share": counts.trained_tokens / max(1, counts.tokens),
        "end_of_turn_trained_share": stopped,
        "template": asdict(template),
        "isolation": isolation,
        "memory_bytes": memory,
        "memory_available_bytes": available_memory(),
        "trainable_parameters": sum(row.trainable for row in table),
        "parameters": sum(row.count for row in table),
        "errors": findings.errors,
        "warnings": findings.warnings,
    }
    return PreflightReport(findings, facts, table)


def require(report: PreflightReport) -> None:
    """Refuse to train when something was found that would spoil it.

    Raises:
        RunStopped: the first error, and how many more there are.
    """
    errors = report.findings.errors
    if errors:
        more = f" (and {len(errors) - 1} more above)" if len(errors) > 1 else ""
        raise RunStopped(f"{errors[0]}{more}")


def stop_tokens(policy: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end generation, by the tokenizer and by the policy's generation config."""
    named = getattr(policy.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*found, tokenizer.eos_token_id] if token is not None)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_counts(counts: RowCounts) -> Findings:
    """Share of tokens with loss, what was left out, how full the rows are."""
    errors, warnings = [], []
    share = counts.trained_tokens / max(1, counts.tokens)
    if not counts.trained_tokens:
        errors.append("no token has loss; look at training.loss_on and the chat template")
    elif share < LOW_SHARE:
        warnings.append(f"only {share:.1%} of the tokens have loss; look at the rows above, and at training.loss_on")
    lost = counts.too_long + counts.untrained
    if lost > counts.chats / 2:
        errors.append(
            f"{lost:,} of {counts.chats:,} chats were left out ({counts.too_long:,} longer than training.max_length, "
            f"{counts.untrained:,} without a token with loss); raise training.max_length, or look at training.loss_on"
        )
    elif lost > counts.chats * MANY_DROPPED:
        warnings.append(
            f"{lost:,} of {counts.chats:,} chats were left out ({counts.too_long:,} longer than training.max_length, "
            f"{counts.untrained:,} without a token with loss)"
        )
    if counts.truncated > counts.chats * MANY_DROPPED:
        warnings.append(
            f"{counts.truncated:,} of {counts.chats:,} chats were cut off at training.max_length: their end of turn is not "
            f"trained"
        )
    if counts.rows > 1 and counts.fill < LOW_FILL:
        warnings.append(
            f"rows are only {counts.fill:.0%} full; choose a training.max_length that more chats fit together"
        )
    return Findings(tuple(errors), tuple(warnings))


def check_rows(rows: Sequence[Row], config: Any, *, bos_token_id: int | None) -> Findings:
    """Tokens outside the vocabulary, samples beyond the positions, a doubled start token, rows without loss."""
    errors, warnings = [], []
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= config.vocab_size:
        errors.append(
            f"token {largest} is outside the policy's vocabulary of {config.vocab_size}: tokenizer and policy do not belong "
            f"together"
        )
    longest = max(stop - start for row in rows for start, stop in samples(row))
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        errors.append(
            f"a chat has {longest} tokens and the policy knows {positions} positions; lower training.max_length to "
            f"{positions}"
        )
    doubled = sum(
        bos_token_id is not None and list(row["input_ids"][start : start + 2]) == [bos_token_id] * 2
        for row in rows
        for start, _ in samples(row)
    )
    if doubled:
        warnings.append(f"{doubled:,} chats begin with two start tokens; take one out of the template or the data")
    empty = sum(all(label == IGNORED for label in row["labels"]) for row in rows)
    if empty:
        warnings.append(f"{empty:,} of {len(rows):,} rows have no token with loss")
    return Findings(tuple(errors), tuple(warnings))


def samples(row: Row) -> Iterator[tuple[int, int]]:
    """Where each sample of a row begins and ends."""
    start = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        yield start, start + length
        start += length


def stop_share(rows: Sequence[Row], stop_ids: frozenset[int]) -> float:
    """Share of samples whose last token with loss is one that ends generation."""
    ends = []
    for row in rows:
        for start, stop in samples(row):
            trained = [label for label in row["labels"][start:stop] if label != IGNORED]
            ends.append(bool(trained) and trained[-1] in stop_ids)
    return sum(ends) / max(1, len(ends))


def check_stop(share: float, tokenizer: Any, stop_ids: frozenset[int], loss_on: str) -> Findings:
    """Whether the model learns to stop."""
    names = " or ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(stop_ids)))) or "an end-of-turn token"
    if share == 1:
        return Findings()
    if share == 0 and loss_on != "all":
        return Findings(
            errors=(
                f"no chat ends with a trained {names}: the model would never learn to stop; put the end-of-turn token inside "
                f"the template's generation block, give training.chat_template, or mend eos_token",
            )
        )
    return Findings(warnings=(f"{1 - share:.1%} of the chats do not end with a trained {names}",))


def check_table(table: Sequence[ParameterRow]) -> Findings:
    """Whether anything trains."""
    if not sum(row.trainable for row in table):
        return Findings(errors=("no parameter trains; look at lora.targets and router.freeze",))
    return Findings()


# --- isolation --------------------------------------------------------------------------------------------------------


def isolation_gap(policy: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Run a packed row, its samples alone, and the row with another first sample.

    Returns:
        `alone`: largest difference of a logit between the packed row and its samples one by one.
        `leak`: largest change of a later sample's logit when the first sample changes. Both None, with `skipped`, when no
        row holds two samples that are short enough.
    """
    row = next((row for row in rows if _pair(row) is not None), None)
    if row is None:
        reason = f"no row holds two samples of {SELF_TEST_TOKENS} tokens together"
        return {"alone": None, "leak": None, "skipped": reason}
    middle, end = _pair(row) or (0, 0)
    device = next(policy.parameters()).device
    ids = torch.tensor(row["input_ids"][:end], device=device)
    positions = torch.cat([torch.arange(middle), torch.arange(end - middle)]).to(device)
    changed = ids.clone()
    changed[:middle] = ids[:middle].roll(1) if len(set(ids[:middle].tolist())) > 1 else (ids[:middle] + 1) % len(ids)
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            packed = _logits(policy, ids, positions)
            parts = ids.split([middle, end - middle])
            alone = torch.cat([_logits(policy, part, torch.arange(len(part), device=device)) for part in parts])
            other = _logits(policy, changed, positions)
    finally:
        policy.train(training)
    scale = max(1.0, float(packed.abs().max()))
    return {
        "alone": float((packed - alone).abs().max()) / scale,
        "leak": float((packed[middle:] - other[middle:]).abs().max()) / scale,
        "skipped": None,
    }


def _pair(row: Row) -> tuple[int, int] | None:
    """Where the first sample of a row ends, and the second, if both are short enough to try."""
    places = list(samples(row))
    if len(places) < 2 or places[1][1] > SELF_TEST_TOKENS:
        return None
    return places[0][1], places[1][1]


def _logits(policy: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = policy(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()
    return logits


def check_isolation(found: Mapping[str, Any] | None, attention: str) -> Findings:
    """Whether packed samples see each other."""
    if found is None:
        return Findings()
    if found["skipped"]:
        return Findings(warnings=(f"whether packed samples see each other was not tested: {found['skipped']}",))
    worst = max(found["alone"], found["leak"])
    if worst > TOLERANCE:
        return Findings(
            errors=(
                f"packed samples see each other with attn_implementation {attention} (a logit moves by {worst:.1e} of the "
                f"largest); choose another model.attn_implementation, or set training.packing: false",
            )
        )
    return Findings()


def check_memory(expected: Mapping[str, int], available: int) -> Findings:
    """Whether the memory expected fits."""
    total = sum(expected.values())
    if total > 0.9 * available:
        return Findings(
            warnings=(
                f"about {total / 2**30:.1f} GiB are expected to be needed and {available / 2**30:.1f} GiB are there; lower "
                f"training.per_device_train_batch_size or max_length, set gradient_checkpointing: true, or use lora",
            )
        )
    return Findings()
