"""The set-up tool's decisions, without installing anything; and that metadata, tool and docs agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setup_env
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from setup_env import Environment, SetupError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Environment:
    """A checkout with a `.venv` whose Python is a script that succeeds and prints a supported version."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "posttrain"\n')
    environment = Environment(tmp_path, "cpu")
    write_program(environment.python, "echo 3 11")
    return environment


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[Requirement]:
    project = metadata()["project"]
    optional = [text for texts in project["optional-dependencies"].values() for text in texts]
    return [Requirement(text) for text in [*project["dependencies"], *optional]]


# --- the stamp


def test_stamp_is_valid_only_for_what_was_installed(checkout: Environment) -> None:
    assert not setup_env.is_current(checkout)
    setup_env.write_stamp(checkout, setup_env.fingerprint(checkout))
    assert setup_env.is_current(checkout)
    assert not setup_env.is_current(Environment(checkout.root, "cuda"))
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# a new dependency\n")
    assert not setup_env.is_current(checkout)


def test_stamp_without_python_or_moved_elsewhere_is_not_valid(checkout: Environment, tmp_path: Path) -> None:
    setup_env.write_stamp(checkout, setup_env.fingerprint(checkout))
    moved = Environment(checkout.root.rename(tmp_path.with_name(tmp_path.name + "-moved")), "cpu")
    assert not setup_env.is_current(moved)
    setup_env.write_stamp(moved, setup_env.fingerprint(moved))
    assert setup_env.is_current(moved)
    moved.python.unlink()
    assert not setup_env.is_current(moved)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"platform": "cpu", "digest": ""}'])
def test_damaged_or_unfinished_stamp_is_not_valid(checkout: Environment, content: str) -> None:
    (checkout.path / setup_env.STAMP).write_text(content)
    assert not setup_env.is_current(checkout)


