"""Reward functions: the contract over every shipped one, each one's judgement, and the door they come through."""

from __future__ import annotations

import math
import pickle
import sys
import threading
from pathlib import Path

import pytest
from reward_contract import tried

from data.chat import format_answer
from data.sources import task_records
from posttrain.types import Completion, Prompt, RewardResult
from rewards import Item, RewardError, RewardFunction, combine, resolve, score_group
from rewards.check import METADATA
from rewards.extract import final_answer, last_boxed, split_answer

SHIPPED = [f"rewards.{name}:score" for name in ("task_answer", "math_answer", "exact", "format")]

NO_FORMAT = ("empty", "empty answer", "two answers, right last", "never closed", "tags only")


def completion(text: str) -> Completion:
    return Completion(tuple(range(len(text))), (-1.0,) * len(text), "stop", text, policy_version=0)


def write(tmp_path: Path, source: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(source)
    return str(path)


# ---- the contract, over every shipped reward


@pytest.mark.parametrize("spec", SHIPPED)
def test_contract(spec: str) -> None:
    judges_the_answer = spec != "rewards.format:score"
    for probe, score in tried(spec):
        assert 0.0 <= score <= 1.0
        if probe.kind == "right":
            assert score == 1.0
        elif (judges_the_answer and probe.kind != "odd") or probe.name in NO_FORMAT:
            assert score == 0.0, probe.name


@pytest.mark.parametrize("spec", SHIPPED)
def test_shipped_rewards_survive_pickling(spec: str) -> None:
    reward = pickle.loads(pickle.dumps(RewardFunction("r", spec)))
    assert reward(format_answer("x", "42"), "42", METADATA) == RewardFunction("r", spec)(
        format_answer("x", "42"), "42", METADATA
    )


# ---- extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>3</answer>", ("a", "3")),
        (" <think>\na </think>\n<answer> 3 </answer>\n", ("a", "3")),
        ("<think></think><answer></answer>", ("", "")),
        ("<answer>3</answer>", (None, "3")),
        ("3", None),
        ("", None),
        ("<answer>3", None),
        ("3</answer>", None),
        ("</answer>3<answer>", None),
        ("<answer>3</answer><answer>4</answer>", None),
        ("<answer>3</answer> or 4", None),
        ("I say <answer>3</answer>", None),
        ("<think>a<answer>3</answer>", None),
        ("<think>a</think>b<answer>3</answer>", None),
        ("b<think>a</think><answer>3</answer>", None),
        ("<answer>3</answer><think>a</think>", None),
        ("<answer><think>a</think>3</answer>", None),
        ("<think>a<answer>3</answer></think>", None),
        ("</think>a<think><answer>3</answer>", None),
        ("<think>a</think><think>b</think><answer>3</answer>", None),
        ("<think>is <answer>4</answer> it</think><answer>3</answer>", None),
    ],
)
def test_split_answer(text: str, expected: tuple[str | None, str] | None) -> None:
    assert split_answer(text) == expected
    assert final_answer(text) == ((expected[1] or None) if expected else None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{3}.", "3"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} x", r"\frac{1}{2}"),
        (r"\boxed{1", None),
        (r"\boxed{ }", None),
        ("3", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


# ---- each reward's judgement


@pytest.mark.parametrize("task", ["chain_sum", "products", "letter_counting", "bilingual_counting"])
def test_task_answer_gives_worked_and_direct_references_full_score(task: str) -> None:
    reward = RewardFunction("accuracy", "rewards.task_answer:score")
    for record in task_records(task, [1, 2, 3], "train", 60, seed=0):
        assert record.answer is not None
        for worked in (record.worked, None):
            assert reward(format_answer(worked, record.answer), record.answer, record.metadata).score == 1.0
            assert reward(format_answer(worked, record.answer + "1"), record.answer, record.metadata).score == 0.0


def test_task_answer_gives_no_partial_credit() -> None:
    reward = RewardFunction("accuracy", "rewards.task_answer:score")
    metadata = {"task": "chain_sum"}
    assert reward("<answer>+07.0</answer>", "7", metadata).score == 1.0  # the generator's own tolerance
    assert reward("<answer>7 or 8</answer>", "7", metadata).score == 0.0
    assert reward("<answer>77</answer>", "7", metadata).score == 0.0


def test_task_answer_says_which_task_is_unknown() -> None:
    reward = RewardFunction("accuracy", "rewards.task_answer:score")
    with pytest.raises(RewardError, match="accuracy.*unknown task 'sums'"):
        reward("<answer>7</answer>", "7", {"task": "sums"})
    with pytest.raises(RewardError, match="missing 1 required positional argument: 'task'"):
        reward("<answer>7</answer>", "7", {})


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("<think>x</think><answer>0.5</answer>", r"\frac{1}{2}", 1.0),
        (r"so it is \boxed{\frac{2}{4}}", "0.5", 1.0),
        (r"<answer>\boxed{1/2}</answer>", "0.5", 1.0),
        (r"first \boxed{4}, no: \boxed{3}", "3", 1.0),
        ("<answer>x^2-1</answer>", "(x-1)(x+1)", 1.0),
        ("<answer>4</answer>", "3", 0.0),
        ("<answer>3 or 4 or 5</answer>", "3", 0.0),
        (r"<answer>\boxed{4} \boxed{3}</answer>", "4", 0.0),
        ("<answer>3</answer><answer>4</answer>", "3", 0.0),
        (r"<answer>3</answer> \boxed{3}", "3", 0.0),
        ("the answer is 3", "3", 0.0),
        ("<answer>" + "(" * 500 + "</answer>", "3", 0.0),
    ],
)
def test_math_answer(text: str, answer: str, expected: float) -> None:
    assert RewardFunction("m", "rewards.math_answer:score")(text, answer, {}).score == expected


