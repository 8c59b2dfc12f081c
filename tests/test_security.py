"""Nothing of what SECURITY.md promises is only promised: each defence of it that is no other file's has its test here."""

from __future__ import annotations

import ast
import ipaddress
import json
import re
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai_server import Scripted, body
from port_scan import Neighbour
from stage_commands import ROOT, Command, is_marked, run, write_grpo_recipe

from posttrain.cli import run_stage
from posttrain.errors import RunStopped
from posttrain.ray_network import ALLOWED, IN_A_JOB, MODE, TOKEN, TOKEN_PATH, is_loopback, require_closed
from posttrain.recipe import RecipeError
from posttrain.recipe_file import load_recipe
from posttrain.redaction import find_secret, redact, secret_values

OURS = [path for folder in ("posttrain", "rewards", "data", "eval", "tools") for path in (ROOT / folder).rglob("*.py")]

# --- code that could run what it reads --------------------------------------------------------------------------------

# Pickles between a process and its own child, over an inherited pipe; and an Unpickler that lets nothing but text through.
OWN_PIPES = {"rewards/worker.py", "rewards/zygote.py", "posttrain/environment_process.py"}
RESTRICTED = {"eval/benchmarks/livecodebench.py"}
# They run what a model or a test wrote, behind the sandbox.
SANDBOX = {"rewards/sandbox/launch.py", "rewards/sandbox/supervisor.py"}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> Any:
    found = [word.value for word in call.keywords if word.arg == name]
    return ast.unparse(found[0]) if found else None


def test_nothing_that_comes_from_outside_is_unpickled_or_executed() -> None:
    seen = set()
    for path in OURS:
        name = str(path.relative_to(ROOT))
        for call in calls(path):
            called = ast.unparse(call.func)
            if called in ("pickle.loads", "pickle.load", "dill.loads", "cloudpickle.loads", "joblib.load"):
                assert name in OWN_PIPES, (name, call.lineno)
                seen.add(name)
            if called == "torch.load":
                assert keyword(call, "weights_only") == "True", (name, call.lineno)
                seen.add("torch.load")
            if called in ("np.load", "numpy.load"):
                assert keyword(call, "allow_pickle") in (None, "False"), (name, call.lineno)
            if called in ("eval", "exec"):
                assert name in SANDBOX, (name, call.lineno)
            if called in ("yaml.load", "yaml.load_all"):
                assert name == "posttrain/recipe_file.py" and ast.unparse(call.args[1]) == "_StrictLoader"
            assert called not in (
                "os.system",
                "os.popen",
                "yaml.unsafe_load",
                "yaml.full_load",
                "shutil.unpack_archive",
            )
            assert not called.endswith((".extractall", ".extract")) or name == "none", (name, call.lineno)
            assert keyword(call, "shell") in (None, "False"), (name, call.lineno)
        if "pickle.Unpickler" in path.read_text():
            assert name in RESTRICTED
    assert seen == {*OWN_PIPES, "torch.load"}  # the search finds what is there


def test_the_loader_of_recipes_makes_nothing_but_plain_values(tmp_path: Path) -> None:
    from posttrain.recipe_file import _StrictLoader

    assert _StrictLoader.__mro__[1].__name__ == "SafeLoader"
    file, mark = tmp_path / "evil.yaml", tmp_path / "mark"
    file.write_text(f"stage: sft\nrun_name: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(RecipeError, match="not readable as YAML"):
        load_recipe(file)
    assert not mark.exists()


def test_code_of_a_checkpoint_is_off_and_loud_when_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "stage: sft\nmodel: {model_name_or_path: owner/name}\ndatasets: [{task: chain_sum, size: 9}]\n"
        f"training: {{max_steps: 1}}\noutput_dir: {tmp_path}/run\n"
    )
    asked: list[bool] = []

    def stage(recipe: Any, **_: Any) -> int:
        asked.append(recipe.model.trust_remote_code)
        return 0

    assert run_stage("sft", stage, [str(file)]) == 0 and "WARNING" not in capsys.readouterr().err
    assert run_stage("sft", stage, [str(file), "model.trust_remote_code=true"]) == 0
    assert "WARNING: model.trust_remote_code is true" in (said := capsys.readouterr().err) and "owner/name" in said
    assert asked == [False, True]


