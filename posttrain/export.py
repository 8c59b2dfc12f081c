"""Write a checkpoint for serving: in DeepSeek-V3's FP8 layout, bfloat16 or float32, with a model card.

    python -m posttrain.export CHECKPOINT OUT [--format bf16|fp8|float32] [--merge-lora ADAPTER] [--drop-mtp] [--check]

Reads Hugging Face checkpoints of any size, DeepSeek-V3's own FP8 files among them, tensor by tensor: memory holds one file of
the output and one tensor. An export that was interrupted goes on with the files that it lacks when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli import QUIET
from posttrain.disk import write_atomically
from posttrain.errors import RunStopped

if TYPE_CHECKING:
    from posttrain.model.checkpoint_files import CheckpointFiles, TensorInfo
    from posttrain.model.conversion import Conversion, Format

FORMATS = ("bf16", "fp8", "float32")
RECORD = "export.json"
COMPANIONS = (  # what belongs to a model beside its weights and config.json
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "*.py",
    "LICENSE*",
)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported, and how."""

    source: Path
    out: Path
    target: Format = "bf16"
    adapter: Path | None = None
    drop_mtp: bool = False
    max_shard_bytes: int = 5 * 10**9


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written."""

    tensors: int
    files: int
    num_bytes: int
    seconds: float
    record: dict[str, Any]  # export.json


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0; 2 for what cannot be exported; 3 when the check failed."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.export", description="write a checkpoint for serving")
    parser.add_argument(
        "checkpoint", type=Path, help="a directory in Hugging Face format, e.g. runs/x/checkpoints/latest"
    )
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="number format (default %(default)s)")
    parser.add_argument(
        "--merge-lora", type=Path, metavar="ADAPTER", help="adapters in peft's format to add to the weights"
    )
    parser.add_argument("--drop-mtp", action="store_true", help="leave the multi-token prediction module out")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file, e.g. 500MB (default %(default)s)"
    )
    parser.add_argument(
        "--check", action="store_true", help="load what was written in transformers and vLLM and compare"
    )
    options = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of a checked engine, only what the check says matters
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        chosen = ExportOptions(
            options.checkpoint.expanduser().resolve(),
            options.out.expanduser().absolute(),
            options.format,
            options.merge_lora and options.merge_lora.expanduser().resolve(),
            options.drop_mtp,
            parse_size(options.max_shard_size),
        )
        result = export(chosen)
        print(_summary(chosen, result))
        if options.check:
            check_export(chosen, result.record)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def export(options: ExportOptions) -> ExportResult:
    """Convert, file by file.

    Raises:
        ValueError: the source cannot be read or converted, `out` is in use, or the disk is too small.
    """
    from posttrain.model.checkpoint_files import CheckpointFiles, shard, shard_name, write_index
    from posttrain.model.conversion import Conversion

    start = time.perf_counter()
    if not options.source.is_dir():
        raise ValueError(f"{options.source} is no directory; give a checkpoint on this machine")
    if options.out.exists():
        raise ValueError(f"{options.out} exists; give a new directory, or delete it")
    files = CheckpointFiles(options.source)
    conversion = Conversion(files, options.target, drop_mtp=options.drop_mtp, deltas=_deltas(options))
    written = list(conversion.plan())
    shards = shard(written, options.max_shard_bytes)
    record = _record(options, conversion, written)
    partial = _partial_directory(options.out, record)
    _require_space(partial, sum(info.num_bytes for infos in written for info in infos))
    for number, groups in enumerate(shards):
        path = partial / shard_name(number, len(shards))
        if not path.exists():
            _write(path, conversion, groups)
    write_index(partial, shards)
    write_atomically(partial / "config.json", json.dumps(conversion.config(), indent=2) + "\n")
    for file in companions(options.source):
        shutil.copy2(file, partial / file.name)
    seconds = time.perf_counter() - start
    _write_card(options, partial, record)
    partial.rename(options.out)
    sizes = [path.stat().st_size for path in options.out.glob("*.safetensors")]
    return ExportResult(record["tensors"], len(sizes), sum(sizes), seconds, record)


def _write(path: Path, conversion: Conversion, groups: Sequence[Sequence[TensorInfo]]) -> None:
    """Convert the tensors of one file, and write it."""
    import torch

    from posttrain.model.checkpoint_files import write_shard

    # Room for all of them first: between them, what is read and freed again would leave holes that add up to another file.
    tensors = {info.name: torch.empty(info.shape, dtype=info.dtype) for group in groups for info in group}
    for group in groups:
        for name, tensor in conversion.convert(conversion.files.tensors[group[0].name]).items():
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name
            tensors[name].copy_(tensor)
    write_shard(path, tensors)


def check_export(options: ExportOptions, record: dict[str, Any]) -> None:
    """Load what was written in transformers and vLLM, compare, and put the result into export.json and the card.

    Raises:
        RunStopped: they do not agree.
    """
    from posttrain.export_check import check_checkpoint

    source = options.source if options.adapter is None else None
    found = check_checkpoint(options.out, options.target, source)
    record["check"] = found.as_json()
    _write_card(options, options.out, record)
    print(found)
    if not found.passed:
        raise RunStopped(f"{options.out} was written, but the check failed; do not serve it")


def companions(directory: Path) -> list[Path]:
    """The files of a checkpoint that go along: tokenizer, chat template, generation config, its own code, licence."""
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    return sorted(found)


def parse_size(text: str) -> int:
    """Bytes of e.g. "5GB", "500MB", "200KB".

    Raises:
        ValueError: not of that form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if not size:
        raise ValueError(f"--max-shard-size {text!r}: write a number and KB, MB or GB, e.g. 5GB")
    return size


