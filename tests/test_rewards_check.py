"""python -m rewards.check: good rewards pass, and each kind of broken one is told what to mend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rewards.check import main

GOOD = '''
from rewards.extract import final_answer

def score(completion, answer, **metadata):
    """1.0 for the right answer."""
    return float(final_answer(completion) == answer)
'''
PRELUDE = """
import os, random, re, time
from rewards import batched
from rewards.extract import final_answer

"""
BROKEN = {
    "takes no metadata": (
        "def score(completion, answer):\n    return 1.0",
        "must take (completion, answer, **metadata)",
    ),
    "says nothing": (
        "def score(completion, answer, **metadata):\n    final_answer(completion)",
        r"returned None \(NoneType\).*it must return a finite number",
    ),
    "not a number": (
        "def score(completion, answer, **metadata):\n    return float('nan') if not completion else 1.0",
        "VIOLATION empty: .*returned nan",
    ),
    "raises": (
        "def score(completion, answer, **metadata):\n    return float(completion.split('<answer>')[1][0] == answer)",
        "VIOLATION empty: .*raised IndexError.*handle this one",
    ),
    "random": (
        "def score(completion, answer, **metadata):\n    return random.random()",
        "in another order; make the score depend on its arguments alone",
    ),
    "remembers": (
        "seen = set()\ndef score(completion, answer, **metadata):\n    new = completion not in seen\n"
        "    seen.add(completion)\n    return float(new and 'so it is' in completion)",
        "in another order; make the score depend on its arguments alone",
    ),
    "hangs": (
        "def score(completion, answer, **metadata):\n    while '^' in completion:\n        pass\n    return 1.0",
        "VIOLATION a tower of powers: no answer within 0.5 s; bound the work",
    ),
    "dies": (
        "def score(completion, answer, **metadata):\n    if not completion:\n        os._exit(0)\n    return 1.0",
        "VIOLATION empty: its process ended",
    ),
    "unsafe in threads": (
        "current = ''\ndef score(completion, answer, **metadata):\n    global current\n    current = completion\n"
        "    time.sleep(1e-4)\n    return float(final_answer(current) == answer)",
        "from 8 threads at once it gave .* local variables",
    ),
    "wrong batch size": (
        "@batched\ndef score(completions, answers, metadata):\n    return [1.0 for text in completions if text]",
        "returned .* results for .* completions; it must return a list with one result for each",
    ),
    "looks at its neighbours": (
        "@batched\ndef score(completions, answers, metadata):\n    return [float(i) for i, _ in enumerate(completions)]",
        "no state between calls and on no other completion of the batch",
    ),
    "changes metadata": (
        "def score(completion, answer, **metadata):\n    metadata['messages'][0].clear()\n    return 1.0",
        "it changes the metadata it is given",
    ),
    "fooled by a list of answers": (
        "def score(completion, answer, **metadata):\n    last = completion.split('<answer>')[-1].split('<')[0]\n"
        "    return float(answer in last.split(', '))",
        "FOOLED every answer listed scores 1",
    ),
    "reads the reasoning": (
        "def score(completion, answer, **metadata):\n    return float(answer in re.findall(r'[0-9]+', completion))",
        "FOOLED answer only in the reasoning scores 1",
    ),
    "takes any answer block": (
        "def score(completion, answer, **metadata):\n"
        "    parts = completion.replace('</answer>', '').split('<answer>')\n"
        "    return float(len(parts) > 1 and any(part.strip() == answer for part in parts[1:]))",
        "FOOLED two answers, right last scores 1",
    ),
}


def test_a_good_reward_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    assert main([f"{path}:score"]) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert "keeps the contract" in output
    assert "microseconds a call" in output


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reward_is_told_what_to_mend(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body, message = BROKEN[name]
    path = tmp_path / "broken.py"
    path.write_text(PRELUDE + body + "\n")
    assert main([f"{path}:score", "--timeout", "0.5"]) == 1
    captured = capsys.readouterr()
    text = (captured.out + captured.err).replace("\n", " ")
    assert re.search(message if ".*" in message else re.escape(message), text), text
    assert "Traceback" not in text


def test_options_metadata_and_problems_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        GOOD.replace("answer, **", "answer, colour, unit=1, **").replace(
            "return float", "assert colour == 'red'\n    return unit * float"
        )
    )
    problems = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{number}+1?", "answer": str(number + 1)} for number in range(3)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"{path}:score", "--prompts", str(problems), "--set", "colour=red", "--kwargs", "unit=2"]
    assert main(words) == 0, capsys.readouterr().out
    assert "66 calls" in capsys.readouterr().out
    assert main([f"{path}:score", "--kwargs", "units=2"]) == 1
    assert "has no option 'units'; its options are" in capsys.readouterr().err
    assert main([f"{path}:score", "--prompts", str(tmp_path / "nothing.jsonl")]) == 1
    assert "nothing.jsonl" in capsys.readouterr().err


def test_a_name_that_does_not_resolve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards.exact:scor"]) == 1
    assert "did you mean 'score'" in capsys.readouterr().err