def test_math_answer_stops_what_never_ends_and_goes_on() -> None:
    reward = RewardFunction("m", "rewards.math_answer:score", kwargs={"timeout_seconds": 0.5})
    result = reward("<answer>9^{9^{9^{9^{9}}}}</answer>", "3", {})
    assert (result.score, result.status) == (0.0, "timeout")
    assert reward("<answer>3.0</answer>", "3", {}).score == 1.0


def test_math_answer_works_in_threads() -> None:
    reward = RewardFunction("m", "rewards.math_answer:score")
    scores: dict[int, float] = {}

    def judge(number: int) -> None:
        scores[number] = reward(f"<answer>{number}.0</answer>", "3", {}).score

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {number: float(number == 3) for number in range(6)}


def test_math_answer_refuses_a_reference_it_cannot_read() -> None:
    with pytest.raises(RewardError, match="cannot parse the reference answer ''; correct the data"):
        RewardFunction("m", "rewards.math_answer:score")("<answer>3</answer>", "", {})


def test_exact() -> None:
    exact = RewardFunction("e", "rewards.exact:score")
    assert [exact(f"<answer>{text}</answer>", "07", {}).score for text in ("07", " 07 ", "7")] == [1.0, 1.0, 0.0]
    bare = RewardFunction("e", "rewards.exact:score", kwargs={"answer_tags": False})
    assert [bare(text, "07", {}).score for text in (" 07\n", "<answer>07</answer>")] == [1.0, 0.0]


def test_format() -> None:
    texts = ("<think>a</think><answer>b</answer>", "<think> </think><answer>b</answer>", "<answer>b</answer>", "b")
    loose = RewardFunction("f", "rewards.format:score")
    assert [loose(text, None, {}).score for text in texts] == [1.0, 1.0, 0.0, 0.0]
    strict = RewardFunction("f", "rewards.format:score", kwargs={"require_thinking": True})
    assert [strict(text, None, {}).score for text in texts] == [1.0, 0.0, 0.0, 0.0]


# ---- resolve


def test_resolve_modules_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewards.exact import score

    assert resolve("rewards.exact:score") is score
    path = write(tmp_path, "def length(completion, answer, **metadata):\n    return len(completion)\n")
    assert resolve(f"{path}:length")("abc", None) == 3
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.py:length")("abc", None) == 3
    assert resolve("./mine.py:length") is resolve(f"{path}:length")


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), f"def f(completion, answer, **metadata):\n    return {number}\n")
    assert [resolve(f"{tmp_path}/{number}/mine.py:f")("", None) for number in (1, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("score", "must be module:function or path/to/file.py:function"),
        ("rewards.exact:", "must be module:function"),
        ("rewards.exat:score", "no module 'rewards.exat'; did you mean 'rewards.exact'?"),
        ("nowhere.exact:score", "no module 'nowhere'"),
        ("nowhere/mine.py:score", "file 'nowhere/mine.py' does not exist"),
        ("rewards.exact:scor", "rewards.exact has no 'scor'; did you mean 'score'?"),
        ("rewards.extract:TAGS", "is a tuple, not a function (completion, answer, **metadata)"),
        ("rewards.extract:final_answer", "has the signature (completion: 'str') -> 'str | None', but must take"),
    ],
)
def test_resolve_errors(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match="reward") as raised:
        resolve(spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "def f(completion, answer): return 0",
        "def f(completion, **metadata): return 0",
        "def f(*, completion, answer, **metadata): return 0",
        "async def f(completion, **metadata): return 0",
        "from rewards import grouped\n@grouped\ndef f(completions, answer): return [0]",
        "from rewards import batched\n@batched\ndef f(completions, answers): return [0]",
        "from rewards import batched\n@batched\nasync def f(completions, answers, metadata): return [0]",
        "def f(completion, answer, **metadata): yield 0",
    ],
)
def test_resolve_refuses_what_cannot_take_the_call(tmp_path: Path, source: str) -> None:
    cures = r"\(completions?, answers?, (\*\*)?metadata\)|cannot be async|it yields; return a number"
    with pytest.raises(ValueError, match=cures):
        resolve(write(tmp_path, source) + ":f")


