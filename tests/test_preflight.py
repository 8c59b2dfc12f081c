"""The preflight: each check fires when it should, and only then; the report shows what has loss."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from data.chat import build_tokenizer
from data.records import Record
from posttrain import preflight
from posttrain.errors import RunStopped
from posttrain.memory import expected_memory
from posttrain.model.load import build_policy, load_policy
from posttrain.model.lora import ParameterRow
from posttrain.preflight_view import row_text, show
from posttrain.recipe import BuildSection, SftRecipe
from posttrain.sft_data import IGNORED, RowCounts, RowMaker

GOOD = RowCounts(chats=100, kept=100, rows=10, tokens=980, trained_tokens=400, capacity=1000)
EOS = frozenset({2})


def chats(count: int) -> list[Record]:
    return [
        Record(
            id=str(number),
            messages=(
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": "yes" * (number + 1)},
            ),
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found, _ = RowMaker(build_tokenizer(), 64, True, "assistant", "drop").rows(chats(6))
    return found


def only(findings: preflight.Findings) -> str:
    """The one problem found."""
    (problem,) = findings.errors + findings.warnings
    return problem


# --- counts and rows --------------------------------------------------------------------------------------------------


def test_good_counts_are_silent() -> None:
    assert preflight.check_counts(GOOD) == preflight.Findings()


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"trained_tokens": 0}, "errors", "no token has loss"),
        ({"trained_tokens": 20}, "warnings", "only 2.0% of the tokens"),
        ({"kept": 97, "too_long": 3}, "warnings", "3 of 100 chats were left out (3 longer"),
        ({"kept": 40, "too_long": 50, "untrained": 10}, "errors", "60 of 100 chats were left out"),
        ({"truncated": 5}, "warnings", "5 of 100 chats were cut off"),
        ({"tokens": 600}, "warnings", "only 60% full"),
    ],
)
def test_counts_that_are_not_good_are_named(changes: dict[str, int], kind: str, words: str) -> None:
    from dataclasses import replace

    findings = preflight.check_counts(replace(GOOD, **changes))
    assert words in only(findings) and getattr(findings, kind)


def config(**changes: int) -> Any:
    return SimpleNamespace(**{"vocab_size": 107, "max_position_embeddings": 64, **changes})


def test_good_rows_are_silent(rows: list[dict[str, Any]]) -> None:
    assert preflight.check_rows(rows, config(), bos_token_id=1) == preflight.Findings()


def test_rows_that_are_not_good_are_named(rows: list[dict[str, Any]]) -> None:
    assert "outside the policy's vocabulary of 50" in only(
        preflight.check_rows(rows, config(vocab_size=50), bos_token_id=1)
    )
    assert "lower training.max_length to 8" in only(
        preflight.check_rows(rows, config(max_position_embeddings=8), bos_token_id=1)
    )
    twice = {"input_ids": [1, 1, 5, 2], "labels": [IGNORED, IGNORED, 5, 2]}
    assert "1 chats begin with two start tokens" in only(preflight.check_rows([twice], config(), bos_token_id=1))
    silent = {"input_ids": [1, 5, 2], "labels": [IGNORED] * 3}
    assert "1 of 1 rows have no token with loss" in only(preflight.check_rows([silent], config(), bos_token_id=1))


def test_the_end_of_turn_is_looked_for_in_every_sample(rows: list[dict[str, Any]]) -> None:
    assert preflight.stop_share(rows, EOS) == 1.0
    half = {"input_ids": [5, 2, 5, 6], "labels": [IGNORED, 2, IGNORED, 6], "seq_lengths": [2, 2]}
    assert preflight.stop_share([half], EOS) == 0.5
    tokenizer = build_tokenizer()
    assert preflight.check_stop(1.0, tokenizer, EOS, "assistant") == preflight.Findings()
    assert "50.0% of the chats do not end with a trained <eos>" in only(
        preflight.check_stop(0.5, tokenizer, EOS, "assistant")
    )
    never = preflight.check_stop(0.0, tokenizer, EOS, "assistant")
    assert never.errors and "never learn to stop" in only(never)
    assert preflight.check_stop(0.0, tokenizer, EOS, "all").warnings


def test_something_must_train() -> None:
    frozen = ParameterRow("attention", "a", 10, 1, 0, None)
    assert "no parameter trains" in only(preflight.check_table([frozen]))
    assert preflight.check_table([frozen, ParameterRow("head", "b", 5, 1, 5, None)]) == preflight.Findings()


# --- isolation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_isolation_holds(policy_path: Path, rows: list[dict[str, Any]], attention: str) -> None:
    policy = load_policy(
        str(policy_path),
        dtype="float32",
        attn_implementation=attention,
        experts_implementation="grouped_mm",
        trust_remote_code=False,
    ).train()
    found = preflight.isolation_gap(policy, rows)
    assert found["alone"] < 1e-5 and found["leak"] < 1e-5 and found["skipped"] is None
    assert policy.training
    assert preflight.check_isolation(found, attention) == preflight.Findings()


def test_samples_that_see_each_other_are_an_error(policy_path: Path, rows: list[dict[str, Any]]) -> None:
    class Leaky(torch.nn.Module):
        """The same policy, called as one that overlooks position ids."""

        def __init__(self, policy: Any) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return self.policy(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)

    policy = load_policy(
        str(policy_path),
        dtype="float32",
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        trust_remote_code=False,
    )
    found = preflight.isolation_gap(Leaky(policy), rows)
    assert found["leak"] > 1e-2
    assert "packed samples see each other with attn_implementation sdpa" in only(
        preflight.check_isolation(found, "sdpa")
    )


def test_where_isolation_cannot_be_tested_it_is_said(policy_path: Path) -> None:
    alone = {"input_ids": [1, 5, 2], "labels": [IGNORED, 5, 2], "seq_lengths": [3]}
    found = preflight.isolation_gap(None, [alone])
    assert "was not tested" in only(preflight.check_isolation(found, "sdpa"))


# --- memory and the whole ---------------------------------------------------------------------------------------------


def recipe(**training: Any) -> SftRecipe:
    return SftRecipe.model_validate(
        {
            "run_name": "r",
            "model": {"model_name_or_path": "some/model"},
            "datasets": [{"path": "a/b"}],
            "training": {"max_length": 64, "max_steps": 1, **training},
        }
    )


def test_memory_by_hand() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    policy = build_policy(BuildSection(**sizes).model_dump(), build_tokenizer(), seed=0)
    count = sum(p.numel() for p in policy.parameters())
    found = expected_memory(recipe(), policy, 107)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert expected_memory(recipe(optim="sgd"), policy, 107)["optimizer"] == 0
    policy.get_input_embeddings().weight.requires_grad_(False)
    assert expected_memory(recipe(), policy, 107)["gradients"] == 4 * (count - 107 * 64)
    spared = expected_memory(recipe(gradient_checkpointing=True), policy, 107)
    assert spared["activations"] < expected_memory(recipe(), policy, 107)["activations"]
    assert preflight.check_memory({"weights": 50}, 100) == preflight.Findings()
    assert "lower training.per_device_train_batch_size" in only(preflight.check_memory({"weights": 95}, 100))


def test_the_report_shows_what_has_loss_also_without_colour(policy_path: Path) -> None:
    tokenizer = build_tokenizer()
    made, counts = RowMaker(tokenizer, 64, True, "assistant", "drop").rows(chats(6))
    policy = load_policy(
        str(policy_path),
        dtype="float32",
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        trust_remote_code=False,
    )
    report = preflight.inspect_run(recipe(), policy=policy, tokenizer=tokenizer, rows=made, counts=counts)
    assert report.findings.errors == ()
    preflight.require(report)
    printed = StringIO()
    show(report, made, tokenizer, Console(file=printed, width=120))
    text = printed.getvalue()
    assert "⟦yesyesyesyesyesyes<eos>⟧ │ <bos><|user|>" in text.replace("\n", "")
    for words in ("6 of 6 kept", "routed_experts", "trained in 100.0% of the chats", "one by one"):
        assert words in text
    assert report.facts["trainable_parameters"] == sum(p.numel() for p in policy.parameters())


def test_line_breaks_are_seen_and_long_rows_are_cut() -> None:
    tokenizer = build_tokenizer()
    newline = tokenizer.convert_tokens_to_ids("\n")
    row = {"input_ids": [newline] * 500, "labels": [IGNORED] + [newline] * 499}
    text = row_text(row, tokenizer).plain
    assert text.count("⏎") == 400 and "100 tokens more" in text and "⟦" in text


def test_an_error_ends_the_run_with_its_words() -> None:
    report = preflight.PreflightReport(preflight.Findings(errors=("one thing", "another")), {})
    with pytest.raises(RunStopped, match=r"one thing \(and 1 more above\)"):
        preflight.require(report)
