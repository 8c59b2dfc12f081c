"""A teacher behind an OpenAI-compatible endpoint: side by side, within limits and a budget, each answer kept as it comes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.records import Record
from posttrain.errors import RunStopped
from posttrain.recipe import EndpointSection, GenerationSection, RecipeError
from posttrain.teachers import Generation, Request, ShouldStop, Take
from posttrain.types import Message
from rewards.endpoint import Endpoint, Reply
from rewards.errors import Unavailable

SEED_BITS = 31  # what every server takes


def require_key(section: EndpointSection) -> None:
    """Refuse a recipe whose key is not there.

    Raises:
        RecipeError: the environment variable is not set. The key itself is part of no message.
    """
    if section.api_key_env is not None and not os.environ.get(section.api_key_env):
        raise RecipeError(
            f"teacher.endpoint.api_key_env: the environment variable {section.api_key_env} is not set; export it, or leave "
            f"api_key_env out for a server without a key"
        )


@dataclass
class EndpointTeacher:
    """One model behind one address.

    Args:
        section: of the recipe.
        generation: how answers are drawn.
        num_samples: of the whole run, for `max_failed_fraction`.
        spent: what earlier parts of the run have cost, as `cost` says it.
    """

    section: EndpointSection
    generation: GenerationSection
    num_samples: int = 0
    spent: float = 0.0
    kind: str = "endpoint"
    version: str = ""
    _halt: str = field(default="", init=False)  # why no request is begun any more

    def __post_init__(self) -> None:
        section = self.section
        self.name = section.model
        self.closing_seconds = section.timeout_seconds
        self.sampling: Mapping[str, Any] = {
            "max_completion_length": self.generation.max_completion_length,
            "temperature": self.generation.temperature,
            "top_p": self.generation.top_p,
            "top_k": self.generation.top_k,
            "extra_body": dict(section.extra_body),
        }
        self.endpoint = Endpoint(
            section.model,
            section.base_url,
            section.api_key_env,
            section.timeout_seconds,
            section.max_retries,
            section.max_concurrency,
            section.requests_per_minute,
        )

    def reads_whole(self, messages: Sequence[Message]) -> bool:
        return True  # only the server can tell

    def count(self, record: Record, wanted: int | None) -> int:
        assert wanted is not None
        return wanted

    @property
    def has_prices(self) -> bool:
        return bool(self.section.prompt_price or self.section.completion_price)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """In the currency of the recipe's prices."""
        prices = self.section
        return (prompt_tokens * prices.prompt_price + completion_tokens * prices.completion_price) / 1e6

    def answer(self, requests: Sequence[Request], take: Take, should_stop: ShouldStop) -> dict[str, str]:
        failures: dict[str, str] = {}
        asyncio.run(self._answer_all(iter(requests), take, should_stop, failures))
        if self._halt:
            raise RunStopped(self._halt)
        return failures

    async def _answer_all(
        self, requests: Iterator[Request], take: Take, should_stop: ShouldStop, failures: dict[str, str]
    ) -> None:
        async with self.endpoint.open() as client:

            async def work() -> None:
                while not should_stop() and not self._is_halted():
                    request = next(requests, None)
                    if request is None:
                        return
                    try:
                        reply = await self.endpoint.ask(client, request.messages, **self._parameters(request))
                    except Unavailable as error:
                        failures[request.sample_id] = str(error)
                        self._count_failures(failures)
                        continue
                    self.spent += self.cost(reply.prompt_tokens, reply.completion_tokens)
                    take([self._generation(request, reply)])

            # What is under way when one of them halts is paid for: the others finish it.
            await asyncio.gather(*(work() for _ in range(self.section.max_concurrency)))

    def _is_halted(self) -> bool:
        limit = self.section.max_cost
        if limit is not None and self.spent >= limit and not self._halt:
            self._halt = (
                f"the answers have cost {self.spent:.6g}, and teacher.endpoint.max_cost={limit:g}; raise it and go on with "
                f"--resume"
            )
        return bool(self._halt)

    def _count_failures(self, failures: Mapping[str, str]) -> None:
        allowed = self.section.max_failed_fraction
        if len(failures) > allowed * self.num_samples and not self._halt:
            self._halt = (
                f"{len(failures)} of {self.num_samples} samples got no answer, more than "
                f"teacher.endpoint.max_failed_fraction={allowed:g} allows; the last: {list(failures.values())[-1]}; mend "
                f"that and go on with --resume"
            )

    def _parameters(self, request: Request) -> dict[str, Any]:
        drawn = self.generation
        parameters: dict[str, Any] = {"max_tokens": drawn.max_completion_length, "temperature": drawn.temperature}
        if drawn.top_p < 1:
            parameters["top_p"] = drawn.top_p
        if self.section.send_seed:
            parameters["seed"] = self._seed(request)
        body = {**({"top_k": drawn.top_k} if drawn.top_k else {}), **self.section.extra_body}
        return {**parameters, **({"extra_body": body} if body else {})}

    def _seed(self, request: Request) -> int:
        return request.seed >> (63 - SEED_BITS)

    def _generation(self, request: Request, reply: Reply) -> Generation:
        # What a server's reasoning parser has set apart belongs to the answer.
        text = f"<think>{reply.reasoning}</think>{reply.text}" if reply.reasoning else reply.text
        return Generation(
            request.sample_id,
            request.prompt_id,
            request.number,
            request.prompt_digest,
            text,
            reply.finish_reason,
            reply.prompt_tokens or None,
            reply.completion_tokens or None,
            self._seed(request) if self.section.send_seed else None,
            self.name,
            reply.model or self.name,
        )
