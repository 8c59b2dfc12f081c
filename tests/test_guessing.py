"""The guessing game: its answers by hand, its files, and what play is worth."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from posttrain.types import Prompt
from rewards.guessing import ORDER, Guessing, bounds_of, is_held_out, main, played, problems


def begun(question: str, secret: str) -> Guessing:
    game = Guessing()
    game.reset(Prompt("p", ({"role": "user", "content": question},), (1,), secret))
    return game


def test_what_is_left_by_hand() -> None:
    game = begun("5-j?", "c")
    said = [game.step(guess) for guess in ("a", "f", "1", "z", "no guess", "", "b", " c ")]
    left = [step.messages[0]["content"] for step in said[:-1]]
    assert left == ["b-j?", "b-e?", "b-e?", "b-e?", "b-e?", "b-e?", "c-e?"]
    assert [step.reward for step in said] == [0.0] * 7 + [1.0]
    assert [step.done for step in said] == [False] * 7 + [True]
    with pytest.raises(ValueError, match="must be one of"):
        begun("5-j?", "C")


def test_halving_finds_one_of_fifteen_in_four_guesses_and_the_scripted_player_in_three_of_five() -> None:
    for row in problems(15):
        game, question = begun(row["prompt"], row["answer"]), row["prompt"]
        for _ in range(4):
            step = game.step(ORDER[sum(bounds_of(question)) // 2])
            if step.done:
                break
            question = step.messages[0]["content"]
        assert step.reward == 1.0, row
    rng = random.Random(0)
    rows = [rng.choice(problems(15)) for _ in range(4000)]
    found = sum(played(row, rng)[-1]["content"] == row["answer"] for row in rows)
    assert 0.58 < found / len(rows) < 0.64


def test_files(tmp_path: Path) -> None:
    main([str(tmp_path), "--chats", "50"])
    read = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval", "chats")
    }
    assert len(read["train"]) + len(read["eval"]) == 22 * 15 and len(read["chats"]) == 50
    assert {row["id"] for row in read["train"]}.isdisjoint(row["id"] for row in read["eval"])
    assert all(is_held_out(row) for row in read["eval"])
    for chat in read["chats"]:
        assert [m["role"] for m in chat["messages"]] == ["user", "assistant"] * (len(chat["messages"]) // 2)
