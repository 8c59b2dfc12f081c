"""Our benchmarks against lm-eval's own implementation: the same rows and the same model outputs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import drop

from eval.benchmarks import get_benchmark
from eval.benchmarks.loading import load
from eval.likelihood import task_manager
from posttrain.recipe import BenchmarkSection, EvalSuiteSection
from rewards import RewardFunction
from rewards.drop_f1 import f1

pytest.importorskip("lm_eval")
os.environ["HF_DATASETS_OFFLINE"] = "1"
PLAIN: dict[str, Any] = {"num_fewshot": 0, "log_samples": True, "bootstrap_iters": 0}


def registered(name: str, folder: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """lm-eval's task of that name, over rows of ours."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(file) for split in ("train", "validation", "test")}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **changes,
    }


def run_scripted(task: dict[str, Any], outputs: Sequence[str]) -> list[dict[str, Any]]:
    """What lm-eval says of given outputs: its samples, in the order of the rows."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    class Scripted(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [outputs[request.doc_id] for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

    group = {"group": "local_copy", "task": [task]}  # in a group, a task is the registered one with other data
    found = simple_evaluate(model=Scripted(), tasks=[group], task_manager=task_manager(), **PLAIN)
    samples = found["samples"][task["task"]]
    return sorted(samples, key=lambda sample: sample["doc_id"])


# Outputs for a problem whose answer is 1200, and whether it is right.
GSM8K = [
    "They earn 30 * 40 = 1200 dollars.",
    "The answer is 1,200.",
    "It is $1200",
    "First 40, then 30.\n#### 1200",
    "#### 1,200",
    "They earn 1200 - 200 = 1000 dollars.",
    "They earn 1200. No: 120.",
    "They earn 12000 dollars",
    "I do not know.",
    "-1200",
    "So the total is 1200.",
]


@pytest.mark.slow
def test_gsm8k_agrees_with_flexible_extraction(tmp_path: Path) -> None:
    row = {
        "question": "30 people pay 40 dollars each. How much is it?",
        "answer": "30*40=<<30*40=1200>>1200\n#### 1,200",
    }
    rows = [row] * len(GSM8K)
    samples = run_scripted(registered("gsm8k", tmp_path, rows), GSM8K)
    theirs = [sample["exact_match"] for sample in samples if sample["filter"] == "flexible-extract"]
    strict = [sample["exact_match"] for sample in samples if sample["filter"] == "strict-match"]
    benchmark = get_benchmark("gsm8k")
    (problem,) = load(benchmark, path=str(tmp_path / "gsm8k.jsonl"), size=1).problems
    grader = RewardFunction("accuracy", benchmark.reward, kwargs=benchmark.reward_kwargs)
    ours = [grader(output, problem.answer, problem.metadata).score for output in GSM8K]
    assert ours == theirs and 0 < sum(ours) < len(ours)
    # Whatever strict matching accepts is right for us too.
    assert all(ours[place] >= score for place, score in enumerate(strict)) and sum(strict) == 2


@pytest.mark.slow
def test_drop_agrees_on_rows_and_on_random_answers(tmp_path: Path) -> None:
    from lm_eval.tasks.drop.utils import get_metrics

    outputs = ["48 yards", "Ada Low and Bo Hill", "48.0", "the 31-yard one", "3 May 1998", "", "Ada Low"]
    rows = [
        drop(0, "How long?", {"number": "48"}, {"spans": ["48 yards"]}),
        drop(1, "Who?", {"spans": ["Ada Low", "Bo Hill"]}, {"spans": ["Ada Low"]}),
        drop(2, "How long?", {"number": "48"}),
        drop(3, "Which?", {"spans": ["the 31-yard field goal"]}),
        drop(4, "When?", {"date": {"day": "3", "month": "May", "year": "1998"}}),
        drop(5, "Who?", {"spans": ["Ada Low"]}),
        drop(6, "Who?", {"spans": ["Bo Hill", "Cy"]}, {"spans": ["Ada Low"]}),
    ]
    samples = run_scripted(registered("drop", tmp_path, rows), outputs)
    theirs = [sample["f1"] for sample in samples]
    benchmark = get_benchmark("drop")
    problems = load(benchmark, path=str(tmp_path / "drop.jsonl"), num_fewshot=0).problems
    grader = RewardFunction("accuracy", benchmark.reward)
    ours = [grader(out, problem.answer, problem.metadata).score for out, problem in zip(outputs, problems, strict=True)]
    assert ours == pytest.approx(theirs, abs=1e-9) and 0 < sum(ours) < len(ours)

    generator = random.Random(0)
    words = [
        "the",
        "a",
        "Reds",
        "reds",
        "31",
        "31.0",
        "48",
        "yards",
        "yard-line",
        "-5",
        "U.S.",
        "3,000",
        "Low's",
        "AN",
        "x1",
    ]
    for _ in range(3000):
        spans, gold = (
            [" ".join(generator.choices(words, k=generator.randint(1, 3))) for _ in range(generator.randint(1, 3))]
            for _ in range(2)
        )
        assert f1(spans, gold) == pytest.approx(get_metrics(tuple(spans), tuple(gold))[1], abs=1e-9), (spans, gold)


RESPONSES = [
    "Rain falls on the sea, the sea is wide.",
    "rain falls on the sea and the sea is wide",
    # Long, since langdetect takes a short text in capitals for German.
    "THE WEATHER IS WHAT EVERYBODY IN THE TOWN TALKS ABOUT BECAUSE IT HAS BEEN RAINING FOR THREE DAYS",
    '"A quotation of some sea, the Sea and sea"',
    "<<My Sea>>\n\nFirst paragraph here.\n\nP.S. The sea!",
    "* one sea\n* two\n* three",
    "One [name] at [place] near the sea *marked here* and *there*",
    '{"sea": 1}',
    '```json\n{"sea": [1, 2]}\n```',
    "My answer is yes.",
    "One answer\n******\nAnother answer",
    "SECTION 1 about the sea SECTION 2 about rain",
    "First part\n***\nsecond part\n***\nThird part",
    "Name the sea twice. The sea and the sea. Any other questions?",
    "seaside and overseas",
    "",
]
INSTRUCTIONS: list[tuple[str, dict[str, Any]]] = [
    ("punctuation:no_comma", {}),
    ("change_case:english_lowercase", {}),
    ("change_case:english_capital", {}),
    ("startend:quotation", {}),
    ("startend:end_checker", {"end_phrase": "Any other questions?"}),
    ("detectable_format:title", {}),
    ("detectable_format:json_format", {}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name the sea twice."}),
    ("keywords:existence", {"keywords": ["sea", "rain"]}),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}),
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}),
    ("keywords:letter_frequency", {"letter": "s", "let_frequency": 3, "let_relation": "less than"}),
    ("length_constraints:number_words", {"num_words": 6, "relation": "at least"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "first"}),
]


@pytest.fixture
def ifeval_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """lm-eval's strict check, imported without the download of NLTK's models, which these instructions do not need."""
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda *_, **__: None)
    from lm_eval.tasks.ifeval.utils import process_results

    yield process_results


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=[name for name, _ in INSTRUCTIONS])
def test_ifeval_agrees_by_instruction(
    instruction: tuple[str, dict[str, Any]], ifeval_task: Any, tmp_path: Path
) -> None:
    name, options = instruction
    row = {"key": 1, "prompt": "Name the sea twice.", "instruction_id_list": [name], "kwargs": [options]}
    file = tmp_path / "ifeval.jsonl"
    file.write_text(json.dumps(row) + "\n")
    benchmark = get_benchmark("ifeval")
    (problem,) = load(benchmark, path=str(file)).problems
    grader = RewardFunction("accuracy", benchmark.reward)
    ours = [grader(response, None, problem.metadata).score for response in RESPONSES]
    theirs = [float(ifeval_task(row, [response])["prompt_level_strict_acc"]) for response in RESPONSES]
    assert ours == theirs


@pytest.mark.slow
def test_mmlu_by_likelihood_is_what_transformers_says(policy_path: Path, tmp_path: Path) -> None:
    """Through lm-eval with our checkpoint, against the logprobs of the four letters by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.likelihood import check_likelihood, run_likelihood
    from posttrain.recipe import ModelSection

    generator = random.Random(1)
    rows = [
        {
            "question": f"What is {a} + {a}?",
            "subject": generator.choice(["anatomy", "astronomy"]),
            "choices": [str(a), str(2 * a), str(3 * a), "0"],
            "answer": generator.randrange(4),
        }
        for a in range(1, 25)
    ]
    file = tmp_path / "mmlu.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = EvalSuiteSection(
        benchmarks=[{"name": "mmlu", "path": str(file), "method": "lm_eval", "num_fewshot": 0}]  # type: ignore[arg-type]
    )
    check_likelihood(suite.benchmarks[0], suite)
    result = run_likelihood(suite.benchmarks[0], suite, ModelSection(model_name_or_path=str(policy_path)))

    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    right: dict[str, list[float]] = {}
    for row in rows:
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
        head = f"The following are multiple choice questions (with answers) about {row['subject']}.\n\n"
        context = f"{head}{row['question']}\n{lines}\nAnswer:"
        sums = []
        for letter in "ABCD":
            ids = torch.tensor([tokenizer.encode(f"{context} {letter}")])
            start = len(tokenizer.encode(context))
            with torch.no_grad():
                logprobs = model(ids).logits.log_softmax(-1)
            sums.append(sum(logprobs[0, place - 1, ids[0, place]].item() for place in range(start, ids.shape[1])))
        hit = float(max(range(4), key=sums.__getitem__) == row["answer"])
        right.setdefault(f"mmlu_{row['subject']}", []).append(hit)
    assert {task: found.n for task, found in result.by_level.items()} == {
        task: len(hits) for task, hits in right.items()
    }
    for task, hits in right.items():
        assert result.by_level[task].value == pytest.approx(sum(hits) / len(hits))
    total = [hit for hits in right.values() for hit in hits]
    assert result.pass_at_1.value == pytest.approx(sum(total) / 24) and 0 < sum(total) < 24
    assert len(result.rows) == 24 and {row["mode"] for row in result.rows} == {"lm_eval"}


def test_what_likelihoods_cannot_do_is_said_first() -> None:
    from eval.likelihood import check_likelihood

    def suite(**options: Any) -> tuple[BenchmarkSection, EvalSuiteSection]:
        found = EvalSuiteSection(benchmarks=[{"method": "lm_eval", **options}])  # type: ignore[arg-type]
        return found.benchmarks[0], found

    with pytest.raises(ValueError, match="math_500 has no task of lm-eval"):
        check_likelihood(*suite(name="math_500"))
    with pytest.raises(ValueError, match="num_samples has no meaning"):
        check_likelihood(*suite(name="mmlu", num_samples=4))
