"""Thousands of wrong recipes, data, checkpoints, rewards and replies: each is an error that says where, or is taken."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from malformed import changed, line, many, texts, torn, values

from data.files import Row
from data.loss_mask import tokenize_chat
from data.pairs import file_pairs
from data.prompts import PromptStream
from data.records import Record, parse_row
from data.sources import file_records
from posttrain.dry_run import describe
from posttrain.errors import RunStopped
from posttrain.journal import Journal
from posttrain.recipe import DistillRecipe, RecipeError, RecordingsSection
from posttrain.recipe_file import dump_recipe, load_recipe
from posttrain.teachers import RecordedTeacher
from posttrain.types import RewardResult

SFT: dict[str, Any] = {
    "stage": "sft",
    "model": {"build": {"hidden_size": 64, "num_hidden_layers": 2}},
    "datasets": [{"task": "chain_sum", "levels": [1, 2], "size": 10, "weight": 1.5}],
    "training": {"max_steps": 3, "max_length": 128},
    "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
}
GRPO: dict[str, Any] = {
    "stage": "grpo",
    "max_steps": 3,
    "model": {"model_name_or_path": "owner/name"},
    "datasets": [{"path": "owner/data", "columns": {"prompt": "question"}}],
    "rewards": [{"func": "rewards.format:score", "clip": [0, 1], "kwargs": {"a": 1}}],
    "rollout": {"num_prompts": 4, "num_generations": 4, "max_completion_length": 16},
    "algorithm": {"num_minibatches": 2},
}
RECIPES = [SFT, GRPO]
YAML = [yaml.safe_dump(tree).encode() for tree in RECIPES]

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "4-1="}, {"role": "assistant", "content": "3"}], "id": "a"},
    {"conversations": [{"from": "human", "value": "4-1="}, {"from": "gpt", "value": "3"}]},
    {"prompt": "4-1=", "completion": "3", "tools": [{"type": "function"}], "chat_template_kwargs": {"x": 1}},
    {"prompt": [{"role": "user", "content": "4-1="}], "answer": "3", "level": 2},
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "4-1=", "chosen": "3", "rejected": "4", "margin": 0.5, "kind": "x"},
    {
        "chosen": [{"role": "user", "content": "4-1="}, {"role": "assistant", "content": "3"}],
        "rejected": [{"role": "user", "content": "4-1="}, {"role": "assistant", "content": "4"}],
    },
]


def says_where(error: BaseException, *names: object) -> None:
    """One line or a few, for people, that names what is wrong."""
    text = str(error)
    assert text and all(str(name) in text for name in names), (names, text)
    assert "Traceback" not in text and len(text) < 3000, text


# --- recipes ----------------------------------------------------------------------------------------------------------


def try_recipe(path: Path, overrides: list[str]) -> None:
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        says_where(error, "" if overrides else path)
        return
    text = dump_recipe(recipe)  # what is taken can be written down, read again, and planned
    path.write_text(text)
    assert load_recipe(path) == recipe
    if not isinstance(recipe, DistillRecipe):
        describe(recipe)


@many
@given(content=torn(YAML))
@example(content=b"a: 2001-99-99\n")  # a date that is none
@example(content=b"a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b]\nstage: *c\n")
@example(content=b"? {a: b}\n: c\n")
@example(content=b"stage: sft\n" + b"x: " + b"[" * 5000)
@example(content=b"stage: sft\nmodel: &m {build: *m}\n")
@example(content=b"1: 2\nstage: sft\n")
@example(content=b"stage: sft\nseed: " + b"9" * 5000)
@example(content=b"stage: sft\nseed: 1:60:99:0x\nb: 0b\nc: 0x\n")
@example(content=b'stage: sft\nrun_name: "\\uD800"\n')
def test_recipe_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.yaml"
    path.write_bytes(content)
    try_recipe(path, [])


@many
@given(tree=changed(RECIPES))
@example(tree={**SFT, "x" * 5000: 1})
@example(tree={**SFT, "seed": "x" * 5000})
@example(tree={**SFT, "stage": "x" * 5000})
@example(tree={**GRPO, "rewards": [{"func": "a:b", "name": "x" * 5000, "requires": {"y" * 5000: 1}}]})
def test_recipe_values(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML, but for what YAML cannot hold
    try_recipe(path, [])


@many
@given(
    override=st.one_of(
        texts, st.builds("{}={}".format, st.sampled_from(["seed", "a.b", "datasets.0.size", "datasets"]), texts)
    )
)
@example(override="x" * 5000)
@example(override=f"seed={'x' * 5000}")
@example(override=f"{'x' * 5000}.a=1")
@example(override=f"seed.{'x' * 5000}=1")
def test_overrides(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    path = tmp_path_factory.getbasetemp() / "whole.yaml"
    path.write_bytes(YAML[0])
    try_recipe(path, [override])


# --- data -------------------------------------------------------------------------------------------------------------


def try_rows(path: Path, read: Any) -> list[Any]:
    """What is read, or nothing if it is refused with the file's name."""
    try:
        found: list[Any] = read(str(path), "train")
    except ValueError as error:
        says_where(error, path)
        if len(path.read_bytes().splitlines()) > 1 and "is empty" not in str(error) and path.suffix == ".jsonl":
            says_where(error, "line ")
        return []
    return found


