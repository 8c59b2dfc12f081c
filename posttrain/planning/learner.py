"""Memory and time of one rank of a model in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.architectures import Architecture
from posttrain.planning.activations import kept_by, layers_of
from posttrain.planning.hardware import Hardware
from posttrain.planning.quantities import Quantity, count
from posttrain.planning.quantities import size as size_of
from posttrain.planning.work import Product, expert_parameters, flops, forward_products, key_dim, layer_parameters

_LOGITS_COPIES = 3  # logits, their softmax, their gradient


@dataclass(frozen=True, slots=True)
class Training:
    """How a model is trained on one rank, whatever the stage.

    Attributes:
        shape: of the model.
        dtype: of the products: float32 or bfloat16 (then weights stay in float32, and copies are cast).
        ranks: of the group.
        sharded: weights, gradients and optimizer state are spread over the ranks.
        context_parallel: ranks that share each row.
        expert_parallel: ranks over which a layer's experts are divided; tokens travel to them. Needs `sharded`.
        rows, width: of a microbatch: R rows of W tokens.
        trained_share: of the tokens, those that the loss is taken on.
        checkpointing: layers are computed again in the backward pass.
        logits_chunk: positions whose logits are in memory together; None is all.
        frozen: models of the same shape that only score beside the policy.
        offload_optimizer, offload_frozen: kept in main memory but while used.
        optimizer_bytes: of its state, for a trained parameter.
        trained: parameters that are trained; None is all.
        scores: attention scores are materialised (no kernel that avoids it).
        accumulates: a second microbatch comes while the gradients of the first are there.
    """

    shape: Architecture
    dtype: str
    ranks: int
    sharded: bool
    rows: int
    width: int
    trained_share: float = 1.0
    checkpointing: bool = False
    logits_chunk: int | None = None
    frozen: int = 0
    offload_optimizer: bool = False
    offload_frozen: bool = False
    optimizer_bytes: int = 8
    trained: int | None = None
    scores: bool = False
    accumulates: bool = True
    expert_parallel: int = 1
    context_parallel: int = 1

    @property
    def expert_groups(self) -> int:
        """Groups of ranks that each hold all experts; over these, FSDP2 spreads an expert."""
        return self.ranks // self.expert_parallel

    @property
    def tokens(self) -> int:
        """Of a microbatch, padding included, that the rank computes."""
        return self.rows * self.width // self.context_parallel

    @property
    def share(self) -> int:
        """Ranks that the weights are spread over."""
        return self.ranks if self.sharded else 1

    @property
    def width_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def trained_parameters(self) -> int:
        return self.shape.parameters if self.trained is None else self.trained

    def products(self) -> list[Product]:
        """Of one forward pass over a microbatch: of each row, the rank has a part of the tokens or of the heads."""
        rows = self.rows / self.context_parallel
        return forward_products(self.shape, rows, self.width, round(self.tokens * self.trained_share))


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(training: Training, hardware: Hardware) -> list[Quantity]:
    """Bytes of one rank at its fullest: a backward pass after the first step, before anything is let go."""
    passing = _passing(training)
    held = [*states(training), *passing, _gaps(passing, hardware), _runtime(hardware)]
    return held if hardware.calibration is None else [*held, _mapped(training)]


def states(training: Training) -> list[Quantity]:
    """What is there between the steps too."""
    parameters, share = training.shape.parameters, training.share
    spread = f" / {share} ranks" if share > 1 else ""
    found = [
        Quantity(
            "weights", parameters * 4 / share, "bytes", f"{count(parameters)} parameters x 4{spread}",
            "float32 whatever model.dtype: posttrain/learner_model.py",
        ),
        Quantity(
            "gradients", training.trained_parameters * 4 / share, "bytes",
            f"{count(training.trained_parameters)} trained x 4{spread}", "float32",
        ),
    ]  # fmt: skip
    if training.optimizer_bytes and not training.offload_optimizer:
        found.append(
            Quantity(
                "optimizer", training.trained_parameters * training.optimizer_bytes / share, "bytes",
                f"{count(training.trained_parameters)} trained x {training.optimizer_bytes}{spread}",
                "AdamW's two moments in float32",
            )
        )  # fmt: skip
    if training.frozen and not training.offload_frozen:
        found.append(
            Quantity(
                "reference, teacher", training.frozen * parameters * 4 / share, "bytes",
                f"{training.frozen} x {count(parameters)} parameters x 4{spread}", "algorithm.beta, teacher",
            )
        )  # fmt: skip
    return found


def _passing(training: Training) -> list[Quantity]:
    """What a forward and backward pass needs on top."""
    shape = training.shape
    dense, sparse = layers_of(shape)
    kept = {
        is_sparse: kept_by(shape, sparse=is_sparse).bytes_per_token(
            training.width, training.width_bytes, with_scores=training.scores
        )
        for is_sparse in (False, True)
    }
    each = {name: value * training.tokens for name, value in kept.items()}
    stream = shape.hidden_size * 4 * training.tokens
    found = []
    if training.checkpointing:
        worst = max(each[is_sparse] for is_sparse, number in ((False, dense), (True, sparse)) if number)
        found.append(
            Quantity(
                "activations", shape.num_hidden_layers * stream + worst, "bytes",
                f"{training.tokens:,} tokens x ({shape.num_hidden_layers} layers x {shape.hidden_size} x 4 + one layer "
                f"computed again: {worst / training.tokens:,.0f})",
                "posttrain/planning/activations.py; gradient_checkpointing",
            )
        )  # fmt: skip
    else:
        total = dense * each[False] + sparse * each[True]
        found.append(
            Quantity(
                "activations", total, "bytes",
                f"{training.tokens:,} tokens x ({dense} dense layers x {kept[False]:,.0f} + {sparse} sparse layers x "
                f"{kept[True]:,.0f})",
                "posttrain/planning/activations.py",
            )
        )  # fmt: skip
    found += [_logits(training), _passing_gradients(training, sparse)]
    found.append(
        Quantity(
            "attention mask", training.rows * training.width**2 * (1 + training.width_bytes), "bytes",
            f"{training.rows} rows x {training.width:,}^2 x (1 + {training.width_bytes})",
            "transformers' mask for packed rows, bool and as numbers",
        )
    )  # fmt: skip
    if training.sharded:
        found += _gathered(training)
    elif training.dtype == "bfloat16":
        found.append(_casts(training))
    return found


def _logits(training: Training) -> Quantity:
    shape = training.shape
    trained = max(1, round(training.tokens * training.trained_share))
    positions = training.tokens if training.logits_chunk is None else min(training.logits_chunk, trained)
    return Quantity(
        "logits", positions * shape.vocab_size * 4 * _LOGITS_COPIES, "bytes",
        f"{positions:,} positions x {shape.vocab_size:,} x 4 x {_LOGITS_COPIES} copies",
        "learner.logits_chunk; losses.py",
    )  # fmt: skip


def _passing_gradients(training: Training, sparse: int) -> Quantity:
    """Gradients that one layer's backward pass holds: of its widest activations, and of its largest weights before they are
    added to those that are there.
    """
    shape = training.shape
    wide = 2 * shape.num_attention_heads * training.width * 4 if training.scores else 0
    if sparse:
        expert = shape.num_experts_per_tok * (shape.hidden_size + 3 * shape.moe_intermediate_size)
    else:
        expert = 3 * shape.intermediate_size
    wide = max(wide, expert * training.width_bytes) * training.tokens
    largest = shape.hidden_size * (
        2 * shape.moe_intermediate_size * shape.num_experts
        if sparse
        else max(shape.intermediate_size, shape.vocab_size)
    )
    # Spread weights: their gradients are counted among the gathered layers.
    weights = largest * 4 if training.accumulates and training.trained is None and not training.sharded else 0
    return Quantity(
        "gradients in passing", wide + weights, "bytes",
        f"widest activations {wide / training.tokens:,.0f} x {training.tokens:,} tokens"
        + (f" + largest weight {count(largest)} x 4" if weights else ""),
        "one layer at a time",
    )  # fmt: skip


def _gathered(training: Training) -> list[Quantity]:
    """FSDP2: whole layers while they compute, and what stays gathered."""
    shape, groups = training.shape, training.expert_groups
    experts = expert_parameters(shape) // max(1, layers_of(shape)[1])
    others, own = layer_parameters(shape) - experts, experts // training.expert_parallel
    # Where each rank has experts of its own, they are there already.
    gathered = others + (own if groups > 1 else 0)
    ends = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    divided = f", {count(own)} of {count(experts)} in its experts" if training.expert_parallel > 1 else ""
    found = [
        Quantity(
            "gathered layers", (2 * gathered + others + own) * 4, "bytes",
            f"(2 x {count(gathered)} parameters of the largest layer, this one and the next one, + {count(others + own)} "
            f"gradients of this one) x 4{divided}",
            "FSDP2 gathers and prefetches whole layers: posttrain/learner_parallel.py",
        ),
        Quantity(
            "gathered embedding and head", ends * 4, "bytes", f"{count(ends)} parameters x 4",
            "stay gathered through the backward pass: posttrain/learner_parallel.py",
        ),
    ]  # fmt: skip
    if training.expert_parallel > 1:
        rows = training.tokens * shape.num_experts_per_tok
        found.append(
            Quantity(
                "tokens on their way", 4 * rows * shape.hidden_size * training.width_bytes, "bytes",
                f"{rows:,} pairs of token and expert x {shape.hidden_size} x {training.width_bytes} x 4 (sent, arrived, "
                f"computed, back)",
                "posttrain/expert_parallel.py, with even routing",
            )
        )  # fmt: skip
    return [*found, _casts(training)] if training.dtype == "bfloat16" else found


def _casts(training: Training) -> Quantity:
    """Weights that autocast has cast are kept for the backward pass, with checkpointing those of one layer."""
    shape, elsewhere = training.shape, 1 - 1 / training.expert_parallel
    sparse = max(1, layers_of(shape)[1])
    number = round(
        layer_parameters(shape) - elsewhere * expert_parameters(shape) / sparse
        if training.checkpointing
        else shape.parameters - elsewhere * expert_parameters(shape)
    )
    return Quantity(
        "weights cast to bfloat16", number * 2, "bytes",
        f"{count(number)} parameters x 2" + ("" if training.checkpointing else ", kept for the backward pass"),
        "autocast; with gradient_checkpointing those of one layer",
    )  # fmt: skip


def _gaps(passing: Sequence[Quantity], hardware: Hardware) -> Quantity:
    """What the allocator cannot use again between blocks that stay."""
    freed = sum(part.value for part in passing if part.name in ("activations", "gradients in passing"))
    return Quantity(
        "allocator gaps", hardware.allocator_gaps * freed, "bytes",
        f"{hardware.allocator_gaps:g} x activations and gradients in passing", hardware.source("allocator_gaps"),
    )  # fmt: skip


def _mapped(training: Training) -> Quantity:
    """On a CPU: pages of checkpoint files that stay mapped after loading, and count as memory of the process."""
    models, parameters = 1 + training.frozen, training.shape.parameters
    return Quantity(
        "checkpoint files, mapped", models * parameters * 4.0, "bytes",
        f"{models} model(s) x {count(parameters)} parameters x 4",
        "safetensors maps files; some weights stay where they are, and their file with them",
    )  # fmt: skip


def _runtime(hardware: Hardware) -> Quantity:
    return Quantity(
        "runtime", hardware.runtime_gb * 1e9, "bytes", f"{hardware.runtime_gb:g} GB", hardware.source("runtime_gb")
    )


# --- time -------------------------------------------------------------------------------------------------------------


def training_flops(training: Training, microbatches: float) -> float:
    """Operations that a rank's training needs, without those that checkpointing repeats: three forward passes."""
    return 3 * flops(training.products()) * microbatches