def steps_recorded(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[str]:
    calls: list[str] = []

    def record(name: str) -> Any:
        def step(*_: object) -> None:
            calls.append(name)
            if name == failing:
                raise SetupError("no network; check it")

        return step

    for name in ("install", "remove_broken_companions", "verify"):
        monkeypatch.setattr(setup_env, name, record(name))
    return calls


def test_second_call_does_nothing(
    checkout: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "ROOT", checkout.root)
    calls = steps_recorded(monkeypatch)
    assert setup_env.main(["--platform", "cpu"]) == 0
    assert calls == ["install", "remove_broken_companions", "verify"]
    capsys.readouterr()
    assert setup_env.main(["--platform", "cpu"]) == 0
    assert len(calls) == 3
    assert capsys.readouterr().out == ".venv is up to date (cpu)\n"


@pytest.mark.parametrize("failing", ["install", "remove_broken_companions", "verify"])
def test_failed_set_up_leaves_no_valid_stamp(
    checkout: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    setup_env.write_stamp(checkout, "of another pyproject.toml")
    monkeypatch.setattr(setup_env, "ROOT", checkout.root)
    steps_recorded(monkeypatch, failing)
    assert setup_env.main(["--platform", "cpu"]) == 1
    assert capsys.readouterr().err == "setup: no network; check it\n"
    assert setup_env.read_stamp(checkout) == {"platform": "cpu", "digest": ""}


# --- the machine


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "cuda"),
        ("echo 'No devices were found'", "cpu"),
        ("echo 'GPU'; exit 9", "cpu"),  # driver not loaded
        (None, "cpu"),
    ],
)
def test_platform_is_cuda_only_if_nvidia_smi_lists_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: str
) -> None:
    if script is not None:
        write_program(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.detect_platform() == expected


@pytest.mark.parametrize(
    ("version", "system", "message"),
    [((3, 10), "Linux", "Python 3.10"), ((3, 14), "Linux", "Python 3.14"), ((3, 12), "Darwin", "Darwin")],
)
def test_unsupported_machine_is_refused(version: tuple[int, int], system: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        setup_env.check_machine(version, system)


def test_supported_machine_passes() -> None:
    for minor in (11, 12, 13):
        setup_env.check_machine((3, minor), "Linux")


def test_environment_is_made_anew_for_another_platform_or_a_broken_python(checkout: Environment) -> None:
    assert setup_env.reason_to_remake(Environment(checkout.root / "nowhere", "cpu")) is None
    assert setup_env.reason_to_remake(checkout) is None
    setup_env.write_stamp(checkout, "")
    assert "made for cpu" in str(setup_env.reason_to_remake(Environment(checkout.root, "cuda")))
    write_program(checkout.python, "echo 3 10")
    assert setup_env.reason_to_remake(checkout) == "its Python is 3.10"
    write_program(checkout.python, "exit 1")
    assert "does not run" in str(setup_env.reason_to_remake(checkout))
    checkout.python.unlink()
    assert setup_env.reason_to_remake(checkout) == "its Python does not run"


# --- the commands


@pytest.mark.parametrize(("platform", "extras"), [("cpu", ".[cpu,dev]"), ("cuda", ".[gpu,dev]")])
def test_both_installers_install_the_platforms_extras_editable(platform: str, extras: str) -> None:
    environment = Environment(Path("/checkout"), platform)
    for command in (
        setup_env.uv_command(environment, "", None),
        setup_env.pip_install_command(environment, None),
    ):
        assert command[-2:] == ["--editable", extras]
        assert not any("://" in part for part in command)
    assert set(extras[2:-1].split(",")) <= set(metadata()["project"]["optional-dependencies"])


def test_extra_index_reaches_both_installers() -> None:
    environment = Environment(Path("/checkout"), "cpu")
    uv = setup_env.uv_command(environment, "", "https://index.example/cpu")
    assert uv[uv.index("https://index.example/cpu") - 1] == "--index"
    pip = setup_env.pip_install_command(environment, "https://index.example/cpu")
    assert pip[pip.index("https://index.example/cpu") - 1] == "--extra-index-url"


def test_pip_configuration_becomes_uv_options() -> None:
    config = """\
global.cert='/etc/certificates.crt'
global.index-url='https://old.example/simple'
global.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'
install.no-binary='numpy'
:env:.index-url='https://new.example/simple'
:env:.find-links='/wheels /wheels'
a line of another kind
"""
    assert setup_env.uv_options(config) == [
        *("--default-index", "https://new.example/simple"),
        *("--index", "https://a.example/simple", "--index", "https://b.example/simple"),
        *("--find-links", "/wheels"),
    ]
    assert setup_env.uv_options("global.no-index='true'\nglobal.find-links='/wheels'") == [
        *("--no-index", "--find-links", "/wheels")
    ]
    assert setup_env.uv_options("") == []


@pytest.mark.parametrize(("found", "index"), [(True, None), (False, setup_env.CPU_TORCH_INDEX)])
def test_cpu_index_is_added_only_if_pip_does_not_find_torch(
    checkout: Environment, found: bool, index: str | None
) -> None:
    write_program(checkout.python, f"exit {0 if found else 1}")
    assert setup_env.needed_index(checkout) == index


def test_cuda_never_needs_the_cpu_index(checkout: Environment) -> None:
    write_program(checkout.python, "exit 1")
    assert setup_env.needed_index(Environment(checkout.root, "cuda")) is None


@pytest.mark.parametrize(("uv_works", "last"), [(True, "uv pip install"), (False, "-m pip")])
def test_pip_installs_only_where_uv_fails(checkout: Environment, uv_works: bool, last: str) -> None:
    write_program(checkout.path / "bin" / "uv", f"exit {0 if uv_works else 2}")
    setup_env.install(checkout, "uv")
    commands = [line for line in checkout.log.read_text().splitlines() if line.startswith("$ ")]
    assert last in commands[-1]
    assert commands[-1].endswith("--editable .[cpu,dev]")


def test_failed_installation_shows_the_last_lines_and_the_cure(checkout: Environment) -> None:
    write_program(
        checkout.python,
        'case "$*" in *--editable*) ;; *) exit 0;; esac\n'
        "echo \"WARNING: Location '/wheels/six/' is ignored: it is neither a file nor a directory.\"\n"
        'echo "ERROR: Could not install: [Errno 28] No space left on device" >&2; exit 1',
    )
    with pytest.raises(SetupError) as caught:
        setup_env.install(checkout, "pip")
    message = str(caught.value)
    assert "No space left on device" in message
    assert "free some disk space" in message.splitlines()[-1]
    assert "is ignored" not in message
    assert str(checkout.log) in message


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("error: Failed to fetch: https://index.example/six/", "check the network"),
        ("SSLError(CERTIFICATE_VERIFY_FAILED)", "global.cert"),
        ("ERROR: No matching distribution found for peft~=0.99.0", "the package index lacks a version"),
        ("something new", "run make setup again"),
    ],
)
def test_cure_names_what_to_do(text: str, cure: str) -> None:
    assert cure in setup_env.cure_for(text)