def test_a_package_publishes_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("def score(completion, answer, **metadata): return 0.25\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.rewards]\nquarter = theirs:score\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert RewardFunction("r", "quarter")("text", None, {}).score == 0.25
    with pytest.raises(ValueError, match="no installed package|that an installed package publishes.*'quarter'"):
        resolve("quater")


FORMS = """
from rewards import batched, grouped

async def later(completion, answer, unit=1, **metadata):
    return len(completion) / unit

@batched
def together(completions, answers, metadata, unit=1):
    assert len(completions) == len(answers) == len(metadata)
    return [len(text) / unit for text in completions]

@grouped
def among(completions, answer, *, completion_length, unit=1, **metadata):
    assert completion_length == [len(text) for text in completions]
    return [len(text) / unit for text in completions]

@batched
def short(completions, answers, metadata):
    return [0.0]
"""


@pytest.mark.parametrize("form", ["later", "together", "among"])
def test_every_form_scores_alike(tmp_path: Path, form: str) -> None:
    reward = RewardFunction("r", write(tmp_path, FORMS) + f":{form}", kwargs={"unit": 10})
    prompt = Prompt("p", ({"role": "user", "content": "?"},), (1, 2))
    group = score_group([reward], prompt, [completion(text) for text in ("abc", "", "abcdef")])
    assert group.rewards == pytest.approx((0.3, 0.0, 0.6))


def test_a_batch_of_another_length_is_refused(tmp_path: Path) -> None:
    reward = RewardFunction("r", write(tmp_path, FORMS) + ":short")
    with pytest.raises(ValueError, match="returned 1 results for 2 completions; it must return a list with one"):
        reward.score([Item("a", None, {}), Item("b", None, {})])


def test_a_nearby_file_is_suggested_and_a_broken_file_shows_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "import module_that_is_missing\n")
    with pytest.raises(ValueError, match="did you mean 'mine.py'"):
        resolve(f"{tmp_path}/mien.py:f")
    before = set(sys.modules)
    with pytest.raises(ModuleNotFoundError, match="module_that_is_missing"):
        resolve(f"{path}:f")
    assert not [name for name in set(sys.modules) - before if "mine" in name]


def test_a_missing_import_inside_a_reward_module_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "import module_that_is_missing\n", "reward_of_this_test.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="module_that_is_missing"):
        resolve("reward_of_this_test:f")


# ---- calling and combining


def test_unknown_kwargs_and_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="has no option 'answer_tag'; its options are answer_tags"):
        RewardFunction("e", "rewards.exact:score", kwargs={"answer_tag": False})
    with pytest.raises(ValueError, match="weight must be a finite number, got nan"):
        RewardFunction("e", "rewards.exact:score", weight=math.nan)


def test_a_batched_reward_needs_its_options(tmp_path: Path) -> None:
    source = "from rewards import batched\n@batched\ndef f(completions, answers, metadata, unit): return [unit]"
    path = write(tmp_path, source)
    with pytest.raises(ValueError, match="needs the option 'unit'; give it in kwargs"):
        RewardFunction("r", f"{path}:f")
    assert RewardFunction("r", f"{path}:f", kwargs={"unit": 0.5})("", None, {}).score == 0.5


def test_kwargs_of_the_recipe_win_over_metadata() -> None:
    bare = RewardFunction("e", "rewards.exact:score", kwargs={"answer_tags": False})
    assert bare("07", "07", {"answer_tags": True}).score == 1.0


