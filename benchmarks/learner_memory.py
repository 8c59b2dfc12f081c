"""Peak memory and seconds of a forward and backward pass over packed samples: all logits, or a chunk of them at a time.

    python benchmarks/learner_memory.py [--tokens 4096] [--vocabulary 129280] [--trained 0.5]

The trunk is a tiny DeepSeek-V3, so that what is seen is the head: the vocabulary is that of the real one. Each way runs in a
process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

CHUNKS = {"whole": None, "chunked": 256}


def measure(name: str, tokens: int, vocabulary: int, trained: float) -> dict[str, float]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from posttrain.conformance import POLICY
    from posttrain.model.token_scorer import TokenScorer

    torch.manual_seed(0)
    settings = {**POLICY.model_dump(), "max_position_embeddings": tokens, "num_key_value_heads": 2}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, vocab_size=vocabulary, tie_word_embeddings=False))
    ids_RW = torch.randint(0, vocabulary, (8, tokens // 8))
    positions_RW = torch.arange(tokens // 8).expand_as(ids_RW)
    mask_RW = positions_RW >= (1 - trained) * (tokens // 8)
    scorer = TokenScorer(model, CHUNKS[name])
    for parameter in model.parameters():  # the gradients are there in both ways
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    logprobs_RW, _ = scorer(ids_RW, positions_RW, mask_RW, 1.0)
    (logprobs_RW * mask_RW).sum().backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gib": (peak - before) / 2**20, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=129280)
    parser.add_argument("--trained", type=float, default=0.5, help="share of the tokens")
    parser.add_argument("--run", choices=list(CHUNKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options.tokens, options.vocabulary, options.trained)))
        return 0
    found = {}
    for name in CHUNKS:
        words = [sys.executable, "-P", __file__, "--run", name, "--tokens", str(options.tokens)]
        words += ["--vocabulary", str(options.vocabulary), "--trained", str(options.trained)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