def scoring_flops(training: Training, microbatches: float, models: int) -> float:
    """Of forward passes alone, under so many models."""
    return models * flops(training.products()) * microbatches


def passes_bytes(training: Training) -> float:
    """Bytes that the elementwise operations of one forward pass over a microbatch read and write."""
    dense, sparse = layers_of(training.shape)
    numbers = sum(
        number * (kept.stream + kept.inner) for number, kept in (
            (dense, kept_by(training.shape, sparse=False)), (sparse, kept_by(training.shape, sparse=True)),
        )
    )  # fmt: skip
    return numbers * training.tokens * 4


def number_of_scores(training: Training) -> float:
    """Attention scores of one forward pass: a number for each head, query and key."""
    layers = training.shape.num_hidden_layers
    return float(layers * training.shape.num_attention_heads * training.tokens * training.width)


def communication(training: Training, microbatches: float, optimizer_steps: float) -> tuple[float, str]:
    """Bytes that a rank sends for a step's gradients and weights, and how they are counted."""
    if training.ranks == 1:
        return 0.0, "one rank"
    sent, how = _weights_sent(training, microbatches, optimizer_steps)
    if training.context_parallel > 1:
        swapped = _swapped_bytes(training) * microbatches
        sent, how = sent + swapped, f"{how} + {size_of(swapped)} of rows swapped for heads"
    return sent, how


