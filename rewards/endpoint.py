"""A client of OpenAI-compatible endpoints (vLLM's server, SGLang's, hosted ones): retries, limits, counts, no secrets told."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.types import Message
from rewards.errors import Unavailable

SHORTEST_KEY = 8  # characters; a shorter one is a word like "local", which answers hold by chance
NO_KEY = "none"  # what is sent where no key is set: local servers without one accept anything
RETRIED = (408, 409, 429, 500, 502, 503, 504)  # status codes that another attempt may change
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered.

    Attributes:
        text: of the answer; the empty text where there was none.
        reasoning: what a server with a reasoning parser set apart; else empty.
        finish_reason: "stop", "length" or what else the server says.
        prompt_tokens, completion_tokens: as the server counted them, 0 where it does not say.
        model: what the server says it is, e.g. the dated version of a name.
    """

    text: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    model: str = ""


@dataclass
class Endpoint:
    """One model behind one address.

    Args:
        model: the name it is served under.
        base_url: such as http://127.0.0.1:8000/v1; None is the client's default.
        api_key_env: the environment variable that holds the key; the key itself is never part of a message.
        timeout_seconds: of one attempt.
        max_retries: attempts after the first.
        max_concurrency: requests under way at the same time.
        requests_per_minute: that are begun at most, attempts included; None is no limit.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout_seconds: float = 60.0
    max_retries: int = 3
    max_concurrency: int = 32
    requests_per_minute: float | None = None
    counts: Counter[str] = field(
        default_factory=Counter
    )  # requests, retries, failures, prompt_tokens, completion_tokens
    _next_turn: float = field(default=0.0, init=False)  # when the next request may begin, by the monotonic clock

    async def chat(self, messages: Sequence[Message], **sampling: Any) -> Reply:
        """One answer.

        Args:
            messages: the chat so far.
            sampling: of the chat completions API: temperature, max_tokens, seed, extra_body, ...

        Raises:
            Unavailable: no answer after all attempts, or a request that the server refuses (its reason is quoted).
        """
        async with self.open() as client:
            return await self.ask(client, messages, **sampling)

    async def chat_all(self, chats: Sequence[Sequence[Message]], **sampling: Any) -> list[Reply | Unavailable]:
        """Answers to several chats, asked side by side, in their order. What failed is returned, not raised."""
        found = {place: reply async for place, reply in self.stream(chats, [sampling] * len(chats))}
        return [found[place] for place in range(len(chats))]

    async def stream(
        self, chats: Sequence[Sequence[Message]], sampling: Sequence[Mapping[str, Any]]
    ) -> AsyncIterator[tuple[int, Reply | Unavailable]]:
        """(place, answer) of several chats, each as soon as it is there; `max_concurrency` are under way at a time.

        Args:
            chats: what to ask.
            sampling: of each, as in `chat`.
        """
        gate = asyncio.Semaphore(self.max_concurrency)
        async with self.open() as client:

            async def one(place: int) -> tuple[int, Reply | Unavailable]:
                async with gate:
                    try:
                        return place, await self.ask(client, chats[place], **sampling[place])
                    except Unavailable as error:
                        return place, error

            tasks = [asyncio.ensure_future(one(place)) for place in range(len(chats))]
            try:
                for task in asyncio.as_completed(tasks):
                    yield await task
            finally:
                for waiting in tasks:
                    waiting.cancel()

    async def ask(self, client: Any, messages: Sequence[Message], **sampling: Any) -> Reply:
        """`chat` with a client that is already open."""
        import openai

        last = ""
        for attempt in range(self.max_retries + 1):
            await self._turn()
            self.counts["requests"] += 1
            try:
                answer = await client.chat.completions.create(
                    model=self.model, messages=[dict(message) for message in messages], **sampling
                )
                return self._reply(answer)
            except openai.APIStatusError as error:
                last = f"status {error.status_code}: {self._without_key(_reason(error))}"
                if error.status_code not in RETRIED:
                    break
                pause = _retry_after(error.response.headers)
            except openai.APITimeoutError:
                last, pause = f"no answer within {self.timeout_seconds:g} s", None
            except openai.APIConnectionError as error:
                last, pause = f"no connection: {self._without_key(str(error.__cause__ or error))}", None
            except (
                ValueError,
                LookupError,
                AttributeError,
                TypeError,
                RecursionError,
            ) as error:  # not what the API promises
                last, pause = f"an answer that cannot be read: {type(error).__name__}", None
            if attempt < self.max_retries:
                self.counts["retries"] += 1
                await asyncio.sleep(pause if pause is not None else _backoff(attempt))
        self.counts["failures"] += 1
        raise Unavailable(f"{self.model} at {self.base_url or 'the default address'}: {last}")

    async def _turn(self) -> None:
        """Wait until another request may begin."""
        if self.requests_per_minute is None:
            return
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + 60 / self.requests_per_minute
        await asyncio.sleep(turn - now)

    def open(self) -> Any:
        """A client for `ask`, to be used with `async with`."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=self._key, timeout=self.timeout_seconds, max_retries=0)

    @property
    def _key(self) -> str:
        return (self.api_key_env and os.environ.get(self.api_key_env)) or NO_KEY

    def _without_key(self, text: str) -> str:
        is_secret = self._key != NO_KEY and len(self._key) >= SHORTEST_KEY
        return text.replace(self._key, "***") if is_secret else text

    def _reply(self, answer: Any) -> Reply:
        choice, usage = answer.choices[0], answer.usage
        message = choice.message
        reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        # A server that says what it was sent must not have the key written down.
        found = Reply(
            text=self._without_key(_text(message.content)),
            reasoning=self._without_key(_text(reasoning)),
            finish_reason=str(choice.finish_reason),
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            model=self._without_key(str(getattr(answer, "model", None) or "")),
        )
        self.counts.update(prompt_tokens=found.prompt_tokens, completion_tokens=found.completion_tokens)
        return found


def _text(value: Any) -> str:
    """Raises TypeError for what the API does not promise."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} where a text should be")
    return value or ""


def _count(usage: Any, name: str) -> int:
    """Tokens, 0 where the server does not say. Raises TypeError for what is no number of tokens."""
    value = getattr(usage, name, None) or 0
    if type(value) is not int or not 0 <= value < 2**53:
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _reason(error: Any) -> str:
    body = error.body
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping) and inner.get("message"):
            return str(inner["message"])[:300]
    return str(error.message)[:300]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks for; None where it does not, or says a date."""
    try:
        return min(max(0.0, float(headers.get("retry-after", ""))), LONGEST_PAUSE)
    except ValueError:
        return None


def _backoff(attempt: int) -> float:
    """Twice as long each time, and not the same for all that wait."""
    return min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
