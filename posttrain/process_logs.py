"""What Ray's processes wrote, gathered in the run directory: a log for each actor, and the tails of Ray's own.

    logs/ray/<actor>-<pid>.log    of this run: samplers, learner ranks, rewards
    logs/ray/raylet.log, ...      of this machine's Ray
    logs/ray/where.txt            Ray's own directory on this machine, also for a run that was killed; on other nodes of a
                                  cluster their logs stay there

Secrets of the environment are taken out.
"""

from __future__ import annotations

import re
from pathlib import Path

from posttrain.redaction import redact

LONGEST = 2**20  # bytes of each log, the end of it
SERVICES = ("raylet", "gcs_server", "monitor", "runtime_env_agent")
_WORKER = re.compile(r"worker-[0-9a-f]+-(?P<job>[0-9a-f]+)-(?P<pid>\d+)\.(?:out|err)")
_MARK = re.compile(r"^:(?:job_id|actor_name|task_name):.*\n?", re.MULTILINE)
_ACTOR = re.compile(r"^:actor_name:_?(\w+)", re.MULTILINE)


def point_to(directory: Path, target: Path) -> None:
    """Say where Ray's logs are, before anything can go wrong.

    Args:
        directory: Ray's logs.
        target: logs/ray of the run directory.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "where.txt").write_text(f"{directory}\n")


def gather(directory: Path, target: Path, job: str) -> None:
    """Copy the logs of a run's actors and of Ray's services.

    Args:
        directory: Ray's logs on this machine.
        target: logs/ray of the run directory; logs of an earlier start stay beside the new ones.
        job: Ray's id of the run, in hexadecimal.
    """
    target.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    for file in sorted(directory.glob("worker-*")):
        found = _WORKER.fullmatch(file.name)
        if found is None or found["job"] != job:
            continue
        text = _tail(file)
        actor = _ACTOR.search(text) or _ACTOR.search(_head(file))
        if actor is not None:
            name = f"{actor[1].removesuffix('Actor').lower()}-{found['pid']}"
            texts[name] = texts.get(name, "") + _MARK.sub("", text)
    for service in SERVICES:
        texts[service] = "".join(_tail(directory / f"{service}.{end}") for end in ("out", "err"))
    for name, text in texts.items():
        if text.strip():
            (target / f"{name}.log").write_text(redact(text), encoding="utf-8", errors="backslashreplace")


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - LONGEST))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def _head(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(1000).decode(errors="replace")