def test_score_group_by_hand(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from posttrain.types import RewardResult\n"
        "def length(completion, answer, unit=1, *, finish_reason, completion_length, **metadata):\n"
        "    assert finish_reason == 'stop' and metadata['task'] == 'chain_sum'\n"
        "    assert metadata['messages'][0]['content'] == '1+1='\n"
        "    assert completion_length == len(completion)\n"
        "    return RewardResult(len(completion) / unit, detail='long')\n",
    )
    functions = [
        RewardFunction("accuracy", "rewards.task_answer:score"),
        RewardFunction("length", f"{path}:length", weight=-0.5, kwargs={"unit": 10}),
    ]
    prompt = Prompt("p", ({"role": "user", "content": "1+1="},), (1, 2), "2", {"task": "chain_sum"})
    texts = ("<answer>2</answer>", "<answer>3</answer>", "2")  # 18, 18 and 1 characters
    group = score_group(functions, prompt, [completion(text) for text in texts])
    assert group.prompt is prompt
    assert [c.text for c in group.completions] == list(texts)
    assert group.components == {"accuracy": (1.0, 0.0, 0.0), "length": (1.8, 1.8, 0.1)}
    assert group.rewards == pytest.approx((1.0 - 0.9, -0.9, -0.05))


def test_combine_checks_names_and_lengths() -> None:
    one = RewardFunction("a", "rewards.exact:score")
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        combine([one, one], [])
    with pytest.raises(ValueError, match="different names"):
        combine([], [])
    with pytest.raises(ValueError, match="zip"):
        combine([one], [[RewardResult(1.0), RewardResult(1.0)]])
    lonely = RewardFunction("b", "rewards.exact:score", requires={"format": 1.0})
    with pytest.raises(ValueError, match=r"'b' requires 'format', which is no other reward; the others are \['a'\]"):
        combine([one, lonely], [])
    with pytest.raises(ValueError, match="clip must be"):
        RewardFunction("c", "rewards.exact:score", clip=(1.0, 0.0))


def test_gates_and_clips_by_hand() -> None:
    functions = [
        RewardFunction("format", "rewards.format:score", weight=0.5),
        RewardFunction("accuracy", "rewards.exact:score", weight=2.0, requires={"format": 0.8}),
        RewardFunction("length", "rewards.exact:score", weight=-1.0, clip=(0.0, 0.3)),
    ]
    rows = [[RewardResult(score) for score in row] for row in ((1.0, 1.0, 0.2), (0.5, 1.0, 0.9), (0.8, 0.5, -4.0))]
    totals, components = combine(functions, rows)
    assert totals == pytest.approx((0.5 + 2.0 - 0.2, 0.25 - 0.3, 0.4 + 1.0))
    assert components == {"format": (1.0, 0.5, 0.8), "accuracy": (1.0, 1.0, 0.5), "length": (0.2, 0.9, -4.0)}


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'1'", "1j", "RewardResult(float('nan'))"])
def test_anything_but_a_finite_number_is_refused(tmp_path: Path, value: str) -> None:
    source = f"from posttrain.types import RewardResult\ndef f(completion, answer, **metadata): return {value}\n"
    reward = RewardFunction("broken", write(tmp_path, source) + ":f")
    with pytest.raises(ValueError, match="'broken'.*for completion 'some text'; it must return a finite number"):
        reward("some text", "1", {})


def test_numbers_of_other_kinds_are_taken(tmp_path: Path) -> None:
    for value, expected in (("True", 1.0), ("2", 2.0), ("numpy.float32(0.5)", 0.5)):
        name = f"{expected}.py"
        source = f"import numpy\ndef f(completion, answer, **metadata): return {value}\n"
        result = RewardFunction("r", write(tmp_path, source, name) + ":f")("", None, {})
        assert result == RewardResult(expected)
        assert type(result.score) is float


def test_exceptions_carry_the_name_and_the_cause(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(completion, answer, **metadata): return 1 / 0\n")
    with pytest.raises(RewardError, match="'risky' .*raised ZeroDivisionError.*completion 'text'") as raised:
        RewardFunction("risky", f"{path}:f")("text", None, {})
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_what_could_not_be_judged_is_set_apart(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from posttrain.types import RewardResult\n"
        "def f(completion, answer, **metadata): return RewardResult(0.0, completion, 'server away')\n",
    )
    prompt = Prompt("p7", ({"role": "user", "content": "?"},), (1,))
    judge, watcher = RewardFunction("judge", f"{path}:f"), RewardFunction("watcher", f"{path}:f", weight=0.0)
    texts = [completion(text) for text in ("ok", "infrastructure", "timeout")]
    group = score_group([judge], prompt, texts)
    assert group.unjudged == {1}
    assert group.statuses == {"judge": ("ok", "infrastructure", "timeout")}
    assert group.judged_rewards == (0.0, 0.0)
    exact = RewardFunction("exact", "rewards.exact:score")
    assert score_group([exact, watcher], prompt, texts).unjudged == frozenset()  # what does not count does not matter


def test_reserved_metadata_names_are_refused() -> None:
    with pytest.raises(ValueError, match="may not be named 'completion'; rename that column"):
        RewardFunction("e", "rewards.exact:score")("x", "x", {"completion": "y"})
