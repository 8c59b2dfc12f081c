"""A small environment: the policy guesses a hidden number between two bounds and is told "higher" or "lower".

    31-45?   ->   38   ->   lower   ->   34   ->   higher   ->   36      (found: reward 1)

    python -m rewards.number_guess runs/number_guess [--span 15] [--chats 20000] [--careless 0.3] [--seed 0]

writes problems for GRPO and evaluation (train.jsonl, eval.jsonl; an eval problem is no training problem) and scripted
episodes for SFT (chats.jsonl), whose player takes any number that is still possible, and now and then forgets what it was
told. Halving what is left finds one of 15 numbers in 4 guesses always, the player in the chats about half of the time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.tasks import split_of
from posttrain.types import Message, Prompt, Step

LARGEST = 99
TURNS = 4  # in the scripted episodes


class NumberGuess:
    """Reward 1 for the hidden number, which is the record's `answer`; the episode then is over."""

    def reset(self, prompt: Prompt) -> None:
        if prompt.answer is None:
            raise ValueError(f"record {prompt.id} has no answer, which is the number to guess")
        self._secret = int(prompt.answer)

    def step(self, text: str) -> Step:
        return answer(text, self._secret)


def answer(text: str, secret: int) -> Step:
    """What is said of a guess."""
    if not text.strip().isdecimal():
        return Step([{"role": "user", "content": "a number?"}])
    guess = int(text)
    if guess == secret:
        return Step(reward=1.0, done=True)
    return Step([{"role": "user", "content": "higher" if guess < secret else "lower"}])


def problems(span: int) -> list[dict[str, Any]]:
    """All problems with so many numbers to choose from, as rows of a file."""
    return [
        {
            "id": f"{low}-{low + span - 1}/{secret}",
            "prompt": f"{low}-{low + span - 1}?",
            "answer": str(secret),
            "task": "number_guess",
            "level": span,
        }
        for low in range(LARGEST - span + 2)
        for secret in range(low, low + span)
    ]


def played(problem: dict[str, Any], careless: float, rng: random.Random) -> list[Message]:
    """A chat of the scripted player, who forgets what it was told with a probability of `careless` at each guess."""
    low, high = map(int, problem["prompt"].rstrip("?").split("-"))
    first, last = low, high
    messages: list[Message] = [{"role": "user", "content": problem["prompt"]}]
    for turn in range(TURNS):
        guess = rng.randint(first, last) if rng.random() < careless else rng.randint(low, high)
        messages.append({"role": "assistant", "content": str(guess)})
        step = answer(str(guess), int(problem["answer"]))
        if step.done or turn == TURNS - 1:
            break
        messages += step.messages
        if step.messages[0]["content"] == "higher":
            low = max(low, guess + 1)
        else:
            high = min(high, guess - 1)
    return messages


def chats(rows: Sequence[dict[str, Any]], count: int, careless: float, rng: random.Random) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"id": f"chat/{number}", "messages": played(rng.choice(rows), careless, rng)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--span", type=int, default=15, help="numbers to choose from")
    parser.add_argument("--chats", type=int, default=20000)
    parser.add_argument("--careless", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 1 <= options.span <= LARGEST + 1:
        parser.error(f"--span {options.span}: choose 1 to {LARGEST + 1}")
    if not 0 <= options.careless <= 1:
        parser.error(f"--careless {options.careless:g}: choose 0 to 1")
    rows = problems(options.span)
    rng = random.Random(options.seed)
    rng.shuffle(rows)
    parts = {split: [row for row in rows if split_of(row["id"]) == split] for split in ("train", "eval")}
    options.directory.mkdir(parents=True, exist_ok=True)
    files = {**parts, "chats": list(chats(parts["train"], options.chats, options.careless, rng))}
    for name, content in files.items():
        path = options.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        print(f"{path}: {len(content)} rows")


if __name__ == "__main__":
    main()
