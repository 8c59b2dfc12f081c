"""Who answers prompts: a checkpoint on vLLM workers, an endpoint (endpoint_teacher.py), or recordings of another time.

A teacher is asked for samples one by one, each with a seed of its own, and hands over what is ready as soon as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.records import Record
from posttrain.types import Message

if TYPE_CHECKING:
    from posttrain.cluster import SamplerPool
    from posttrain.recipe import RecordingsSection
    from posttrain.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One sample that is wanted."""

    sample_id: str  # "<prompt id>#<number>"
    prompt_id: str
    number: int  # 0, 1, ... among the samples of its prompt
    messages: tuple[Message, ...]  # what the teacher is shown
    seed: int

    @property
    def prompt_digest(self) -> str:
        """Of the messages: a resumed run must ask the same."""
        text = json.dumps([dict(message) for message in self.messages], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer, and where it comes from."""

    sample_id: str
    prompt_id: str
    number: int
    prompt_digest: str
    completion: str
    finish_reason: str | None  # "stop", "length", ...; None where a recording does not say
    prompt_tokens: int | None
    completion_tokens: int | None  # by the teacher's tokenizer
    seed: int | None
    teacher: str
    teacher_version: str  # digest of a checkpoint, or the model that an endpoint says it is

    def __post_init__(self) -> None:
        # Half of a surrogate pair, as JSON may hold it, is no text that a table can store.
        whole = self.completion.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        object.__setattr__(self, "completion", whole)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Take = Callable[[Sequence[Generation]], None]
ShouldStop = Callable[[], bool]


class Teacher(Protocol):
    """What a run needs of a teacher."""

    kind: str
    name: str
    version: str  # "" where only answers tell it
    sampling: Mapping[str, Any]  # how answers are drawn, for the journal and for every row
    closing_seconds: float  # how long answers that were begun may take when the run stops

    def reads_whole(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt leaves room for an answer."""

    def count(self, record: Record, wanted: int | None) -> int:
        """How many samples of a prompt can be had; `wanted` None asks for all."""

    def answer(self, requests: Sequence[Request], take: Take, should_stop: ShouldStop) -> dict[str, str]:
        """Answer, handing over what is ready, until all is answered or a stop is asked for.

        Returns:
            sample id -> why there is no answer, for those that have none.

        Raises:
            RunStopped: it has no sense to go on.
        """


# --- a checkpoint -----------------------------------------------------------------------------------------------------


class LocalTeacher:
    """A checkpoint on vLLM workers. A sample depends on its seed, prompt and the checkpoint alone.

    Args:
        name: the checkpoint, as the recipe names it.
        version: its digest.
        render: messages to token ids, e.g. with `data.chat.render_prompt`.
        params: how to draw; `num_generations` is 1, for each sample is a request of its own.
        max_model_len: tokens of prompt and answer.
        in_flight: samples that are begun at the same time.
    """

    kind = "model"
    closing_seconds = 30.0

    def __init__(
        self,
        name: str,
        version: str,
        render: Callable[[Sequence[Message]], tuple[int, ...]],
        params: SamplingParams,
        *,
        max_model_len: int,
        in_flight: int,
    ) -> None:
        assert params.num_generations == 1 and params.seed is not None
        self.name, self.version = name, version
        self.sampling: Mapping[str, Any] = {
            "max_completion_length": params.max_completion_length,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
        }
        self.pool: SamplerPool | None = None  # set when the workers run
        self._render = render
        self._params = params
        self._max_model_len = max_model_len
        self._in_flight = in_flight

    def reads_whole(self, messages: Sequence[Message]) -> bool:
        return len(self._render(messages)) + 1 < self._max_model_len

    def count(self, record: Record, wanted: int | None) -> int:
        assert wanted is not None
        return wanted

    def answer(self, requests: Sequence[Request], take: Take, should_stop: ShouldStop) -> dict[str, str]:
        from posttrain.types import Prompt

        assert self.pool is not None
        backlog = iter(requests)
        begun: dict[str, tuple[Request, int]] = {}
        while not should_stop():
            new = []
            for request in islice(backlog, self._in_flight - len(begun)):
                ids = self._render(request.messages)
                begun[request.sample_id] = (request, len(ids))
                new.append(Prompt(request.sample_id, request.messages, ids))
            if not begun:
                break
            # Not one by one: each call interrupts the engines for a moment.
            groups = self.pool.generate_enough(new, self._params, max(1, len(begun) // 32))
            ready = []
            for prompt, (completion,) in groups:
                request, prompt_tokens = begun.pop(prompt.id)
                ready.append(
                    Generation(
                        request.sample_id,
                        request.prompt_id,
                        request.number,
                        request.prompt_digest,
                        completion.text,
                        completion.finish_reason,
                        prompt_tokens,
                        len(completion.token_ids),
                        request.seed,
                        self.name,
                        self.version,
                    )
                )
            take(ready)
        return {}


_HASHED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
_OF_TRAINING = ("progress.json", "manifest.json", "trainer_state.json")


def checkpoint_digest(path: str, *, trust_remote_code: bool = False) -> str:
    """What identifies a checkpoint: SHA-256 of its files (weights, configuration, tokenizer, template), or a hub commit.

    Weights are read once, at about 1 GB/s.
    """
    directory = Path(path)
    if not directory.is_dir():
        from transformers import AutoConfig

        return str(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)._commit_hash)
    whole = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in _HASHED and file.name not in _OF_TRAINING:
            with file.open("rb") as stream:
                whole.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"


# --- recordings -------------------------------------------------------------------------------------------------------

RECORDING_COLUMNS = (
    *("prompt_id", "prompt", "completion", "number", "finish_reason", "prompt_tokens", "completion_tokens"),
    *("seed", "teacher", "teacher_version"),
)


@dataclass
class RecordedTeacher:
    """Generations of another time, from a file or a hub dataset.

    A row belongs to the prompt whose id is its `prompt_id`, or else to the one whose text (of the last user message, or all
    messages) is its `prompt`.

    Raises:
        ValueError: a row that is no recording; a column that is not there.
    """

    section: RecordingsSection
    kind: str = "recordings"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    closing_seconds: float = 30.0

    def __post_init__(self) -> None:
        from data.files import all_rows, find_files
        from data.records import check_names

        section = self.section
        check_names(section.columns, section.path, RECORDING_COLUMNS)
        self.name = section.path
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for row in all_rows(section.path, section.split, section.name):
            values = _recording(row.columns(), section.columns, row.place)
            self._rows.setdefault(values["key"], []).append(values)
        for rows in self._rows.values():
            rows.sort(key=lambda values: values["number"] or 0)  # stable: without numbers as they stand
        files = find_files(section.path, section.split) or []
        whole = hashlib.sha256()
        for file in files:
            whole.update(file.path.read_bytes())
        self.version = f"sha256:{whole.hexdigest()}" if files else section.split

    def reads_whole(self, messages: Sequence[Message]) -> bool:
        return True

    def _of(self, prompt_id: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
        for key in (f"id:{prompt_id}", _text_key(messages[-1]["content"]), _text_key(messages)):
            if key in self._rows:
                return self._rows[key]
        return []

    def count(self, record: Record, wanted: int | None) -> int:
        found = len(self._of(record.id, record.messages))
        return found if wanted is None else min(found, wanted)

    def answer(self, requests: Sequence[Request], take: Take, should_stop: ShouldStop) -> dict[str, str]:
        ready: list[Generation] = []
        for request in requests:
            row = self._of(request.prompt_id, request.messages)[request.number]
            ready.append(
                Generation(
                    request.sample_id,
                    request.prompt_id,
                    request.number,
                    request.prompt_digest,
                    row["completion"],
                    row.get("finish_reason"),
                    row.get("prompt_tokens"),
                    row.get("completion_tokens"),
                    row.get("seed"),
                    row.get("teacher") or self.name,
                    row.get("teacher_version") or self.version,
                )
            )
            if len(ready) == 256:
                take(ready)
                ready = []
            if should_stop():
                break
        take(ready)
        return {}


def _recording(row: Any, columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """The columns of a row by our names, and the `key` of its prompt."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: a recording must be an object of columns, not {type(row).__name__}")
    values = {name: row.get(columns.get(name, name)) for name in RECORDING_COLUMNS}
    if not isinstance(values["completion"], str):
        raise ValueError(
            f"{place}: a recording needs a text in the column {columns.get('completion', 'completion')}; name yours, e.g. "
            f"teacher.recordings.columns: {{completion: response}}"
        )
    for name in ("number", "prompt_tokens", "completion_tokens", "seed"):
        if values[name] is not None and type(values[name]) is not int:
            column = columns.get(name, name)
            raise ValueError(
                f"{place}: {column} must be a whole number, not {values[name]!r:.60}; mend it, or leave it out"
            )
    for name in ("finish_reason", "teacher", "teacher_version"):
        if values[name] is not None and not isinstance(values[name], str):
            raise ValueError(f"{place}: {columns.get(name, name)} must be a text, not {values[name]!r:.60}")
    if values["prompt_id"] is not None:
        return {**values, "key": f"id:{values['prompt_id']}"}
    prompt: Any = values["prompt"]
    is_chat = isinstance(prompt, list) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt)
    if not isinstance(prompt, str) and not (is_chat and prompt):
        raise ValueError(
            f"{place}: a recording needs prompt_id, or prompt (a text or messages), to say what it answers"
        )
    return {**values, "key": _text_key(prompt)}


def _text_key(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return f"text:{prompt}"
    if len(prompt) == 1:
        return f"text:{prompt[0]['content']}"
    return "messages:" + json.dumps([[message["role"], message["content"]] for message in prompt])
