"""GRPO the slow way: one sample at a time, one token at a time; and TRL's GRPOTrainer as a second opinion.

Shares no code with `posttrain.losses` or `posttrain.packing`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from posttrain.types import Sample

VOCAB_SIZE = 40


def tiny_policy(seed: int = 0) -> DeepseekV3ForCausalLM:
    """DeepSeek-V3 with every part (MLA, dense and MoE layer, groups) at 32 hidden units, decided about its tokens."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # the default leaves all tokens about equally likely, which hides mistakes
    )
    return DeepseekV3ForCausalLM(config)


def random_samples(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Sample]:
    """Samples of (prompt, completion) lengths with random tokens, advantages and logprobs."""
    rng = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, VOCAB_SIZE) for _ in range(n))

    def logprobs(n: int) -> tuple[float, ...]:
        return tuple(-rng.expovariate(0.3) for _ in range(n))

    return [
        Sample(
            tokens(prompt), tokens(n), logprobs(n), rng.gauss(0, 1), old_logprobs=logprobs(n), ref_logprobs=logprobs(n)
        )
        for prompt, n in lengths
    ]


def completion_logprobs(model: Any, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """[T_completion] of one sample, in a forward pass of its own."""
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    log_probabilities = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0] / temperature, dim=-1)
    first = len(sample.prompt_ids)
    return torch.stack([log_probabilities[t - 1, ids[0, t]] for t in range(first, ids.shape[1])])


def grpo_loss(
    samples: Sequence[Sample],
    logprobs: Sequence[torch.Tensor],
    *,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    aggregation: str,
) -> torch.Tensor:
    """The loss as the papers write it: a mean of means ("sequence", DeepSeekMath) or of tokens ("token", DAPO)."""
    total = torch.zeros(())
    num_tokens = sum(len(sample.completion_ids) for sample in samples)
    for sample, values in zip(samples, logprobs, strict=True):
        assert sample.old_logprobs is not None and sample.ref_logprobs is not None
        for value, old, ref in zip(values, sample.old_logprobs, sample.ref_logprobs, strict=True):
            ratio = torch.exp(value - old)
            # min(ratio A, clip(ratio) A), by the sign of A: only the bound that holds the policy back is active.
            if sample.advantage >= 0:
                bounded = ratio if ratio < 1 + epsilon_high else torch.tensor(1 + epsilon_high)
            else:
                bounded = ratio if ratio > 1 - epsilon_low else torch.tensor(1 - epsilon_low)
            ref_over_policy = torch.exp(torch.tensor(ref) - value)
            kl = ref_over_policy - torch.log(ref_over_policy) - 1
            token_loss = -bounded * sample.advantage + beta * kl
            share = 1 / num_tokens if aggregation == "token" else 1 / (len(samples) * len(values))
            total = total + share * token_loss
    return total


def trl_trainer(model_path: Path, directory: Path, reward: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """A GRPOTrainer of TRL on the model saved at `model_path`, ready to have its loss called."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"t{i}": i for i in range(4, VOCAB_SIZE)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    size = settings.get("num_generations", 2)
    config = GRPOConfig(
        output_dir=str(directory),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=1,
        **{"per_device_train_batch_size": size, "num_generations": size, **settings},
    )
    trainer: Any = GRPOTrainer(
        model=DeepseekV3ForCausalLM.from_pretrained(model_path),
        reward_funcs=reward or (lambda completions, **_: [0.0] * len(completions)),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["t4 t5"] * size}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # otherwise set by train()
    trainer.model.train()
    return trainer


def trl_inputs(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What TRL feeds its loss: prompts padded on the left, completions on the right."""
    prompt_width = max(len(sample.prompt_ids) for sample in samples)
    completion_width = max(len(sample.completion_ids) for sample in samples)

    def left(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[0] * (prompt_width - len(row)) + list(row) for row in rows])

    def right(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([list(row) + [0] * (completion_width - len(row)) for row in rows])

    mask = right([[1] * len(sample.completion_ids) for sample in samples])
    return {
        "prompt_ids": left([sample.prompt_ids for sample in samples]),
        "prompt_mask": left([[1] * len(sample.prompt_ids) for sample in samples]),
        "completion_ids": right([sample.completion_ids for sample in samples]),
        "completion_mask": mask,
        "advantages": torch.tensor([sample.advantage for sample in samples]),
        "old_per_token_logps": right([sample.old_logprobs or () for sample in samples]),
        "ref_per_token_logps": right([sample.ref_logprobs or () for sample in samples]),
        "num_items_in_batch": mask.sum(),
    }
