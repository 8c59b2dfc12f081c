"""Evaluate a checkpoint on vLLM workers of its own."""

from __future__ import annotations

from contextlib import ExitStack

from eval.samplers import absolute, checkpoint_workers
from eval.suite import EvalResult, eval_prompts, evaluate
from posttrain.episodes import episodes
from posttrain.recipe import EvalSection, ModelSection, SamplerSection


def evaluate_checkpoint(model: ModelSection, section: EvalSection, sampler: SamplerSection) -> EvalResult:
    """Start vLLM workers on a checkpoint, evaluate, stop them."""
    from posttrain.model.load import load_tokenizer

    path = str(absolute(model).model_name_or_path)
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    prompts = eval_prompts(section, tokenizer)
    with ExitStack() as stack:
        workers = stack.enter_context(checkpoint_workers(model, sampler, section.seed))
        play = episodes(section.environment, workers.generate, tokenizer, sampler.max_model_len)
        return evaluate(section, prompts, stack.enter_context(play))