def _weights_sent(training: Training, microbatches: float, optimizer_steps: float) -> tuple[float, str]:
    """With FSDP2 gathered and scattered for each microbatch, tokens on their way to experts included; with DDP summed."""
    parameters, share = training.shape.parameters, (training.ranks - 1) / training.ranks
    if training.sharded:
        moved, travelling = parameters * share, 0.0
        what = f"{count(parameters)} x 4"
        if training.expert_parallel > 1:
            experts, size = expert_parameters(training.shape), training.expert_parallel
            others, own = parameters - experts, experts / size * (training.expert_groups - 1) / training.expert_groups
            moved, travelling = others * share + own, _travelling_bytes(training)
            what = f"({count(others)} + {count(own)} in experts) x 4 + tokens {size_of(travelling)}"
        sent = (3 * 4 * moved + travelling) * microbatches
        return sent, f"{microbatches:g} microbatches x 3 (gather forward, gather backward, scatter gradients) x {what}"
    sent = 2 * 4 * training.trained_parameters * share * optimizer_steps
    return sent, f"{optimizer_steps:g} optimizer steps x 2 (ring all-reduce) x {count(training.trained_parameters)} x 4"


def _swapped_bytes(training: Training) -> float:
    """Queries, keys and values of a microbatch to the ranks of their heads, and what attention makes of them back."""
    shape = training.shape
    times = 3 if training.checkpointing else 2  # passes
    numbers = shape.num_attention_heads * (2 * key_dim(shape) + 2 * shape.head_dim) * shape.num_hidden_layers
    share = (training.context_parallel - 1) / training.context_parallel
    return times * training.tokens * numbers * training.width_bytes * share


def _travelling_bytes(training: Training) -> float:
    """Tokens to experts and back in a microbatch: forward pass, backward pass, and the one that checkpointing repeats."""
    pairs = training.tokens * training.shape.num_experts_per_tok * layers_of(training.shape)[1]
    times = 2 * (3 if training.checkpointing else 2)
    share = (training.expert_parallel - 1) / training.expert_parallel
    return times * pairs * training.shape.hidden_size * training.width_bytes * share


def sum_bytes(parts: Sequence[Quantity]) -> float:
    return sum(part.value for part in parts)
