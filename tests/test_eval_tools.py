"""Comparison of runs, contamination, published tables, answers on disk: small parts, by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.records import Record
from eval.compare import compare_runs, main
from eval.contamination import find, judge_suite
from eval.generations import Generations
from eval.grading import grade
from eval.published import comparison, models, published_rows
from eval.statistics import estimate, stratified
from eval.tables import flaws
from posttrain.errors import RunStopped
from posttrain.recipe import RewardSection
from posttrain.run_dir import RunDir
from posttrain.types import Completion, Prompt, SamplingParams


def rows(scores: dict[str, list[float]], text: str = "What?") -> list[dict[str, Any]]:
    return [
        {
            "mode": "sampled",
            "prompt_id": name,
            "sample": sample,
            "kind": name[0],
            "prompt": text,
            "answer": "4",
            "score": score,
        }
        for name, found in scores.items()
        for sample, score in enumerate(found)
    ]


def test_runs_are_paired_by_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    one.write_rows("eval-maths", rows({"a/1": [1, 0], "a/2": [0, 0], "b/1": [1, 1], "only/1": [1, 1]}))
    two.write_rows("eval-maths", rows({"b/1": [1], "a/2": [1], "a/1": [1]}))
    two.write_rows("eval-other", rows({"x/1": [1]}))
    found = {row.kind: row for row in compare_runs(one.path, two.path)}
    assert list(found) == ["", "a", "b"]
    whole = found[""].comparison
    # On the three shared problems 1/2, 0, 1 became 1, 1, 1.
    assert (whole.first, whole.second, whole.n) == (pytest.approx(0.5), 1.0, 3)
    assert (whole.better, whole.worse) == (2, 0) and whole.p_value == pytest.approx(0.5)
    assert (found[""].only_first, found[""].only_second) == (1, 0)
    assert found["a"].comparison.difference == pytest.approx(0.75)
    assert main([str(one.path), str(two.path)]) == 0
    assert "50.0%" in (text := capsys.readouterr().out) and "left out: 1 and 0 problems" in text
    within = compare_runs(f"{one.path}:maths", f"{two.path}:maths")[0]
    assert within.comparison == whole and within.suite == "chosen"
    with pytest.raises(ValueError, match="no samples/eval-after.parquet; it has maths, other"):
        compare_runs(one.path, f"{two.path}:after")
    other = RunDir(tmp_path / "other")
    other.write_rows("eval-maths", rows({"a/1": [1]}, text="Something else?"))
    assert main([str(one.path), str(other.path)]) == 2
    assert "problem 'a/1' is not the same in both runs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no evaluation"):
        compare_runs(one.path, tmp_path)


def test_problems_in_training_data_are_found_and_left_out_of_a_second_score() -> None:
    questions = {
        "m/1": "How many letters e are in the word sleepless?",
        "m/2": "Name three rivers that flow into the Black Sea and say which of them is the longest of all.",
        "m/3": "Is this one new?",
    }
    chats = [
        Record("t/1", ({"role": "user", "content": "how many letters E are in the word sleepless"},)),
        Record(
            "t/2",
            (
                {"role": "user", "content": "Help me with my homework"},
                {"role": "assistant", "content": f"You were asked: {questions['m/2']} The Danube."},
            ),
        ),
        Record("t/3", ({"role": "user", "content": f"{questions['m/1']} {questions['m/2']}"},)),
    ]
    assert set(find(questions, chats[:1], 13)) == {"m/1"}
    assert set(find(questions, chats[2:], 13)) == {"m/1", "m/2"}  # both of one chat
    scores = rows({"m/1": [1, 1], "m/2": [1, 0], "m/3": [0, 1]})
    found = judge_suite(questions, scores, chats, 13)
    assert set(found.contaminated) == {"m/1", "m/2"} and found.to_dict()["share"] == pytest.approx(2 / 3)
    assert found.clean is not None and (found.clean.value, found.clean.n) == (0.5, 1)
    assert judge_suite(questions, scores, [], 13).contaminated == ()


def test_parts_weigh_what_they_should() -> None:
    found = stratified([(0.5, [[1.0], [1.0], [0.0], [0.0]]), (0.25, [[1.0]]), (0.25, [[0.0], [0.0]])])
    assert (found.value, found.n) == (0.5, 7) and 0 <= found.low < 0.5 < found.high <= 1
    one = stratified([(1.0, [[1.0], [0.0], [1.0], [0.0]])])
    assert one.value == 0.5 and one.high - one.low == pytest.approx(
        (part := estimate([[1.0], [0.0], [1.0], [0.0]])).high - part.low
    )
    with pytest.raises(ValueError, match="sum to 1"):
        stratified([(0.5, [[1.0]])])


def test_published_numbers_are_those_of_the_model_cards() -> None:
    table = published_rows()
    by_model = {number.model: number.value for number in table["MATH-500"].numbers}
    assert (by_model["DeepSeek-V3"], by_model["DeepSeek-R1"], by_model["GPT-4o-0513"]) == (90.2, 97.3, 74.6)
    assert {number.model: number.value for number in table["MMLU (base)"].numbers}["DeepSeek-V3-Base"] == 87.1
    assert all(0 < number.value < 100 and number.source for row in table.values() for number in row.numbers)
    for row in table.values():
        assert len({number.model for number in row.numbers}) == len(row.numbers)
    assert models({"GPQA-Diamond": table["GPQA-Diamond"]})[:2] == ["DeepSeek-V2-0506", "DeepSeek-V2.5-0905"]
    own = {
        "published": "AIME 2024",
        "pass_at_1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 30},
        "metric": "pass@1",
        "num_samples": 64,
        "num_fewshot": 0,
        "temperature": 0.6,
        "departs": "",
    }
    text = comparison({"aime_2024": own, "tiny_tasks": {**own, "published": None}}, "mine")
    assert "| AIME 2024 (Pass@1) | 50.0 [40.0, 60.0] | 30 | 4.6 |" in text and "64 sample(s), temperature 0.6" in text
    assert comparison({"tiny_tasks": {**own, "published": None}}, "mine") == ""


PROMPTS = [Prompt(f"p/{place}", ({"role": "user", "content": f"{place}?"},), (1,), str(place)) for place in range(3)]
PARAMS = SamplingParams(8, 0.5, num_generations=2)


def test_answers_survive_a_crash_and_are_not_asked_for_again(tmp_path: Path) -> None:
    asked: list[list[tuple[int, int]]] = []

    def stream(
        prompts: Sequence[Prompt], params: SamplingParams, wanted: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, Completion]]:
        asked.append(list(wanted))
        for row, column in wanted:
            if len(asked) == 1 and (row, column) == (1, 1):
                raise RuntimeError("killed")
            yield row, column, Completion((7, 8), (-1.0, -1.0), "stop", f"{row}.{column}", 3)

    with pytest.raises(RuntimeError, match="killed"):
        Generations(tmp_path, "model", resume=False).keep("s", stream)(PROMPTS, PARAMS)
    file = tmp_path / "generations" / "s.jsonl"
    file.write_text(file.read_text() + '{"key": "torn')
    with pytest.raises(RunStopped, match="add --resume"):
        Generations(tmp_path, "model", resume=False)
    groups = Generations(tmp_path, "model", resume=True).keep("s", stream)(PROMPTS, PARAMS)
    assert asked[1] == [(1, 1), (2, 0), (2, 1)]
    assert [[completion.text for completion in group] for group in groups] == [
        [f"{row}.{column}" for column in range(2)] for row in range(3)
    ]
    assert all(len(completion.sampled_ids) == 2 for group in groups for completion in group)
    # Another model, or other sampling, is another answer.
    Generations(tmp_path, "another", resume=True).keep("s", stream)(PROMPTS, PARAMS)
    Generations(tmp_path, "model", resume=True).keep("s", stream)(PROMPTS, SamplingParams(8, 0.6, num_generations=2))
    assert [len(wanted) for wanted in asked] == [6, 3, 6, 6]
    (tmp_path / "summary.json").write_text(json.dumps({"finished": True}))
    Generations(tmp_path, "model", resume=False)
    assert not file.exists()


def test_verdicts_that_were_paid_for_are_not_asked_for_again(tmp_path: Path) -> None:
    log, reward = tmp_path / "calls.txt", tmp_path / "judge.py"
    reward.write_text(
        "from posttrain.types import RewardResult\n\n\n"
        "def score(completion, answer, away='', **metadata):\n"
        f"    open({str(log)!r}, 'a').write(completion + '\\n')\n"
        "    if completion == away:\n        return RewardResult(0.0, 'infrastructure', 'judge is away')\n"
        "    return float(completion == answer)\n"
    )
    groups = [[Completion((1,), (0.0,), "stop", text, 0)] for text in "012"]
    section = RewardSection(func=f"{reward}:score", kwargs={"away": "1"}, retries=0)
    verdicts = Generations(tmp_path, "m", resume=False).verdicts("s")
    with pytest.raises(RunStopped, match="1 no verdict"):
        grade(section, PROMPTS, groups, known=verdicts)
    (tmp_path / "generations" / "s-verdicts.jsonl").open("a").write('{"torn')
    log.write_text("")
    again = Generations(tmp_path, "m", resume=True).verdicts("s")
    assert len(again) == 2
    graded = grade(section, PROMPTS, groups, known=again, max_failed_fraction=0.5)
    assert graded.scores_PN == [[1.0], [0.0], [1.0]] and graded.counts["no_verdict"] == 1
    assert log.read_text().split() == ["1"]  # the one without a verdict
    other = section.model_copy(update={"kwargs": {"away": "2"}})  # another judge has to be asked
    assert grade(other, PROMPTS, groups, known=again, max_failed_fraction=0.5).scores_PN == [[1.0], [1.0], [0.0]]


def test_what_goes_wrong_is_counted(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os, time\nfrom posttrain.types import RewardResult\n\n\n"
        "def score(completion, answer, **metadata):\n"
        "    if completion == 'crash':\n        os._exit(1)\n"
        "    if completion == 'hang':\n        time.sleep(60)\n"
        "    if completion == 'unknown':\n        return RewardResult(0.0, 'infrastructure', 'judge is away')\n"
        "    return float(completion == answer)\n"
    )
    texts = [("0", "stop"), ("crash", "stop"), ("1", "length"), ("hang", "stop"), ("2", "stop"), ("", "abort")]
    flat = [Completion((1,), (0.0,), reason, text, 0) for text, reason in texts]  # type: ignore[arg-type]
    groups = [flat[0:2], flat[2:4], flat[4:6]]
    section = RewardSection(func=f"{reward}:score", timeout_seconds=1.0, num_workers=2, retries=0)
    with pytest.raises(RunStopped, match="of 1 completions 1 have no answer and 0 no verdict"):
        grade(section, PROMPTS[:1], [[flat[-1]]])
    graded = grade(section, PROMPTS, groups, max_failed_fraction=0.2)
    assert graded.scores_PN == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    assert graded.counts == {
        "completions": 6,
        "truncated": 1,
        "no_answer": 1,
        "no_verdict": 0,
        "grader_timeout": 1,
        "grader_crash": 1,
    }
    assert flaws({"counts": graded.counts}) == (
        "1 truncated, 1 without an answer, 1 grader timed out, 1 grader crashed (of 6)"
    )
    with pytest.raises(RunStopped, match=r"1 no verdict \(.*judge is away"):
        grade(section, PROMPTS[:1], [[Completion((1,), (0.0,), "stop", "unknown", 0)]])
