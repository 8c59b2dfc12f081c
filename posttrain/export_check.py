"""Does an exported checkpoint load, and do transformers and vLLM say the same with it?

Both score the same sequences and continue them greedily. On a CPU both compute in float32, whatever the weights are stored in,
so that what is compared is how the files are read and not how engines round. FP8 files are loaded by vLLM where it has kernels
for them, on GPUs and on CPUs with AMX. Elsewhere, and always in transformers, their values are checked instead: dequantized by
this project, written as float32 and loaded in both. (What transformers 5.19 does with FP8: `posttrain.model.load`.)

Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.quantized import is_fp8

NUM_SEQUENCES = 4
LENGTH = 24  # tokens of a sequence, less where the model is shorter
CONTINUED = 16  # tokens of the greedy continuation
# Largest difference of a logprob between the engines. float32 is what adding in another order makes of it; the others are
# limits for a GPU, where nothing has been measured: bfloat16 sums, and FP8 with activations rounded as well.
LIMITS = {"float32": 1e-3, "bfloat16": 0.5, "fp8": 1.0}


@dataclass(frozen=True, slots=True)
class Scores:
    """What an engine says of the sequences."""

    logprobs: list[list[float]]  # of each token but the first
    greedy: list[list[int]]  # continuations
    margins: list[list[float]]  # by how much each token of those was ahead; empty where it is not known


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was loaded where, and what came of it."""

    loaded: str  # what the engines loaded, in words
    compute: str  # "float32", "bfloat16" or "fp8"
    gap_max: float  # nats, transformers against vLLM
    limit: float
    tokens: int
    same_greedy: int  # continuations that are equal, near ties aside
    continuations: int
    drift_mean: float | None  # nats, against the checkpoint that was exported; None where that was not loaded
    drift_max: float | None

    @property
    def passed(self) -> bool:
        return self.gap_max <= self.limit and (self.compute != "float32" or self.same_greedy == self.continuations)

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"passed": self.passed}

    def __str__(self) -> str:
        lines = [
            f"check: {'passed' if self.passed else 'FAILED'}; {self.loaded}",
            f"  transformers against vLLM ({self.compute}): logprobs of {self.tokens} tokens within {self.gap_max:.1e} (limit "
            f"{self.limit:g}), greedy continuations {self.same_greedy} of {self.continuations} equal",
        ]
        if self.drift_mean is not None and self.drift_max is not None:
            lines.append(
                f"  against the checkpoint it came from: logprobs differ by {self.drift_mean:.1e} on average, "
                f"{self.drift_max:.1e} at most"
            )
        return "\n".join(lines)


def check_checkpoint(directory: Path, target: str, source: Path | None) -> CheckReport:
    """Load a checkpoint in transformers, then in vLLM in this process, and compare.

    Args:
        directory: the exported checkpoint.
        target: its number format: bf16, fp8 or float32.
        source: what it was exported from, to say how far the two are apart; None compares nothing. One in FP8 is not loaded.

    Raises:
        RunStopped: an engine does not load it.
    """
    with tempfile.TemporaryDirectory(prefix="export-check-", dir=directory.parent) as scratch:
        plain, engine_path, compute, loaded = _what_to_load(directory, target, Path(scratch))
        dtype = "float32" if compute == "float32" else "bfloat16"
        sequences = probe(plain)
        ours = transformers_scores(plain, sequences, dtype)
        drift = None
        if source is not None and not is_fp8(source):
            drift = _gaps(transformers_scores(source, sequences, dtype, continued=0), ours)
        theirs = vllm_scores(engine_path, sequences, dtype)
    gaps = _gaps(ours, theirs)
    limit = LIMITS[compute]
    same = sum(_same(*rows, limit) for rows in zip(ours.greedy, theirs.greedy, ours.margins, strict=True))
    return CheckReport(
        loaded=loaded,
        compute=compute,
        gap_max=max(gaps),
        limit=limit,
        tokens=len(gaps),
        same_greedy=same,
        continuations=len(sequences),
        drift_mean=sum(drift) / len(drift) if drift else None,
        drift_max=max(drift) if drift else None,
    )