def usable(records: list[Record]) -> None:
    """Records that were taken can be rendered, hashed and written; a chat that no template can write is refused by name."""
    for record in records:
        for text in (record.id, *(message["content"] for message in record.messages)):
            text.encode()
        json.dumps(dict(record.metadata))


@many
@given(rows=st.lists(changed(CHATS), max_size=3))
@example(rows=[{"prompt": "\ud800"}, CHATS[0]])
@example(rows=[CHATS[0], {"prompt": "a", "answer": {"b": "\udc00"}}])
def test_chats(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "chats.jsonl"
    path.write_bytes(b"".join(map(line, rows)))
    usable(try_rows(path, file_records))


@many
@given(
    content=torn([b"".join(map(line, CHATS)), line(CHATS), b"\xef\xbb\xbf" + line(CHATS[0])]),
    suffix=st.sampled_from([".jsonl", ".json"]),
)
@example(content=b'{"prompt": ' + b"[" * 200_000, suffix=".jsonl")
@example(content=b"[" * 200_000, suffix=".json")
@example(content=b'{"prompt": "\xff"}\n', suffix=".jsonl")
@example(content=b'{"prompt": "' + b"x" * 3_000_000 + b'"}\n', suffix=".jsonl")
@example(content=b"[1, 2]", suffix=".json")
@example(content=b'{"prompt": ' + b"9" * 5000 + b"}\n", suffix=".jsonl")
def test_data_files(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = (tmp_path_factory.getbasetemp() / "torn").with_suffix(suffix)
    path.write_bytes(content)
    usable(try_rows(path, file_records))


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    """Of characters and of bytes, with templates that mark, cut and rearrange."""
    from chat_tokenizers import CHATML_TOKENS, DEEPSEEK_TOKENS, LIKE_QWEN3, LIKE_R1, MARKED_CHATML, byte_tokenizer

    from data.chat import build_tokenizer

    return [
        build_tokenizer(),
        byte_tokenizer(CHATML_TOKENS, MARKED_CHATML, "<|im_end|>"),
        byte_tokenizer(CHATML_TOKENS, LIKE_QWEN3, "<|im_end|>", trim_offsets=True),
        byte_tokenizer(DEEPSEEK_TOKENS, LIKE_R1, DEEPSEEK_TOKENS[1]),
    ]


@many
@given(
    row=changed(CHATS),
    which=st.integers(0, 3),
    loss_on=st.sampled_from(["assistant", "last_assistant", "completion", "all"]),
)
def test_chats_by_other_tokenizers(tokenizers: list[Any], row: Any, which: int, loss_on: str) -> None:
    place = "chats.jsonl, line 1"
    try:
        record = parse_row(Row("chats.jsonl", 0, line(row), 1).columns(), {}, place, "x")
    except ValueError as error:
        says_where(error, place)
        return
    try:
        chat = tokenize_chat(
            tokenizers[which],
            record.messages,
            loss_on=loss_on,
            tools=record.tools,
            template_kwargs=record.template_kwargs,
        )
    except ValueError as error:
        says_where(error)  # who renders many adds the place
        return
    assert len(chat.ids) == len(chat.mask) and any(chat.mask)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Parquet files that are whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("tables") / "whole.parquet"
    found = []
    for table in (
        pa.Table.from_pylist([CHATS[0]] * 20),
        pa.Table.from_pylist([CHATS[3]] * 3),
        pa.table({"prompt": [1, 2, None], "answer": [b"\xff", b"", None]}),
        pa.table({"prompt": pa.array([], pa.string())}),
    ):
        pq.write_table(table, path)
        found.append(path.read_bytes())
    return found


@many
@given(data=st.data())
def test_parquet(tmp_path_factory: pytest.TempPathFactory, tables: list[bytes], data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.parquet"
    path.write_bytes(data.draw(torn(tables)))
    usable(try_rows(path, file_records))


@many
@given(rows=st.lists(changed(PAIRS), max_size=3))
@example(rows=[{**PAIRS[0], "margin": 10**400}])
@example(rows=[{**PAIRS[0], "margin": math.nan}])
def test_preference_pairs(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    path.write_bytes(b"".join(map(line, rows)))
    for pair in try_rows(path, file_pairs):
        assert pair.margin >= 0 and math.isfinite(pair.margin)


@many
@given(
    rows=st.lists(
        changed(
            [{"prompt_id": "a", "completion": "3", "number": 1}, {"prompt": CHATS[0]["messages"], "completion": "3"}]
        ),
        max_size=4,
    )
)
@example(rows=[{"prompt": [{}], "completion": "x"}])
@example(rows=[{"prompt_id": 1, "completion": "x", "number": "a"}, {"prompt_id": 1, "completion": "x", "number": 2}])
def test_recordings_of_a_teacher(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "recordings.jsonl"
    path.write_bytes(b"".join(map(line, rows)))
    try_rows(path, lambda name, _: [RecordedTeacher(RecordingsSection(path=name))])


def test_an_id_that_comes_twice_is_named_with_both_places(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_bytes(
        b"".join(map(line, [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}, {"prompt": "c", "id": "x"}]))
    )
    with pytest.raises(ValueError, match=r"'x'.*twice.jsonl, line 3 and .*twice.jsonl, line 1"):
        PromptStream(file_records(str(path), "train"), None, 0)  # type: ignore[arg-type]


@pytest.mark.slow
def test_no_traceback_reaches_who_starts_a_stage(tmp_path: Path, policy_path: Path) -> None:
    """Each stage by its command, with a file whose third row is wrong."""
    from stage_commands import Command

    wrong = {
        "chats": [*CHATS[:2], {"messages": [{"role": "assistant", "content": 7}]}],
        "pairs": [*PAIRS, {**PAIRS[0], "margin": "wide"}],
        "problems": [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "a\ud800"}],
    }
    for name, rows in wrong.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(map(line, rows)))
    model = {"model_name_or_path": str(policy_path)}
    recipes = {
        "sft": {"datasets": [{"path": str(tmp_path / "chats.jsonl")}], "training": {"max_steps": 1}},
        "reward_model": {
            "datasets": [{"path": str(tmp_path / "pairs.jsonl")}],
            "training": {"max_steps": 1},
            "validation": {"fraction": 0.5},
        },
        "grpo": {
            "datasets": [{"path": str(tmp_path / "problems.jsonl")}],
            "rewards": [{"func": "rewards.format:score"}],
            "max_steps": 1,
        },
    }
    commands = {}
    for stage, tree in recipes.items():
        (tmp_path / f"{stage}.yaml").write_text(json.dumps({"stage": stage, "model": model, **tree}))
        commands[stage] = Command(
            f"posttrain.{stage}", str(tmp_path / f"{stage}.yaml"), f"output_dir={tmp_path / stage}"
        )
    for stage, command in commands.items():
        code, output = command.finish()
        assert code == 2 and "Traceback" not in output, (stage, output)
        assert "error: datasets: " in output and ".jsonl, line 3" in output, (stage, output)
        assert not (tmp_path / stage / "metrics.jsonl").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------

CONFIG = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "hidden_size": 64}
HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [107, 64], "data_offsets": [0, 27392]},
    "model.layers.0.mlp.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [27392, 43776]},
}


