"""A small environment: the policy guesses a hidden character between two bounds and is told what is left.

    5-j?   ->   a   ->   b-j?   ->   f   ->   b-e?   ->   c      (found: reward 1)

The order is that of digits and letters, 0 to 9, then a to z.

    python -m rewards.guessing runs/guessing [--span 15] [--chats 20000] [--seed 0]

writes problems for GRPO and evaluation (train.jsonl, eval.jsonl; one question in four is for evaluation only) and
scripted episodes for SFT (chats.jsonl), whose player takes any character that is left. It finds one of 15 in 4 guesses in 61%
of the episodes; halving what is left always does.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.types import Message, Prompt, Step

ORDER = string.digits + string.ascii_lowercase
TURNS = 4  # in the scripted episodes
EVAL_SHARE = 4  # one question in so many is for evaluation


class Guessing:
    """Reward 1 for the hidden character, which is the record's `answer`; the episode then is over."""

    def reset(self, prompt: Prompt) -> None:
        if prompt.answer is None or place_of(prompt.answer) is None:
            raise ValueError(f"record {prompt.id} has the answer {prompt.answer!r}; it must be one of {ORDER}")
        self._secret = prompt.answer
        self._bounds = bounds_of(prompt.messages[-1]["content"])

    def step(self, text: str) -> Step:
        if text.strip() == self._secret:
            return Step(reward=1.0, done=True)
        self._bounds = what_is_left(self._bounds, text.strip(), self._secret)
        return Step([{"role": "user", "content": question(*self._bounds)}])


def question(low: int, high: int) -> str:
    return f"{ORDER[low]}-{ORDER[high]}?"


def bounds_of(text: str) -> tuple[int, int]:
    """The places of the bounds that `question` wrote."""
    return ORDER.index(text[0]), ORDER.index(text[2])


def what_is_left(bounds: tuple[int, int], guess: str, secret: str) -> tuple[int, int]:
    """The bounds after a wrong guess; as they were after one that says nothing new, or is none of the characters."""
    low, high = bounds
    place, goal = place_of(guess), ORDER.index(secret)
    if place is None:
        return bounds
    return (max(low, place + 1), high) if place < goal else (low, min(high, place - 1))


def place_of(text: str) -> int | None:
    """Where a character stands in the order; None for anything else."""
    return ORDER.index(text) if len(text) == 1 and text in ORDER else None


def problems(span: int) -> list[dict[str, Any]]:
    """All problems with so many characters to choose from, as rows of a file."""
    return [
        {
            "id": f"{ORDER[low]}-{ORDER[low + span - 1]}/{secret}",
            "prompt": question(low, low + span - 1),
            "answer": secret,
            "task": "guessing",
            "level": span,
        }
        for low in range(len(ORDER) - span + 1)
        for secret in ORDER[low : low + span]
    ]


def is_held_out(row: dict[str, Any]) -> bool:
    """Whether a problem is for evaluation: by its question alone, the same in every run.

    Not by what is hidden: a policy would learn which characters of a question are never the answer, and do worse than
    before where just these are hidden.
    """
    return ORDER.index(row["prompt"][0]) % EVAL_SHARE == EVAL_SHARE // 2


def played(problem: dict[str, Any], rng: random.Random) -> list[Message]:
    """A chat of the scripted player with the environment."""
    environment = Guessing()
    environment.reset(Prompt(problem["id"], ({"role": "user", "content": problem["prompt"]},), (), problem["answer"]))
    messages: list[Message] = [{"role": "user", "content": problem["prompt"]}]
    for turn in range(TURNS):
        guess = ORDER[rng.randint(*bounds_of(messages[-1]["content"]))]
        messages.append({"role": "assistant", "content": guess})
        step = environment.step(guess)
        if step.done or turn == TURNS - 1:
            break
        messages += step.messages
    return messages


def chats(rows: Sequence[dict[str, Any]], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Chats as rows of a file."""
    for number in range(count):
        yield {"id": f"chat/{number}", "messages": played(rng.choice(rows), rng)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--span", type=int, default=15, help="characters to choose from")
    parser.add_argument("--chats", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 1 <= options.span <= len(ORDER):
        parser.error(f"--span {options.span}: choose 1 to {len(ORDER)}")
    rows = problems(options.span)
    rng = random.Random(options.seed)
    rng.shuffle(rows)
    parts = {"train": [r for r in rows if not is_held_out(r)], "eval": [r for r in rows if is_held_out(r)]}
    options.directory.mkdir(parents=True, exist_ok=True)
    files = {**parts, "chats": list(chats(parts["train"], options.chats, rng))}
    for name, content in files.items():
        path = options.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        print(f"{path}: {len(content)} rows")


if __name__ == "__main__":
    main()