def has_fp8_kernels() -> bool:
    """Whether vLLM multiplies block-scaled FP8 weights on this machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported())


def _what_to_load(directory: Path, target: str, scratch: Path) -> tuple[Path, Path, str, str]:
    """For transformers, for vLLM, what is computed in, and that in words."""
    import torch

    compute = "bfloat16" if torch.cuda.is_available() else "float32"
    if target != "fp8":
        return directory, directory, compute, f"transformers and vLLM loaded it ({target} weights)"
    from posttrain.export import ExportOptions, export

    twin = scratch / "dequantized"
    export(ExportOptions(directory, twin, "float32"))
    if has_fp8_kernels():
        return twin, directory, "fp8", "vLLM loaded the FP8 files, transformers their values, dequantized to float32"
    return (
        twin,
        twin,
        compute,
        "vLLM has no FP8 kernels here (it needs a GPU, or a CPU with AMX), so transformers and vLLM loaded the values of the "
        "FP8 files, dequantized to float32; the FP8 files themselves were loaded by neither",
    )


def probe(directory: Path) -> list[list[int]]:
    """Sequences to score: a question in the checkpoint's chat template, where it has one, and random tokens."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(directory)
    length = min(LENGTH, config.max_position_embeddings - CONTINUED - 1)
    rng = random.Random(0)
    found = [[rng.randrange(config.vocab_size) for _ in range(length)] for _ in range(NUM_SEQUENCES)]
    if any(directory.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": "How many letters are in the word strawberry?"}]
            found[0] = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    return [sequence for sequence in found if 1 < len(sequence) <= config.max_position_embeddings - CONTINUED - 1]


def transformers_scores(
    directory: Path, sequences: Sequence[Sequence[int]], dtype: str, continued: int = CONTINUED
) -> Scores:
    """What transformers says."""
    import torch

    from posttrain.errors import RunStopped
    from posttrain.model.load import load_policy

    try:
        model = load_policy(
            str(directory),
            dtype=dtype,
            attn_implementation="sdpa",
            experts_implementation="eager",
            trust_remote_code=False,
        )
    except Exception as error:  # whatever the library finds wrong with the files
        raise RunStopped(f"transformers does not load {directory}: {error}") from error
    if torch.cuda.is_available():
        model = model.cuda()
    found = Scores([], [], [])
    for sequence in sequences:
        ids_T = torch.tensor(sequence, device=model.device)
        with torch.inference_mode():
            logprobs_TV = torch.log_softmax(model(ids_T[None], use_cache=False).logits[0].float(), dim=-1)
            found.logprobs.append(logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0].tolist())
            if continued:
                tokens, margins = _continue(model, list(sequence), continued)
                found.greedy.append(tokens)
                found.margins.append(margins)
    del model
    gc.collect()
    return found


def _continue(model: Any, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The greedy continuation up to an end token, and how far each token was ahead of the second."""
    import torch

    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    tokens: list[int] = []
    margins: list[float] = []
    while len(tokens) < count and not (tokens and tokens[-1] in stops):
        logits_V = model(torch.tensor([ids + tokens], device=model.device), use_cache=False).logits[0, -1].float()
        best = logits_V.topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return tokens, margins


def vllm_scores(directory: Path, sequences: Sequence[Sequence[int]], dtype: str) -> Scores:
    """What vLLM says, in an engine of this process."""
    from posttrain.errors import RunStopped
    from posttrain.sampler import Sampler, engine_environment
    from posttrain.types import Prompt, SamplingParams

    os.environ.update(engine_environment(len(os.sched_getaffinity(0)), 1))
    try:
        sampler = Sampler(
            str(directory),
            dtype=dtype,
            max_model_len=max(map(len, sequences)) + CONTINUED + 2,
            max_num_seqs=len(sequences),
            gpu_memory_utilization=0.9,
            trust_remote_code=False,
            seed=0,
        )
    except Exception as error:  # whatever the engine finds wrong with the files
        raise RunStopped(f"vLLM does not load {directory}: {error}") from error
    prompts = [Prompt(str(number), (), tuple(sequence)) for number, sequence in enumerate(sequences)]
    answers = sampler.generate(prompts, SamplingParams(CONTINUED, temperature=0.0))
    return Scores(
        logprobs=[logprobs for logprobs, _ in sampler.prompt_logprobs(sequences)],
        greedy=[list(group[0].token_ids) for group in answers],
        margins=[],
    )


def _gaps(first: Scores, second: Scores) -> list[float]:
    return [
        abs(a - b)
        for ours, theirs in zip(first.logprobs, second.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]


def _same(ours: Sequence[int], theirs: Sequence[int], margins: Sequence[float], limit: float) -> bool:
    """Equal, or different from a token on where the two best were as near as the engines are."""
    for position, pair in enumerate(zip(ours, theirs, strict=False)):
        if pair[0] != pair[1]:
            return margins[position] <= 2 * limit
    return len(ours) == len(theirs)