# --- parts ------------------------------------------------------------------------------------------------------------


def _deltas(options: ExportOptions) -> Any:
    if options.adapter is None:
        return None
    from posttrain.model.adapter_deltas import AdapterDeltas

    return AdapterDeltas(options.adapter, options.source)


def _record(options: ExportOptions, conversion: Conversion, written: Sequence[Sequence[TensorInfo]]) -> dict[str, Any]:
    """What is exported from what; two exports with the same record write the same files."""
    files: CheckpointFiles = conversion.files
    stats = [path.stat() for path in sorted(options.source.glob("*.safetensors"))]
    adapter = options.adapter and sorted(options.adapter.glob("adapter_model*"))
    return {
        "source": str(options.source),
        "source_files": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
        "source_format": "fp8" if conversion.is_fp8 else _common_type(files),
        "format": options.target,
        "adapter": options.adapter and str(options.adapter),
        "adapter_files": [[path.stat().st_size, path.stat().st_mtime_ns] for path in adapter or ()],
        "mtp": conversion.has_mtp and not options.drop_mtp,
        "max_shard_bytes": options.max_shard_bytes,
        "tensors": sum(len(infos) for infos in written),
        "parameters": sum(_count(infos[0]) for infos in written),
    }


def _common_type(files: CheckpointFiles) -> str:
    sizes: dict[str, int] = {}
    for info in files.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + info.num_bytes
    return max(sizes, key=lambda name: sizes[name])


def _count(info: TensorInfo) -> int:
    return info.num_bytes // info.dtype.itemsize


def _partial_directory(out: Path, record: dict[str, Any]) -> Path:
    """Where the files are written until all are there. What an export with the same record left is kept, other is not."""
    partial = out.with_name(out.name + ".partial")
    before = partial / RECORD
    if partial.exists() and not (before.exists() and json.loads(before.read_text()) == json.loads(json.dumps(record))):
        if not before.exists() and any(partial.iterdir()):
            raise ValueError(f"{partial} is not of an export; delete it, or give another directory")
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(before, json.dumps(record, indent=2) + "\n")
    return partial


def _require_space(partial: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    free = shutil.disk_usage(partial).free
    if needed - there > free:
        raise ValueError(
            f"{partial.parent} has {free / 1e9:.1f} GB free and the export needs {(needed - there) / 1e9:.1f} GB more; make "
            f"room, or give another place"
        )


def _write_card(options: ExportOptions, directory: Path, record: dict[str, Any]) -> None:
    from posttrain.model_card import model_card, short_name

    # Both may be published: they say which checkpoint, not where on this machine.
    public = {key: value for key, value in record.items() if not key.endswith("_files")}
    for key in ("source", "adapter"):
        public[key] = public[key] and short_name(Path(public[key]))
    write_atomically(directory / RECORD, json.dumps(public, indent=2) + "\n")
    write_atomically(directory / "README.md", model_card(options.source, options.out.name, public))


def _summary(options: ExportOptions, result: ExportResult) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"{options.out}: {result.record['parameters']:,} parameters as {options.target} ({result.record['source_format']} "
        f"before), {result.tensors} tensors in {result.files} files, {result.num_bytes / 1e6:,.1f} MB, "
        f"{result.seconds:.1f} s; peak memory of the process {peak / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