def test_tail_is_of_the_last_command_only() -> None:
    log = "$ uv\nfirst failure\n$ pip\n" + "".join(f"line {i}\n" for i in range(40))
    tail = setup_env.useful_tail(log).splitlines()
    assert tail == [f"  line {i}" for i in range(40 - setup_env.TAIL_LINES, 40)]
    assert "first failure" not in setup_env.useful_tail("$ uv\nfirst failure\n$ pip\nsecond failure\n")


def test_progress_shows_the_few_lines_that_matter() -> None:
    assert setup_env.progress_line("Resolved 220 packages in 3.80s\n") == "resolved 220 packages in 3.80s"
    assert setup_env.progress_line("Installing collected packages: six, attrs, numpy\n") == "installing 3 packages"
    assert setup_env.progress_line("Collecting numpy\n") is None


# --- the packages that come built for CUDA


def test_companions_that_do_not_import_are_found() -> None:
    output = (
        "noise of a library\n"
        "torchvision broken operator torchvision::nms does not exist\n"
        "torchaudio works\n"
        "torchcodec absent\n"
    )
    assert setup_env.broken_companions(output, 0) == {"torchvision": "operator torchvision::nms does not exist"}


def test_companion_that_ends_the_process_is_broken() -> None:
    broken = setup_env.broken_companions("torchvision works\n", -11)
    assert list(broken) == ["torchaudio", "torchcodec"]


def test_broken_companions_are_removed_on_a_cpu_only(checkout: Environment) -> None:
    log = checkout.root / "calls"
    write_program(checkout.python, f'echo "$*" >> {log}; echo "torchvision broken operator does not exist"')
    setup_env.remove_broken_companions(Environment(checkout.root, "cuda"))
    assert not log.exists()
    setup_env.remove_broken_companions(checkout)
    assert log.read_text().rstrip().endswith("uninstall --yes --quiet torchvision")


def test_gpu_that_torch_cannot_use_is_an_error(checkout: Environment) -> None:
    write_program(checkout.python, """echo '{"versions": {"torch": "2.13.0"}, "cuda": false}'""")
    setup_env.verify(checkout)
    with pytest.raises(SetupError, match="update the NVIDIA driver"):
        setup_env.verify(Environment(checkout.root, "cuda"))


# --- metadata, tool, Makefile and docs agree


def test_every_dependency_has_a_row_in_the_docs() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    documented = {name.strip().lower() for row in rows for name in row.split(",")}
    named = {requirement.name.lower() for requirement in requirements()}
    assert "torch" in named
    assert named - documented == set()


def test_every_dependency_has_a_range() -> None:
    assert [str(requirement) for requirement in requirements() if not requirement.specifier] == []


def test_pinned_cpu_torch_is_within_the_declared_range() -> None:
    pinned = Requirement(setup_env.CPU_TORCH)
    declared = next(requirement for requirement in requirements() if requirement.name == "torch")
    version = next(iter(pinned.specifier)).version
    assert version.endswith("+cpu")
    assert declared.specifier.contains(version)


def test_supported_pythons_are_the_same_everywhere() -> None:
    supported = SpecifierSet(metadata()["project"]["requires-python"])
    for minor in range(9, 17):
        accepted = setup_env.OLDEST_PYTHON <= (3, minor) < setup_env.FIRST_UNSUPPORTED_PYTHON
        assert supported.contains(f"3.{minor}.1") == accepted


def test_makefile_sets_up_before_it_runs_anything() -> None:
    text = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"^([a-z-]+):([^#\n]*)##", text, re.M))
    for target in ("quickstart", "test", "lint"):
        assert rules[target].split() == ["setup"]
    for variable in ("HF_HUB_OFFLINE ?= 1", "HF_HUB_DISABLE_TELEMETRY ?= 1", "VLLM_NO_USAGE_STATS ?= 1"):
        assert f"export {variable}" in text
