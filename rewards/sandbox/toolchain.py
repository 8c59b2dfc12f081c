"""Finding the compilers and interpreters of a language, as the user that programs run as sees them."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rewards.sandbox.languages import Language, get_language
from rewards.sandbox.launch import SandboxUnavailableError, credentials, outermost

ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LC_ALL": "C.UTF-8"}
SHARED_PREFIXES = ("/", "/usr", "/usr/local")  # the tools below them have no directory of their own
CONFIGURATION = "/etc/java-*"  # where distributions keep the files that a JDK's directory links to


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A language with its tools on this machine."""

    language: Language
    tools: Mapping[str, str]  # name -> path, no symbolic link
    readable: tuple[str, ...]  # directories and files

    def command(self, words: tuple[str, ...], memory_bytes: int) -> list[str]:
        """A command of the language with the tool's path and the memory put in."""
        filled = [word.format(memory_mb=memory_bytes >> 20) for word in words]
        return [self.tools.get(filled[0], filled[0]), *filled[1:]]


@cache
def find_toolchain(name: str) -> Toolchain | None:
    """The tools of a language; None for Python, which the sandbox itself runs.

    Raises:
        SandboxUnavailableError: a tool is not installed, or the unprivileged user cannot run it; says which.
        ValueError: the sandbox does not know the language.
    """
    language = get_language(name)
    if not language.run:
        return None
    tools = {tool: _find_tool(language, tool) for tool in language.cures}
    places = [*language.readable]
    for path in tools.values():
        prefix = str(Path(path).parents[1])
        places.append(path if prefix in SHARED_PREFIXES else prefix)
        places += [] if prefix in SHARED_PREFIXES else glob.glob(CONFIGURATION)
    return Toolchain(language, tools, outermost(places))


def _find_tool(language: Language, tool: str) -> str:
    package = language.cures[tool]
    cure = f"install it for all users (Debian, Ubuntu: apt-get install {package}), or leave {language.title} out"
    found = shutil.which(tool)
    if found is None:
        raise SandboxUnavailableError(f"{language.title} programs need {tool}, which is not installed: {cure}")
    path = os.path.realpath(found)
    try:
        subprocess.run(
            [path, "--version"],
            capture_output=True,
            timeout=60,
            check=True,
            env=ENVIRONMENT,
            cwd="/",
            **credentials(),
        )  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxUnavailableError(
            f"{language.title} programs need {tool}, and {path} does not start for the user that they run as ({error}): "
            f"{cure}"
        ) from error
    return path
