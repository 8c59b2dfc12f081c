"""Serve a checkpoint: vLLM's OpenAI-compatible server with the flags that this policy needs.

    python -m posttrain.serve CHECKPOINT [--port N] [--speculative] [--print] [-- more flags of vLLM]

It listens to this machine alone, and asks for the key in VLLM_API_KEY; without one a new key is made and printed. The server
takes this process's place, so signals reach it directly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.quantized import is_fp8
from posttrain.sampler import engine_environment
from posttrain.watch import is_loopback

PORT = 8000
KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own: on its command line every user of the machine could read the key
SHORTEST_KEY = 16
SERVER = "vllm.entrypoints.openai.api_server"  # the command `vllm` does not start with the CPU distribution
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the flags depend on beside the checkpoint."""

    has_gpu: bool
    has_fp8: bool  # vLLM has kernels for block-scaled FP8 here
    num_cpus: int


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What is served, and where."""

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = PORT
    name: str | None = None
    speculative: bool = False
    chat_template: str | None = None
    reasoning_parser: str | None = None  # None decides by the template, "none" does without
    dtype: str | None = None
    max_model_len: int | None = None
    more: tuple[str, ...] = ()  # flags passed on to vLLM


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 after --print, and 2 for what cannot be served; otherwise it becomes the server."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    more: list[str] = []
    if "--" in arguments:
        arguments, more = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parsed = _parser().parse_args(arguments)
    options = ServeOptions(
        checkpoint=parsed.checkpoint.expanduser(),
        host=parsed.host,
        port=parsed.port,
        name=parsed.served_model_name,
        speculative=parsed.speculative,
        chat_template=parsed.chat_template,
        reasoning_parser=parsed.reasoning_parser,
        dtype=parsed.dtype,
        max_model_len=parsed.max_model_len,
        more=tuple(more),
    )
    try:
        machine = this_machine()
        given = os.environ.get(KEY_VARIABLE)
        require_key(options.host, given)
        words = [sys.executable, "-m", SERVER, *server_flags(options, machine)]
        if parsed.print:
            print(_printable(words, machine))
            return 0
        require_exact_speculation(options, machine)
        require_fp8_kernels(options.checkpoint, machine)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    key = given or f"sk-{secrets.token_urlsafe(24)}"
    print(f"serving {options.checkpoint} as {served_name(options)!r} at http://{options.host}:{options.port}/v1")
    print(f"key: {key}" if not given else f"key: the one in {KEY_VARIABLE}", flush=True)
    os.execve(words[0], words, {**server_environment(machine), **os.environ, KEY_VARIABLE: key})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.serve",
        usage="%(prog)s CHECKPOINT [options] [-- flags of vLLM's server]",
        description="serve a checkpoint with vLLM's OpenAI-compatible server",
    )
    parser.add_argument("checkpoint", type=Path, help="a directory, e.g. runs/x/checkpoints/latest")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="default %(default)s")
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call it (default: the run's name)")
    parser.add_argument("--speculative", action="store_true", help="draft with the multi-token prediction module")
    parser.add_argument("--chat-template", metavar="FILE", help="instead of the checkpoint's own")
    parser.add_argument("--reasoning-parser", metavar="NAME", help="of vLLM, or none (default: by the chat template)")
    parser.add_argument("--dtype", help="default: the checkpoint's, but bfloat16 for float32 on a GPU")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="default: what the policy was built for")
    parser.add_argument("--print", action="store_true", help="print the command that would run, and stop")
    return parser


# --- what is passed to vLLM -------------------------------------------------------------------------------------------


def server_flags(options: ServeOptions, machine: Machine) -> list[str]:
    """vLLM's flags for this policy on this machine. The key is not among them.

    Raises:
        ValueError: no checkpoint, no chat template, or no prediction module to draft with.
    """
    config = read_config(options.checkpoint)
    template = chat_template(options)
    flags = ["--model", str(options.checkpoint), "--served-model-name", served_name(options)]
    flags += ["--host", options.host, "--port", str(options.port)]
    flags += ["--dtype", options.dtype or default_dtype(config, machine)]
    if options.max_model_len is not None:
        flags += ["--max-model-len", str(options.max_model_len)]
    if options.chat_template is not None:
        flags += ["--chat-template", options.chat_template]
    parser = options.reasoning_parser or reasoning_parser(template)
    if parser != "none":
        flags += ["--reasoning-parser", parser]
    if options.speculative:
        from posttrain.model.mtp import require_mtp

        require_mtp(options.checkpoint)
        flags += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1})]
    if not machine.has_gpu:
        # vLLM's CPU kernel for interleaved rotary embedding computes wrong queries; its PyTorch code is right.
        flags += ["--enforce-eager", "--compilation-config", json.dumps({"custom_ops": ["none"]})]
    return [*flags, *options.more]


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint.

    Raises:
        ValueError: there is none.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} is no checkpoint: it has no config.json; give e.g. runs/<name>/checkpoints/latest"
        )
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def chat_template(options: ServeOptions) -> str:
    """The text of the template that chats are written with.

    Raises:
        ValueError: there is none.
    """
    if options.chat_template is not None:
        file = Path(options.chat_template)
        if not file.is_file():
            raise ValueError(f"--chat-template {options.chat_template}: there is no such file")
        return file.read_text(encoding="utf-8")
    if (options.checkpoint / TEMPLATE).is_file():
        return (options.checkpoint / TEMPLATE).read_text(encoding="utf-8")
    tokenizer = options.checkpoint / "tokenizer_config.json"
    found = json.loads(tokenizer.read_text()).get("chat_template") if tokenizer.is_file() else None
    if not found:
        raise ValueError(f"{options.checkpoint} has no chat template; give one with --chat-template FILE")
    return found if isinstance(found, str) else json.dumps(found)


def reasoning_parser(template: str) -> str:
    """vLLM's parser for what the policy writes after this template; "none" where it is not told to think.

    Templates like DeepSeek-V3.1's have a switch `thinking`, which that parser follows from request to request.
    """
    if "</think>" not in template:
        return "none"
    return "deepseek_v3" if re.search(r"\bthinking\b", template) else "deepseek_r1"


def served_name(options: ServeOptions) -> str:
    """What clients call the policy: the run's name, or the directory's."""
    if options.name is not None:
        return options.name
    path = options.checkpoint.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def default_dtype(config: Mapping[str, Any], machine: Machine) -> str:
    """The type of the weights, as they are: vLLM's `auto` would make float16 of float32."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return "bfloat16" if dtype == "float32" and machine.has_gpu else dtype


