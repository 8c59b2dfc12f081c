"""Evaluate a checkpoint on vLLM workers of its own."""

from __future__ import annotations

from pathlib import Path

from eval.suite import EvalResult, eval_prompts, evaluate
from posttrain.episodes import episodes
from posttrain.recipe import EvalSection, ModelSection, SamplerSection


def evaluate_checkpoint(model: ModelSection, section: EvalSection, sampler: SamplerSection) -> EvalResult:
    """Start vLLM workers on a checkpoint, evaluate, stop them."""
    from posttrain.cluster import SamplerPool, session
    from posttrain.model.load import load_tokenizer

    path = str(model.model_name_or_path)
    if Path(path).exists():
        path = str(Path(path).resolve())  # the workers have another working directory
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    prompts = eval_prompts(section, tokenizer)
    with session(None, sampler.num_workers * sampler.num_cpus):
        samplers = SamplerPool(model.model_copy(update={"model_name_or_path": path}), sampler, section.seed)
        samplers.wait_until_ready()
        with episodes(section.environment, samplers.generate, tokenizer, sampler.max_model_len) as generate:
            return evaluate(section, prompts, generate)