def tensors_file(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def try_plan(directory: Path) -> None:
    recipe = directory / "plan.yaml"
    recipe.write_text(json.dumps({**GRPO, "model": {"model_name_or_path": str(directory)}}))
    try:
        describe(load_recipe(recipe))
    except RecipeError as error:
        says_where(error, directory)


@many
@given(config=changed([CONFIG]), header=changed([HEADER]))
@example(config=CONFIG, header=HEADER)
@example(config=CONFIG, header={"a": {"shape": [10**400]}})
@example(config={**CONFIG, "num_hidden_layers": "two"}, header=HEADER)
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, config: Any, header: Any) -> None:
    directory = tmp_path_factory.getbasetemp() / "changed"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(tensors_file(header))
    try_plan(directory)


@many
@given(config=torn([json.dumps(CONFIG).encode()]), tensors=torn([tensors_file(HEADER)]))
@example(config=b"[" * 100_000, tensors=b"")
@example(config=b"{}", tensors=struct.pack("<Q", 2**62) + b"{}")
def test_torn_checkpoints(tmp_path_factory: pytest.TempPathFactory, config: bytes, tensors: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "torn_checkpoint"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(config)
    (directory / "model.safetensors").write_bytes(tensors)
    try_plan(directory)


# --- rewards, teachers, journals --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A reward that returns what `says` holds."""
    from rewards.resolve import resolve_once
    from rewards.scoring import RewardFunction

    file = tmp_path_factory.mktemp("reward") / "any_value.py"
    file.write_text("says = []\ndef score(completion, answer, **metadata):\n    return says[0]\n")
    function = RewardFunction("any", f"{file}:score")
    yield function, resolve_once(function.function).__globals__["says"]


odd_results = st.one_of(
    values,
    st.builds(RewardResult, values, st.sampled_from(["ok", "crash", "no status", None]), values),
    st.complex_numbers(),
)


@many
@given(value=odd_results)
@example(value=10**400)
@example(value=RewardResult(1.0, "sure"))  # type: ignore[arg-type]
@example(value=RewardResult(math.inf))
def test_what_rewards_return(reward: Any, value: Any) -> None:
    function, says = reward
    says[:] = [value]
    try:
        result = function("text", "answer", {})
    except ValueError as error:
        says_where(error, "any_value.py", "reward 'any'")
        return
    assert isinstance(result.score, float) and math.isfinite(result.score)
    assert result.status in ("ok", "timeout", "crash", "infrastructure")
    json.dumps([result.score, result.status, result.detail]).encode()


REPLY: dict[str, Any] = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "3"}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """An endpoint whose next answer is `answer.content`."""
    from openai_server import Scripted

    answer = SimpleNamespace(content=b"", status=200)
    with Scripted(lambda _request, _number: (answer.status, {}, answer.content)) as scripted:
        yield scripted, answer


