"""Where answers come from: vLLM workers on a checkpoint, as in training, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.recipe import ModelSection, SamplerSection, ServedModelSection
from posttrain.types import Completion, FinishReason, Prompt, SamplingParams
from rewards.endpoint import Endpoint, Reply
from rewards.errors import Unavailable

Stream = Callable[[Sequence[Prompt], SamplingParams, Sequence[tuple[int, int]]], Iterator[tuple[int, int, Completion]]]
"""(prompts, params, wanted (prompt, sample) places) -> (prompt, sample, completion), each as soon as it is there."""

AT_ONCE = 2048  # completions that a crash may cost
UNKNOWN_ID = -1  # a token of which an endpoint tells only that it was there


def absolute(model: ModelSection) -> ModelSection:
    """The model with a path that holds in another working directory; hub names stay."""
    path = str(model.model_name_or_path)
    return model.model_copy(update={"model_name_or_path": str(Path(path).resolve())}) if Path(path).exists() else model


@contextmanager
def checkpoint_workers(model: ModelSection, sampler: SamplerSection, seed: int) -> Iterator[Any]:
    """vLLM workers on a checkpoint for as long as the context lasts: a `SamplerPool`."""
    from posttrain.cluster import SamplerPool, session

    with session(None, sampler.cpus):
        pool = SamplerPool(absolute(model), sampler, seed)
        pool.wait_until_ready()
        yield pool


def from_pool(generate: Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]) -> Stream:
    """Answers of `SamplerPool.generate`, in parts."""

    def stream(
        prompts: Sequence[Prompt], params: SamplingParams, wanted: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, Completion]]:
        # A prompt of which any sample is missing is sampled as a whole: its samples are drawn together.
        missing = iter(sorted({row for row, _ in wanted}))
        while part := list(islice(missing, max(1, AT_ONCE // params.num_generations))):
            for row, group in zip(part, generate([prompts[row] for row in part], params), strict=True):
                yield from ((row, column, completion) for column, completion in enumerate(group))

    return stream


def from_endpoint(section: ServedModelSection, seed: int) -> Stream:
    """Answers of a served model. One that gives no answer after all attempts is a completion with finish reason "abort"."""
    client = Endpoint(
        section.model,
        section.base_url,
        section.api_key_env,
        section.timeout_seconds,
        section.max_retries,
        section.max_concurrency,
    )

    def stream(
        prompts: Sequence[Prompt], params: SamplingParams, wanted: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, Completion]]:
        chats = [prompts[row].messages for row, _ in wanted]
        common: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_completion_length,
        }
        if section.extra_body:
            common["extra_body"] = dict(section.extra_body)
        sampling = [{**common, **({"seed": seed + column} if section.send_seed else {})} for _, column in wanted]
        with asyncio.Runner() as runner:
            replies = client.stream(chats, sampling)
            for _ in wanted:
                place, reply = runner.run(_next(replies))
                yield *wanted[place], to_completion(reply)
            runner.run(replies.aclose())  # type: ignore[attr-defined]

    return stream


async def _next(replies: Any) -> tuple[int, Reply | Unavailable]:
    found: tuple[int, Reply | Unavailable] = await anext(replies)
    return found


def to_completion(reply: Reply | Unavailable) -> Completion:
    """A reply as the graders know completions. Reasoning that the server set apart comes back between its tags."""
    if isinstance(reply, Unavailable):
        return Completion((), (), "abort", "", 0)
    text = f"<think>{reply.reasoning}</think>{reply.text}" if reply.reasoning else reply.text
    reason: FinishReason = "length" if reply.finish_reason == "length" else "stop" if text else "abort"
    ids = (UNKNOWN_ID,) * reply.completion_tokens
    return Completion(ids, (0.0,) * len(ids), reason, text, 0)
