"""Preference pairs: corrupted solutions with ground truth, and the rows of files."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from data.corruption import CORRUPTIONS, Solution, corrupt, other_number
from data.pairs import Pair, file_pairs, parse_pair, task_pairs
from data.tasks import TaskFamily, get_task, split_of
from posttrain.reward_model_recipe import CorruptionName
from rewards.extract import final_answer
from rewards.task_answer import score

SEEN_BY_THE_ANSWER = {"answer", "carried", "format"}


def text(pair: Pair, side: str) -> str:
    return str(getattr(pair, side)[-1]["content"])


@pytest.mark.parametrize("task", ["letter_counting", "chain_sum", "products", "bilingual_counting"])
@pytest.mark.parametrize("worked_fraction", [1.0, 0.5])
def test_every_corruption_is_what_its_name_says(task: str, worked_fraction: float) -> None:
    pairs = task_pairs(task, [2], "train", 300, seed=0, worked_fraction=worked_fraction)
    assert {pair.kind for pair in pairs} == set(CORRUPTIONS)
    family = get_task(task)
    for pair in pairs:
        chosen, rejected = text(pair, "chosen"), text(pair, "rejected")
        assert pair.answer is not None and chosen != rejected
        assert pair.chosen[:-1] == pair.rejected[:-1]
        assert pair.metadata["corruption"] == pair.kind
        assert score(chosen, pair.answer, task) == 1.0
        assert score(rejected, pair.answer, task) == float(pair.kind not in SEEN_BY_THE_ANSWER), (pair.kind, rejected)
        if pair.kind == "format":
            assert final_answer(rejected) is None
            continue
        before, after = (
            family.steps(side.partition("<think>")[2].partition("</think>")[0]) for side in (chosen, rejected)
        )
        changed = sum(a != b for a, b in zip(before, after, strict=False))
        expected = {
            "answer": before == after,
            "step": len(before) == len(after) and changed == 1,
            "carried": len(before) == len(after)
            and changed >= 1
            and result(family, after[-1]) == final_answer(rejected),
            "skipped": len(after) == len(before) - 1,
            "swapped": before != after,
        }
        assert expected[pair.kind], (pair.kind, chosen, rejected)


def result(family: TaskFamily, step: str) -> str:
    """The number that a step comes to, in digits."""
    read: list[str] = []
    family.with_result(step, lambda number: read.append(number) or number)  # type: ignore[func-returns-value]
    return read[0]


def test_results_of_steps_are_read_and_changed_in_the_numerals_they_are_in() -> None:
    bilingual = get_task("bilingual_counting")
    assert (result(bilingual, "a十二"), result(bilingual, "s영")) == ("12", "0")
    assert bilingual.with_result("a十二", lambda number: str(int(number) - 3)) == "a九"
    assert bilingual.with_result("s영", lambda number: "11") == "s십일"
    assert get_task("chain_sum").with_result("4-7=-3", lambda number: str(int(number) + 1)) == "4-7=-2"


def test_slips_are_carried_to_the_end() -> None:
    rng = random.Random(0)
    letters = {get_task("letter_counting").slip("e in see?", rng) for _ in range(50)}
    assert letters == {("s1e2e3", "3"), ("s0e0e1", "1"), ("s0e1e1", "1")}
    bilingual = {get_task("bilingual_counting").slip("e:see몇?", rng) for _ in range(50)}
    assert bilingual == {("s일e이e삼", "3"), ("s영e영e일", "1"), ("s영e일e일", "1")}
    sums = {get_task("chain_sum").slip("4-1-7=", rng) for _ in range(99)}
    assert ("4-1=5,5-7=-2", "-2") in sums and ("4-1=3,3-7=-3", "-3") in sums and len(sums) == 8
    products = {get_task("products").slip("47*6=", rng) for _ in range(50)}
    assert products == {("40*6=246,7*6=42,246+42=288", "288"), ("40*6=240,7*6=48,240+48=288", "288")}


@pytest.mark.parametrize("task", ["letter_counting", "chain_sum", "products", "bilingual_counting", "mixed_counting"])
def test_steps_are_taken_apart_and_put_together(task: str) -> None:
    family = get_task(task)
    for item in family.items(2, "train", 50):
        steps = family.steps(item.worked)
        assert family.join(steps) == item.worked and len(steps) > 1
        assert result(family, steps[-1]) == item.answer


def test_pairs_are_the_same_each_time_and_held_out_ones_are_others() -> None:
    first = task_pairs("letter_counting", [1, 2], "train", 100, seed=3)
    assert first == task_pairs("letter_counting", [1, 2], "train", 100, seed=3)
    assert first != task_pairs("letter_counting", [1, 2], "train", 100, seed=4)
    held_out = task_pairs("letter_counting", [1, 2], "eval", 100, seed=3)
    assert {split_of(pair.chosen[0]["content"]) for pair in held_out} == {"eval"}
    kinds_of_a_level = Counter((pair.metadata["level"], pair.kind) for pair in first)
    assert len(kinds_of_a_level) == 2 * len(CORRUPTIONS)


def test_kinds_that_cannot_be_done_are_refused() -> None:
    with pytest.raises(ValueError, match="one or more of answer, step"):
        task_pairs("chain_sum", [2], "train", 5, 0, kinds=[])
    with pytest.raises(ValueError, match="add answer or format"):
        task_pairs("chain_sum", [2], "train", 5, 0, kinds=["step"], worked_fraction=0.0)
    with pytest.raises(ValueError, match="at least two different problems"):
        task_pairs("chain_sum", [2], "train", 1, 0, kinds=["swapped"])
    with pytest.raises(ValueError, match="needs more reasoning"):
        direct = Solution("1+1=", "2", "")
        corrupt("step", direct, get_task("chain_sum"), direct, random.Random(0))


def test_the_recipe_knows_every_kind() -> None:
    assert get_args(CorruptionName) == CORRUPTIONS


def test_other_numbers_stay_near_and_do_not_turn_negative() -> None:
    found = {other_number("1", random.Random(seed)) for seed in range(99)}
    assert found == {"0", "2", "3", "4"}
    assert {other_number("-1", random.Random(seed)) for seed in range(99)} == {"-4", "-3", "-2", "0", "1", "2"}


# ---- files

USER, GOOD, BAD = (
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "assistant", "content": "3"},
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "1+1=", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "chosen": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}],
            "rejected": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "3"}],
        },
    ],
)
def test_all_forms_of_a_row_give_the_same_pair(row: dict[str, Any]) -> None:
    pair = parse_pair({**row, "margin": 0.5, "source": "me"}, {}, "f, line 1", "f/0")
    assert (pair.chosen, pair.rejected, pair.margin) == ((USER, GOOD), (USER, BAD), 0.5)
    assert (pair.id, pair.kind, pair.metadata) == ("f/0", "pairs", {"source": "me"})
    assert parse_pair({**row, "margin": None}, {}, "f, line 1", "f/0").margin == 0.0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "needs the columns chosen and rejected"),
        ({"chosen": "b", "rejected": "c"}, "chosen must be a list of {role, content}"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "0 or more, not -1"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "0 or more, not nan"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "0 or more, not '1'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": []}, "which only SFT uses"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "2+2="}, BAD]}, "the same prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "the same prompt"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen must end with the assistant's message"),
        ([], "must be an object of columns"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place(row: Any, words: str) -> None:
    with pytest.raises(ValueError, match="pairs.jsonl, line 7") as refused:
        parse_pair(row, {}, "pairs.jsonl, line 7", "x")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_pairs_from_files_with_other_column_names(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"q": "1+1=", "better": "2", "worse": "3", "margin": None, "kind": "sum"},
        {"q": "1+2=", "better": "3", "worse": "4", "margin": 1.5, "kind": None},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    for name in ("pairs.jsonl", "pairs.parquet"):
        pairs = file_pairs(str(tmp_path / name), "train", columns)
        assert [(pair.margin, pair.kind, text(pair, "chosen")) for pair in pairs] == [
            (0.0, "sum", "2"),
            (1.5, "pairs", "3"),
        ]
    with pytest.raises(ValueError, match="unknown name 'completion'"):
        file_pairs(str(tmp_path / "pairs.jsonl"), "train", {"completion": "better"})
    with pytest.raises(ValueError, match="no column 'wrose'"):
        file_pairs(str(tmp_path / "pairs.jsonl"), "train", {**columns, "rejected": "wrose"})