def try_reply(server: Any, content: bytes, status: int) -> None:
    import asyncio

    from rewards.endpoint import Endpoint
    from rewards.errors import Unavailable

    scripted, answer = server
    answer.content, answer.status = content, status
    endpoint = Endpoint("m", scripted.url, None, timeout_seconds=5.0, max_retries=0)
    try:
        reply = asyncio.run(endpoint.chat([{"role": "user", "content": "4-1="}]))
    except Unavailable as error:
        says_where(error, "m at http://127.0.0.1")
        return
    assert isinstance(reply.text, str) and isinstance(reply.reasoning, str) and isinstance(reply.model, str)
    assert type(reply.prompt_tokens) is int and type(reply.completion_tokens) is int
    json.dumps(reply.text).encode()


@many
@given(reply=changed([REPLY]), status=st.sampled_from([200, 200, 200, 400, 500]))
@example(reply={**REPLY, "usage": {"prompt_tokens": "many"}}, status=200)
@example(reply={**REPLY, "choices": []}, status=200)
@example(reply={**REPLY, "choices": {}}, status=200)
@example(reply=None, status=200)
def test_replies_of_a_teacher(server: Any, reply: Any, status: int) -> None:
    try_reply(server, json.dumps(reply).encode(), status)


@many
@given(content=torn([json.dumps(REPLY).encode()]))
@example(content=b"\xff\xfe")
@example(content=b"[" * 100_000)
def test_torn_replies_of_a_teacher(server: Any, content: bytes) -> None:
    try_reply(server, content, 200)


@pytest.fixture(scope="module")
def whole_journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "generations.jsonl"
    journal = Journal(path, "sample_id", {"version": 1})
    journal.append([{"sample_id": f"{number}", "completion": "x" * number} for number in range(5)])
    journal.close()
    return path.read_bytes()


@many
@given(data=st.data())
def test_journals(tmp_path_factory: pytest.TempPathFactory, whole_journal: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "journal.jsonl"
    content = data.draw(torn([whole_journal]))
    path.write_bytes(content)
    try:
        journal = Journal(path, "sample_id", {"version": 1})
    except RunStopped as error:
        says_where(error, path)
        assert path.read_bytes() == content  # nothing is cut off that might still be wanted
        return
    for key in journal:
        journal.read(key)
    journal.close()
