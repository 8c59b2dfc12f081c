"""The languages that programs may be written in, as data: how one is compiled and run, and what it needs to see.

A new language is an entry here; `toolchain.find_toolchain` looks for its tools, `process.Sandbox` runs its commands.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """One language.

    Attributes:
        name: in recipes and records.
        title: for people.
        tags: what marks a code block of it.
        file: where the program lies, below the working directory.
        compile: a command, or () where there is nothing to compile. In a command, {memory_mb} is the program's memory.
        run: a command; () runs the program in the sandbox's own Python.
        cures: a tool that the commands begin with -> the package that has it.
        readable: directories that tools and programs read, besides the shared libraries and the tools themselves.
        is_native: compiling makes a file that the kernel executes.
        reserve_bytes: address space that the run-time takes beyond what the program uses.
    """

    name: str
    title: str
    tags: tuple[str, ...]
    file: str
    compile: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    cures: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    readable: tuple[str, ...] = ()
    is_native: bool = False
    reserve_bytes: int = 0


LANGUAGES: Mapping[str, Language] = MappingProxyType(
    {
        language.name: language
        for language in (
            Language(name="python", title="Python", tags=("python", "python3", "py"), file="program.py"),
            Language(
                name="bash",
                title="Bash",
                tags=("bash", "sh", "shell"),
                file="program.sh",
                run=("bash", "program.sh"),
                cures={"bash": "bash"},
                readable=("/usr/bin", "/etc/alternatives", "/usr/lib/locale"),  # awk, sed, sort, bc, ...
            ),
            Language(
                name="cpp",
                title="C++",
                tags=("cpp", "c++", "cxx", "cc"),
                file="program.cpp",
                compile=("g++", "-std=c++17", "-pipe", "-o", "program", "program.cpp"),
                run=("./program",),
                cures={"g++": "g++"},
                readable=("/usr/bin", "/usr/lib/gcc", "/usr/libexec/gcc", "/usr/include", "/etc/alternatives"),
                is_native=True,
            ),
            Language(
                name="java",
                title="Java",
                tags=("java",),
                file="Main.java",  # with a class Main
                compile=("javac", "-J-Xmx512m", "-J-XX:+UseSerialGC", "-J-XX:-UsePerfData", "-nowarn", "Main.java"),
                run=("java", "-ea", "-Xmx{memory_mb}m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-cp", ".", "Main"),
                cures={"javac": "default-jdk-headless", "java": "default-jdk-headless"},
                reserve_bytes=2048 * MEBIBYTE,  # class space, code cache and stacks, mostly never touched
            ),
            Language(
                name="javascript",
                title="JavaScript",
                tags=("javascript", "js", "node"),
                file="program.js",
                run=("node", "--max-old-space-size={memory_mb}", "program.js"),
                cures={"node": "nodejs"},
                readable=("/usr/share/nodejs",),
                reserve_bytes=4096 * MEBIBYTE,  # V8 reserves the room for its code and heap at once
            ),
        )
    }
)


def get_language(name: str) -> Language:
    """The language of that name.

    Raises:
        ValueError: the sandbox does not know it.
    """
    if name not in LANGUAGES:
        close = difflib.get_close_matches(name, LANGUAGES, n=1)
        raise ValueError(
            f"the sandbox does not know the language {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else f"; it knows {', '.join(LANGUAGES)}")
        )
    return LANGUAGES[name]