def test_an_index_from_elsewhere_names_no_file_outside(tmp_path: Path) -> None:
    from posttrain.model.mtp_files import tensor_files

    for name in ("../../secret.safetensors", "/etc/passwd", "a/b", "..", 3):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ValueError, match="no file of this directory"):
            tensor_files(tmp_path)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:6379", True),
        ("ray://localhost:10001", True),
        ("[::1]:6379", True),
        ("auto", True),
        ("10.0.0.5:6379", False),
        ("ray://head:10001", False),
        ("0.0.0.0:6379", False),
        ("localhost.attacker.invalid:6379", False),
        ("http://127.0.0.1@evil:1", False),
        ("", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def test_a_cluster_that_others_reach_needs_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_closed(None, {}, tmp_path)
    require_closed("127.0.0.1:6379", {}, tmp_path)
    for environment in ({}, {MODE: "disabled"}, {TOKEN: "x" * 40}):
        with pytest.raises(RunStopped, match=r"token authentication is off.*RAY_AUTH_MODE=token"):
            require_closed("ray://head:10001", environment, tmp_path)
    with pytest.raises(RunStopped, match="there is no token"):
        require_closed("head:6379", {MODE: "token"}, tmp_path)
    with pytest.raises(RunStopped, match="none of Ray's"):
        require_closed(None, {MODE: "tokens"}, tmp_path)
    require_closed("head:6379", {MODE: "token", TOKEN: "x" * 40}, tmp_path)
    (tmp_path / "token").write_text("x" * 40)
    require_closed("head:6379", {MODE: "token", TOKEN_PATH: str(tmp_path / "token")}, tmp_path)
    assert capsys.readouterr().err == ""
    for environment in ({IN_A_JOB: "{}"}, {ALLOWED: "1"}):  # a submitted job closes nothing by giving up
        require_closed("head:6379", environment, tmp_path)
        assert "without a token" in capsys.readouterr().err


def test_a_run_refuses_such_a_cluster_before_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.cluster import session

    monkeypatch.setenv(MODE, "disabled")
    with pytest.raises(RunStopped, match="token authentication is off"), session("203.0.113.1:6379", 1):
        pass


# --- secrets ----------------------------------------------------------------------------------------------------------

PLANTED = {
    "OPENAI_API_KEY": "sk-planted-openai-0123456789abcdef",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "WANDB_API_KEY": "planted-wandb-5b1d2f",
    "DATABASE_PASSWORD": "planted-password-77",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/0123",
    "TEACHER_KEY": "planted-teacher-key-4242",
}


def test_secrets_are_taken_out_of_text() -> None:
    text = (
        f"{PLANTED['HF_TOKEN']}, {PLANTED['DATABASE_PASSWORD']} at https://me:pass-word@host/x, Bearer abcdefgh12345678"
    )
    shown = redact(text, PLANTED)
    assert shown == "***, *** at https://***@host/x, Bearer ***"
    assert redact("sk-abcdefghijklmnopqrst", {}) == "***"
    assert redact("task-force, tokens per second, desk-top", PLANTED) == "task-force, tokens per second, desk-top"
    assert secret_values({"A_TOKEN": "short", "TOKENIZERS_PARALLELISM": "false" * 3, "PATH": "x" * 20}) == []
    assert secret_values({"A_KEY": "a" * 9, "B_KEY": "a" * 12}) == ["a" * 12, "a" * 9]  # the longer one first


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("rewards.0.kwargs={api_key: abc}", "rewards.0.kwargs.api_key"),
        ("rewards.0.kwargs={text: 'x sk-abcdefghijklmnopqrst'}", "rewards.0.kwargs.text"),
        ("run_name=planted-password-77", "run_name"),
        ("datasets.0.path='https://me:word@host/data'", "datasets.0.path"),
        ("rewards.0.kwargs={headers: {Authorization: Bearer x}}", "rewards.0.kwargs.headers.Authorization"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, key: str
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", PLANTED["DATABASE_PASSWORD"])
    file = tmp_path / "r.yaml"
    file.write_text(
        "stage: grpo\nmax_steps: 1\nmodel: {model_name_or_path: owner/name}\ndatasets: [{path: owner/data}]\n"
        "rewards: [{func: 'rewards.format:score'}]\n"
    )
    assert run_stage("grpo", lambda *_, **__: 0, [str(file), change]) == 2
    said = capsys.readouterr().err
    assert f"{key}: holds a secret" in said and "environment variable" in said
    assert not any(text in said for text in ("abc", "planted-password", "me:word", "Bearer x"))


def test_what_is_no_secret_in_a_recipe() -> None:
    tree = {"api_key_env": "OPENAI_API_KEY", "pad_token": "<pad>", "kwargs": {"answer_key": "solution", "secret": "42"}}
    assert find_secret({**tree, "levels": [1], "path": "https://host/a@b"}, {}) is None


def test_no_shipped_recipe_is_taken_for_one_with_a_secret() -> None:
    import yaml

    for file in (ROOT / "recipes").rglob("*.yaml"):
        assert find_secret(yaml.safe_load(file.read_text()), PLANTED) is None, file


def everything_below(directory: Path) -> dict[str, bytes]:
    """Every file; of Parquet the columns' values, because its pages are compressed."""
    import pyarrow.parquet as pq

    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
            if path.suffix == ".parquet":
                found[f"{path} (values)"] = repr(pq.read_table(path).to_pylist()).encode()
    return found


def require_no_secret(output: str, directory: Path) -> None:
    files = everything_below(directory)
    assert files
    for name, secret in PLANTED.items():
        assert secret not in output, (name, output)
        assert not [path for path, content in files.items() if secret.encode() in content], name


SFT = """
stage: sft
model: {build: {hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 2}}
datasets: [{task: letter_counting, levels: [1], size: 60}]
training: {max_length: 128, per_device_train_batch_size: 4, max_steps: 2, logging_steps: 1}
"""
DISTILL = """
stage: distill
teacher: {endpoint: {model: m, base_url: "%s", api_key_env: TEACHER_KEY, max_retries: 1}}
datasets: [{task: letter_counting, levels: [1], size: 3}]
generation: {num_generations: 2, max_completion_length: 16}
selection: {pick: all, deduplicate: false}
"""


@pytest.mark.slow
def test_no_secret_reaches_any_output_of_sft_and_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "sft.yaml").write_text(SFT)
    code, output = run("posttrain.sft", str(tmp_path / "sft.yaml"), f"output_dir={tmp_path / 'sft'}")
    assert code == 0, output
    require_no_secret(output, tmp_path / "sft")

    def tells_all(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        """A server that repeats what it was sent, in answers and in errors."""
        said = f"your key is {scripted.keys[-1]}, {PLANTED['TEACHER_KEY']}"
        if number % 3 == 0:
            return 401, {}, json.dumps({"error": {"message": said}}).encode()
        return 200, {}, body(f"<think>{said}</think><answer>1</answer>", model=PLANTED["TEACHER_KEY"])

    with Scripted(tells_all) as scripted:
        (tmp_path / "distill.yaml").write_text(DISTILL % scripted.url)
        out = tmp_path / "distill"
        code, output = run("posttrain.distill", str(tmp_path / "distill.yaml"), f"output_dir={out}")
    assert scripted.keys and all(PLANTED["TEACHER_KEY"] in key for key in scripted.keys)  # it was used
    assert (out / "journal").is_dir() and "your key is" in repr(everything_below(out))  # and the answers were kept
    require_no_secret(output, out)


# --- a real run, seen from outside --------------------------------------------------------------------------------------


def listening(mark: str) -> set[tuple[str, str]]:
    """(address, command) of every socket that a run's processes take connections or datagrams on."""
    found = set()
    for process in psutil.process_iter():
        if not is_marked(process, mark):
            continue
        try:
            sockets, words = process.net_connections(kind="inet"), " ".join(process.cmdline()[:3])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and one.laddr and not one.raddr):
                found.add((one.laddr.ip, words))
    return found


def kinds_of(seen: set[tuple[str, str]]) -> str:
    return " ".join(words for _, words in seen)


@contextmanager
def next_door() -> Iterator[Neighbour | None]:
    """A neighbour, or None with a warning where there can be none."""
    if reason := Neighbour.missing():
        warnings.warn(f"no scan from another network namespace: {reason}", stacklevel=3)
        yield None
        return
    with Neighbour() as neighbour:
        yield neighbour


def is_private(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


PARTS = ("raylet", "gcs_server", "_SamplerActor", "_RankActor")


@pytest.mark.slow
def test_a_running_grpo_job_listens_on_loopback_alone_and_writes_no_secret(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that breaks in its second step, so that flight record and crash bundle are searched as well."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    recipe, out = write_grpo_recipe(tmp_path, policy_path), tmp_path / "run"
    reward = tmp_path / "reward.py"  # a reward that prints the key it works with, as careless code does
    told = "    print('key', os.environ['OPENAI_API_KEY'], flush=True)\n    return"
    reward.write_text(f"import os\n{reward.read_text().replace('    return', told)}")
    # The first minibatch throws the weights away; the second cannot be computed any more.
    words = (f"output_dir={out}", "max_steps=1", "learner.num_workers=2", "optimizer.learning_rate=1e30")
    seen: set[tuple[str, str]] = set()
    with ThreadPoolExecutor(1) as pool, next_door() as neighbour, socket.create_server(("", 0)) as known:
        before = neighbour.open_ports() if neighbour else set()
        known_port = known.getsockname()[1]
        command = Command("posttrain.grpo", str(recipe), *words)
        scan: Future[set[tuple[str, int]]] | None = None
        end = time.monotonic() + 300
        while command.process.poll() is None and time.monotonic() < end:
            seen |= listening(command.mark)
            if neighbour and scan is None and all(name in kinds_of(seen) for name in PARTS):
                scan = pool.submit(neighbour.open_ports)
            time.sleep(0.5)
        _, output = command.finish()
    assert all(name in kinds_of(seen) for name in PARTS), (seen, output)
    assert not {(address, words) for address, words in seen if not is_private(address)}
    if neighbour:  # what every other machine finds: all that was there before, one port that we left open, nothing else
        assert scan is not None and known_port in {port for _, port in before}
        assert scan.result() <= before

    logs = {path.name: path.read_text() for path in (out / "logs" / "ray").iterdir()}
    for kind in (r"sampler-\d+\.log", r"where\.txt", r"raylet\.log"):
        assert any(re.fullmatch(kind, name) for name in logs), (kind, logs.keys())
    assert any("key ***" in text for text in logs.values()), logs  # what it printed was gathered
    assert "publication" in (out / "logs" / "grpo.log").read_text()
    bundle = out / "crash" / "step-1-minibatch-1"
    assert (bundle / "policy" / "model.safetensors").exists() and "crash bundle" in output, output
    require_no_secret(output, out)
    for path in out.rglob("*.json"):
        assert "OPENAI_API_KEY" not in path.read_text()
    code, said = run("posttrain.replay", str(bundle))
    assert code == 0 and said.count("the same") == 2, said