def server_environment(machine: Machine) -> dict[str, str]:
    """Environment variables for the server; what the user has set goes before them."""
    if machine.has_gpu:
        return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {**engine_environment(machine.num_cpus, 1), "VLLM_LOGGING_LEVEL": "INFO"}


def this_machine() -> Machine:
    """Looked at now."""
    import torch

    from posttrain.export_check import has_fp8_kernels

    return Machine(torch.cuda.is_available(), has_fp8_kernels(), len(os.sched_getaffinity(0)))


# --- what is refused --------------------------------------------------------------------------------------------------


def require_key(host: str, key: str | None) -> None:
    """Refuse an address that other machines reach without a key that the user has chosen.

    Raises:
        ValueError: no such key, or one that is easily guessed.
    """
    if key is not None and len(key) < SHORTEST_KEY:
        raise ValueError(f"{KEY_VARIABLE}: give a key of {SHORTEST_KEY} or more characters")
    if key is None and not is_loopback(host):
        raise ValueError(
            f"--host {host}: other machines reach this address; set {KEY_VARIABLE} to a key of your own, or leave --host out "
            f"and use an SSH tunnel"
        )


def require_exact_speculation(options: ServeOptions, machine: Machine) -> None:
    """Refuse to draft where vLLM would sample from a wrong distribution, see `posttrain.sampler.require_exact`.

    Raises:
        ValueError: drafting on a CPU.
    """
    if options.speculative and not machine.has_gpu:
        raise ValueError(
            "--speculative: on CPU vLLM verifies drafts at a wrong temperature, and a server cannot refuse its clients' "
            "temperature; leave it out"
        )


def require_fp8_kernels(checkpoint: Path, machine: Machine) -> None:
    """Refuse FP8 weights where vLLM cannot multiply them.

    Raises:
        ValueError: the checkpoint is FP8 and there are no kernels.
    """
    if is_fp8(checkpoint) and not machine.has_fp8:
        raise ValueError(
            f"{checkpoint} holds FP8 weights, for which vLLM needs a GPU or a CPU with AMX; convert it: python -m "
            f"posttrain.export {checkpoint} OUT --format bf16, and serve OUT"
        )


def _printable(words: Sequence[str], machine: Machine) -> str:
    """The command for a shell, with the environment that it needs."""
    environment = [f"{name}={shlex.quote(value)}" for name, value in server_environment(machine).items()]
    return " ".join([f"{KEY_VARIABLE}=...", *environment, shlex.join(["python", *words[1:]])])


if __name__ == "__main__":
    sys.exit(main())
