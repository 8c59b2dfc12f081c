"""Say which layers of the sandbox this machine has, and try them: python -m rewards.sandbox [--mode landlock]"""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from rewards.sandbox import LANGUAGES, Mode, Pool, SandboxUnavailableError, run
from rewards.sandbox.confine import landlock_version
from rewards.sandbox.launch import find_bubblewrap, find_interpreter
from rewards.sandbox.toolchain import find_toolchain

# (what, a program that must fail with an exception)
TRIES = (
    ("read files of the machine", "open('/etc/passwd').read()"),
    ("open a socket", "import socket; socket.socket()"),
    ("start a process", "import os; os.fork()"),
    ("take 4 GB of memory", "bytearray(4 << 30)"),
)


HELLO = {  # a program of each language but Python
    "bash": "echo hello",
    "cpp": '#include <cstdio>\nint main() { std::puts("hello"); }',
    "java": 'class Main { public static void main(String[] words) { System.out.println("hello"); } }',
    "javascript": "console.log('hello')",
}


def main() -> int:
    """The command; returns the exit code: 0 when programs run and all tries fail."""
    parser = argparse.ArgumentParser(prog="python -m rewards.sandbox", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=get_args(Mode), default="bubblewrap")
    mode = parser.parse_args().mode
    try:
        Pool(mode, warm=0).close()
        interpreter = find_interpreter()
    except SandboxUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"mode         {mode}" + (f" ({find_bubblewrap()})" if mode == "bubblewrap" else ", the weaker one"))
    print(f"interpreter  {interpreter.executable}, Python {'.'.join(map(str, interpreter.version))}")
    print(f"landlock     {f'interface {landlock_version()}' if landlock_version() else 'not in this kernel'}")
    hello = run("print('hello')", mode=mode)
    print(f"a program    {hello.status} {hello.stdout.strip()} {hello.detail}".rstrip())
    failed = hello.stdout != "hello\n"
    for what, program in TRIES:
        outcome = run(program, mode=mode)
        stopped = outcome.status in ("crash", "memory")
        print(f"{'stopped' if stopped else 'NOT STOPPED':<12} {what}: {outcome.detail or outcome.status}")
        failed = failed or not stopped
    for name in LANGUAGES if mode == "bubblewrap" else ():
        failed = (name != "python" and not _try_language(name)) or failed
    return int(failed)


def _try_language(name: str) -> bool:
    """Print whether programs of a language run; a language whose tools are not installed is no failure."""
    try:
        toolchain = find_toolchain(name)
    except SandboxUnavailableError as error:
        print(f"{name:<12} not here: {error}")
        return True
    outcome = run(HELLO[name], language=name)
    tools = "" if toolchain is None else f" ({', '.join(toolchain.tools.values())})"
    print(f"{name:<12} {outcome.status} {outcome.stdout.strip()} {outcome.detail}".rstrip() + tools)
    return outcome.stdout == "hello\n"


if __name__ == "__main__":
    sys.exit(main())
