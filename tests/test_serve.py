"""Serving: the flags that vLLM gets, what is refused, and the official client against a real server."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI
from openai_server import KEY, vllm_server
from stage_commands import ROOT

from posttrain.serve import (
    KEY_VARIABLE,
    Machine,
    ServeOptions,
    main,
    require_exact_speculation,
    require_key,
    server_environment,
    server_flags,
)

CPU = Machine(has_gpu=False, has_fp8=False, num_cpus=2)
GPU = Machine(has_gpu=True, has_fp8=True, num_cpus=16)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def made(directory: Path, *, template: str = "{{ messages }}", **config: object) -> Path:
    """What serving looks at of a checkpoint."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"dtype": "float32", "num_hidden_layers": 2, **config}))
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def value(flags: list[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


def test_flags_follow_checkpoint_and_machine(tmp_path: Path) -> None:
    path = made(tmp_path / "counting/checkpoints/step-5", template="<think>{{ x }}</think>")
    (tmp_path / "counting/checkpoints/latest").symlink_to("step-5")
    flags = server_flags(ServeOptions(tmp_path / "counting/checkpoints/latest", port=8123), CPU)
    assert value(flags, "--served-model-name") == "counting"
    assert (value(flags, "--host"), value(flags, "--port")) == ("127.0.0.1", "8123")
    assert value(flags, "--dtype") == "float32" and value(flags, "--reasoning-parser") == "deepseek_r1"
    assert (
        json.loads(value(flags, "--compilation-config") or "") == {"custom_ops": ["none"]}
        and "--enforce-eager" in flags
    )
    on_gpu = server_flags(ServeOptions(path), GPU)
    assert value(on_gpu, "--dtype") == "bfloat16"
    assert "--enforce-eager" not in on_gpu and "--compilation-config" not in on_gpu
    assert not {"--speculative-config", "--max-model-len", "--chat-template", "--api-key"} & {*flags, *on_gpu}
    chosen = ServeOptions(
        path, name="x", reasoning_parser="none", dtype="float16", max_model_len=64, more=("--seed", "3")
    )
    flags = server_flags(chosen, GPU)
    assert [value(flags, f"--{name}") for name in ("served-model-name", "dtype", "max-model-len", "seed")] == [
        "x",
        "float16",
        "64",
        "3",
    ]
    assert "--reasoning-parser" not in flags
    switched = made(tmp_path / "switched", template="{% if thinking %}<think>{% else %}</think>{% endif %}")
    assert value(server_flags(ServeOptions(switched), GPU), "--reasoning-parser") == "deepseek_v3"
    plain = made(tmp_path / "plain", template="")
    with pytest.raises(ValueError, match="has no chat template; give one with --chat-template"):
        server_flags(ServeOptions(plain), CPU)
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages }}")
    flags = server_flags(ServeOptions(plain, chat_template=str(other)), CPU)
    assert value(flags, "--chat-template") == str(other) and "--reasoning-parser" not in flags
    assert value(flags, "--served-model-name") == "plain"
    with pytest.raises(ValueError, match="is no checkpoint"):
        server_flags(ServeOptions(tmp_path), CPU)
    assert server_environment(CPU)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "OMP_NUM_THREADS" not in server_environment(GPU)


def test_drafting_needs_a_module_and_a_gpu(tmp_path: Path) -> None:
    path = made(tmp_path / "plain")
    with pytest.raises(ValueError, match="no multi-token prediction module to draft with"):
        server_flags(ServeOptions(path, speculative=True), GPU)
    name = "model.layers.2.eh_proj.weight"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "model-mtp.safetensors"}}))
    flags = server_flags(ServeOptions(path, speculative=True), GPU)
    assert json.loads(value(flags, "--speculative-config") or "") == {"method": "mtp", "num_speculative_tokens": 1}
    with pytest.raises(ValueError, match="a server cannot refuse its clients' temperature"):
        require_exact_speculation(ServeOptions(path, speculative=True), CPU)


def test_only_this_machine_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        require_key(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        require_key(host, KEY)
        with pytest.raises(ValueError, match=f"--host {host}: other machines reach this address; set {KEY_VARIABLE}"):
            require_key(host, None)
    with pytest.raises(ValueError, match="16 or more characters"):
        require_key("127.0.0.1", "")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    path = made(tmp_path / "plain")
    assert main([str(path), "--host", "0.0.0.0"]) == 2
    assert main([str(path), "--host", "0.0.0.0", "--print"]) == 2


def test_the_command_is_printed_without_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    path = made(tmp_path / "a checkpoint")
    assert main([str(path), "--print", "--", "--max-num-seqs", "8"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == f"{KEY_VARIABLE}=..." and KEY not in words
    assert words[words.index("--model") + 1] == str(path) and words[-2:] == ["--max-num-seqs", "8"]
    assert words[words.index("-m") + 1] == "vllm.entrypoints.openai.api_server"


def test_fp8_is_refused_where_it_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.export_check import has_fp8_kernels

    path = made(tmp_path / "v3", quantization_config=FP8)
    if has_fp8_kernels():
        pytest.skip("this machine has kernels for FP8")
    assert main([str(path)]) == 2
    assert f"python -m posttrain.export {path} OUT --format bf16, and serve OUT" in capsys.readouterr().err


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(policy_path: Path) -> Iterator[str]:
    with vllm_server(policy_path, "tiny", "--reasoning-parser", "deepseek_r1") as url:
        yield url


@pytest.mark.slow
def test_the_official_client_talks_to_the_server(served: str, policy_path: Path) -> None:
    client = OpenAI(base_url=served, api_key=KEY)
    (model,) = client.models.list().data
    assert (model.id, getattr(model, "max_model_len", None)) == ("tiny", 512)
    chat = [{"role": "user", "content": "What is 2+2?"}]
    answer = client.chat.completions.create(model="tiny", messages=chat, temperature=0, max_tokens=12)  # type: ignore[arg-type]
    message = answer.choices[0].message
    from posttrain.model.load import load_tokenizer

    prompt = load_tokenizer(str(policy_path)).apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    raw = client.completions.create(model="tiny", prompt=list(prompt), temperature=0, max_tokens=12)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    said = (getattr(message, "reasoning", None) or "") + (message.content or "")
    assert said and said == re.sub("</?think>", "", raw.choices[0].text)
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=served, api_key="wrong", max_retries=0).models.list()
    # What docs/serve.md shows, as it stands there.
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    environment = {**os.environ, "OPENAI_BASE_URL": served, "OPENAI_API_KEY": KEY}
    done = subprocess.run([sys.executable, "-c", snippet], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("talking to tiny\n"), done
    assert len(done.stdout.splitlines()) > 1
