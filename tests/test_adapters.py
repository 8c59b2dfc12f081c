"""Adapters: rows with the columns of published datasets, written here by hand, become our records and pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data.adapters import SHIPPED, adapter_for, resolve_adapter
from data.pairs import file_pairs
from data.records import Record
from data.sources import file_records, file_source
from data.streams import stream_records
from posttrain.cli import check_tasks
from posttrain.recipe import DatasetSection, RecipeError
from posttrain.recipe_file import load_recipe
from rewards.code_cases import read_tests

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
USER = {"role": "user", "content": "Name a colour."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def openr1(whole: list[bool], right: list[bool]) -> dict[str, Any]:
    return {
        "problem": "What is 2+2?",
        "solution": "Add them. $\\boxed{4}$",
        "answer": "4",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "by_hand",
        "uuid": "u-1",
        "is_reasoning_complete": whole,
        "generations": ["<think>hm", "<think>two and two</think>\\boxed{4}", "<think>again</think>\\boxed{4}"],
        "correctness_math_verify": right,
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 1,
        "messages": [{"role": "user", "content": "What is 2+2?"}, said("<think>two and two</think>\\boxed{4}")],
    }


def pair(chosen: str, rejected: str, better: float, worse: float) -> dict[str, Any]:
    chats = {"chosen": [USER, said(chosen)], "rejected": [USER, said(rejected)], "messages": [USER, said(chosen)]}
    return {
        "prompt": USER["content"],
        "prompt_id": "p-1",
        **chats,
        "score_chosen": better,
        "score_rejected": worse,
    }


def steer(preference: int, context: Any = None) -> dict[str, Any]:
    return {
        "domain": "general",
        "language": "english",
        "context": context or [USER, said("Red."), {"role": "user", "content": "Another one?"}],
        "response1": "Blue.",
        "response2": "Red, as I said.",
        "overall_preference": preference,
        "individual_preference": [],
    }


def coding(cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "source": "by_hand",
        "task_type": "verifiable_code",
        "in_source_id": "7",
        "problem_statement": "Print the sum of two numbers.",
        "gold_standard_solution": "print(sum(map(int, input().split())))",
        "problem_id": "vc-7",
        "metadata": {"difficulty": None},
        "verification_info": {"language": "python", "test_cases": cases},
    }


STDIN = {"fn_name": None, "input": "3 4\n", "output": "7\n", "type": "stdin_stdout"}

# name -> rows that become one record or pair each, rows that are left out, columns that must be there
FIXTURES: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "gsm8k": (
        [{"question": "Ann has 3 bags of 400 nuts. How many?", "answer": "3*400=<<3*400=1200>>1200 nuts\n#### 1,200"}],
        [],
        ["question", "answer"],
    ),
    "dapo_math": (
        [
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": DAPO.format("Find 6*7.\n\nGive an integer.")}],
                "ability": "MATH",
                "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "i-1"},
            }
        ],
        [],
        ["prompt", "reward_model"],
    ),
    "deepscaler": (
        [
            {"problem": "Find 6*7.", "answer": "42", "solution": "6*7=42"},
            {"problem": "2+2?", "answer": "4", "solution": ""},
        ],
        [],
        ["problem", "answer"],
    ),
    "numina_math": (
        [{"source": "by_hand", "problem": "2+2?", "solution": "So $\\boxed{4}$.", "messages": [USER, said("x")]}],
        [{"source": "by_hand", "problem": "Prove it.", "solution": "Clear.", "messages": [USER, said("x")]}],
        ["problem", "solution"],
    ),
    "openr1_math": (
        [openr1([False, True, True], [True, True, True])],
        [openr1([True, True, False], [False, False, True])],
        ["problem", "answer", "generations", "is_reasoning_complete", "correctness_math_verify"],
    ),
    "ultrafeedback": (
        [pair("Red.", "Dog.", 8.0, 3.5)],
        [pair("Red.", "Red.", 8.0, 3.5), pair("Red.", "Blue.", 5.0, 5.0)],
        ["chosen", "rejected", "score_chosen", "score_rejected"],
    ),
    "helpsteer3": (
        [steer(-2), steer(3)],
        [steer(0)],
        ["context", "response1", "response2", "overall_preference"],
    ),
    "verifiable_coding": (
        [coding([STDIN])],
        [coding([STDIN, {**STDIN, "fn_name": "add", "type": "function_call"}])],
        ["problem_statement", "verification_info"],
    ),
}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.parquet") -> str:
    """The rows as a Parquet file, as the hub has them, or as JSONL."""
    file = folder / name
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def made(name: str, path: str) -> list[Any]:
    makes = {one.name: one.makes for one in SHIPPED}[name]
    if makes == "pairs":
        return list(file_pairs(path, "train", adapter=name))
    return list(file_records(path, "train", adapter=name))


def test_every_shipped_adapter_has_rows_here() -> None:
    assert {one.name for one in SHIPPED} == set(FIXTURES)
    for one in SHIPPED:
        assert callable(resolve_adapter(one.name, one.makes))


@pytest.mark.parametrize("kind", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize("name", FIXTURES)
def test_good_rows_become_records_and_others_are_left_out(name: str, kind: str, tmp_path: Path) -> None:
    good, left_out, _ = FIXTURES[name]
    found = made(name, written(tmp_path, [*left_out, *good], kind))
    assert len(found) == len(good)
    assert all(
        one.place.endswith(f"{'line' if kind.endswith('l') else 'row'} {n}")
        for one, n in zip(found, range(len(left_out) + kind.endswith("l"), 99), strict=False)
    )
    for one in found:  # whatever is metadata reaches rewards as keyword arguments
        assert not {"messages", "solution", "generations", "gold_standard_solution", "completion"} & set(one.metadata)


@pytest.mark.parametrize(("name", "missing"), [(name, key) for name, (_, _, keys) in FIXTURES.items() for key in keys])
def test_a_missing_column_is_named_with_file_and_row(name: str, missing: str, tmp_path: Path) -> None:
    good = FIXTURES[name][0]
    wrong = {key: value for key, value in good[0].items() if key != missing}
    path = written(tmp_path, [*good, wrong], "rows.jsonl")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line {len(good) + 1}: adapter {name}: .*{missing}"):
        made(name, path)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (_, _, keys) in FIXTURES.items() for key in keys])
def test_a_column_of_another_kind_is_named(name: str, key: str, tmp_path: Path) -> None:
    path = written(tmp_path, [{**FIXTURES[name][0][0], key: {"a": 1}}], "rows.jsonl")
    with pytest.raises(ValueError, match=rf"line 1: adapter {name}: .*{key}"):
        made(name, path)


def one(name: str, tmp_path: Path) -> Any:
    return made(name, written(tmp_path, FIXTURES[name][0]))[0]


def test_gsm8k(tmp_path: Path) -> None:
    record: Record = one("gsm8k", tmp_path)
    assert (record.answer, record.worked) == ("1200", "3*400=1200 nuts")
    path = written(tmp_path, [{"question": "?", "answer": "it is 3"}], "no_mark.jsonl")
    with pytest.raises(ValueError, match="line 1: adapter gsm8k: column answer must end with '#### <number>'"):
        file_records(path, "train", adapter="gsm8k")


def test_dapo_math_keeps_the_problem_alone(tmp_path: Path) -> None:
    record: Record = one("dapo_math", tmp_path)
    assert record.messages == ({"role": "user", "content": "Find 6*7.\n\nGive an integer."},)
    assert (record.id, record.answer, record.metadata["data_source"]) == ("i-1", "42", "math_dapo")


def test_openr1_math_takes_the_first_whole_and_right_generation(tmp_path: Path) -> None:
    record: Record = one("openr1_math", tmp_path)
    assert record.is_chat and record.messages[-1]["content"] == "<think>two and two</think>\\boxed{4}"
    uneven = written(tmp_path, [{**openr1([True], [True, True, True])}], "uneven.jsonl")
    with pytest.raises(ValueError, match="3, 1 and 3 entries"):
        file_records(uneven, "train", adapter="openr1_math")
    # For RL the columns are mapped, and the chat column that the file also has is not in the way.
    problems = file_records(uneven, "train", {"prompt": "problem", "answer": "answer"})
    assert not problems[0].is_chat and problems[0].answer == "4"


def test_numina_and_deepscaler_have_answer_and_worked_solution(tmp_path: Path) -> None:
    assert (one("numina_math", tmp_path).answer, one("numina_math", tmp_path).worked) == ("4", "So $\\boxed{4}$.")
    first, second = made("deepscaler", written(tmp_path, FIXTURES["deepscaler"][0]))
    assert (first.answer, first.worked, second.worked) == ("42", "6*7=42", None)


def test_preferences_point_the_right_way(tmp_path: Path) -> None:
    first, second = made("helpsteer3", written(tmp_path, FIXTURES["helpsteer3"][0]))
    assert [p.chosen[-1]["content"] for p in (first, second)] == ["Blue.", "Red, as I said."]
    assert first.chosen[:-1] == second.rejected[:-1] and len(first.chosen) == 4
    assert one("ultrafeedback", tmp_path).rejected == (USER, said("Dog."))


def test_coding_problems_have_tests_that_the_reward_reads(tmp_path: Path) -> None:
    record: Record = one("verifiable_coding", tmp_path)
    (case,) = read_tests(record.metadata["tests"])
    assert (case.expected, record.id) == ("7\n", "vc-7")
    row = coding([STDIN])
    text = written(tmp_path, [{**row, "verification_info": json.dumps(row["verification_info"])}], "text.jsonl")
    assert file_records(text, "train", adapter="verifiable_coding")[0].metadata["tests"] == record.metadata["tests"]


def test_datasets_of_chats_need_no_adapter(tmp_path: Path) -> None:
    tulu = {"id": "t-1", "messages": [USER, said("Red.")], "source": "by_hand"}
    thoughts = {"messages": [USER, said("<think>red?</think>Red.")], "num_tokens": 9, "source": "by_hand"}
    for name, row in (("tulu.parquet", tulu), ("thoughts.parquet", thoughts)):
        (record,) = file_records(written(tmp_path, [row], name), "train")
        assert record.is_chat and record.metadata["source"] == "by_hand"


def test_hub_names_know_their_adapter_unless_columns_are_mapped() -> None:
    assert adapter_for("openai/gsm8k", None, {}, "records") == "gsm8k"
    assert adapter_for("openai/gsm8k", None, {"prompt": "question"}, "records") is None
    assert adapter_for("openai/gsm8k", "my.py:adapt", {}, "records") == "my.py:adapt"
    assert adapter_for("HuggingFaceH4/ultrafeedback_binarized", None, {}, "records") is None
    assert adapter_for("allenai/tulu-3-sft-mixture", None, {}, "records") is None


def test_ones_own_adapter(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def adapt(row):\n    return {'prompt': row['q'], 'answer': row['a']} if row['a'] else None\n")
    path = written(tmp_path, [{"q": "1+1?", "a": "2"}, {"q": "1+2?", "a": ""}, {"q": "2+2?", "a": "4"}], "rows.jsonl")
    spec = f"{code}:adapt"
    assert [record.answer for record in file_records(path, "train", adapter=spec)] == ["2", "4"]
    assert len(file_records(path, "train", adapter=spec, size=1)) == 1
    with pytest.raises(ValueError, match="has 2 records, fewer than size 3"):
        file_records(path, "train", adapter=spec, size=3)


def test_a_stream_is_adapted_row_by_row(tmp_path: Path) -> None:
    good, left_out, _ = FIXTURES["numina_math"]
    path = written(tmp_path, [*good, *left_out, *good], "rows.jsonl")
    source = file_source(path, "train", adapter="numina_math")
    stream = stream_records([source], [1.0], seed=0)
    assert [next(stream).answer for _ in range(4)] == ["4"] * 4  # two epochs
    with pytest.raises(ValueError, match=r"train\[:5\]"):
        file_source(path, "train", size=5, adapter="numina_math")


def test_wrong_names_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gsm' is unknown; the shipped ones are dapo_math"):
        resolve_adapter("gsm", "records")
    with pytest.raises(ValueError, match="'gsm8k' makes records, and pairs are wanted here: helpsteer3, ultrafeedback"):
        resolve_adapter("gsm8k", "pairs")
    with pytest.raises(ValueError, match="both say what becomes of the columns"):
        DatasetSection(path="owner/name", adapter="gsm8k", columns={"prompt": "question"})
    with pytest.raises(ValueError, match="adapter has no meaning beside task"):
        DatasetSection(task="chain_sum", size=1, adapter="gsm8k")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "stage: grpo\nmax_steps: 1\nmodel: {model_name_or_path: owner/name}\n"
        "datasets: [{path: owner/data, adapter: gsm}]\nrewards: [{func: 'rewards.math_answer:score'}]\n"
    )
    with pytest.raises(RecipeError, match=r"datasets\.0\.adapter: adapter 'gsm' is unknown"):
        check_tasks(load_recipe(file), file)
