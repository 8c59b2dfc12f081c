"""Seconds of a learner whose machine's kernels were measured: a sum over products, elementwise passes and optimizer.

Each product is taken at the rate that was measured at its size; a backward pass is two more products of it. Elementwise
operations move the numbers that are kept (posttrain/planning/activations.py) so many times. How often follows from the
operations, see the constants.
"""

from __future__ import annotations

from posttrain.planning.activations import layers_of
from posttrain.planning.hardware import Calibration
from posttrain.planning.learner import Training, number_of_scores, passes_bytes
from posttrain.planning.work import Product

# Reads and writes of numbers for each one that is kept: a norm makes 7 for 3 that it keeps, `silu(gate) * up` 5 for 4, the
# gather, weighting and sum of experts 9 for 2, and the gathering of heads some more.
FORWARD_PASSES = 4.0
# A product of two tensors reads three and writes two, a weight that was broadcast is summed over all tokens, and where paths
# meet gradients are added.
BACKWARD_PASSES = 9.0
# AdamW one tensor at a time: moments 3 + 3, square root 2, division 2, epsilon 2, update 4; the norm of the gradients and
# their scaling 3.
UPDATE_PASSES = 19.0
ACCUMULATE_PASSES = 3.0  # a further microbatch's gradient is added to what is there
LOGITS_PASSES = 12.0  # scaling, normaliser, probabilities and entropy of a position's logits, forward
OPERATIONS = {"dense": 60, "sparse": 95}  # calls of kernels of one layer's forward pass; backward twice as many


def forward_seconds(training: Training, rates: Calibration) -> float:
    """Of one forward pass over a microbatch."""
    return (
        sum(_seconds(product, rates) for product in training.products())
        + FORWARD_PASSES * passes_bytes(training) / (rates.pass_gbps * 1e9)
        + (number_of_scores(training) * rates.scores_forward_ns * 1e-9 if training.scores else 0.0)
        + LOGITS_PASSES * _logits_bytes(training) / (rates.pass_gbps * 1e9)
        + _operations(training) * rates.operation_us * 1e-6
    )


def backward_seconds(training: Training, rates: Calibration) -> float:
    """Of one backward pass over a microbatch, the head's chunks computed again."""
    head = [product for product in training.products() if product.group == "head"]
    again = sum(_seconds(product, rates) for product in head) if training.logits_chunk is not None else 0.0
    seconds = (
        sum(_seconds(product, rates, backward=True) for product in training.products())
        + again
        + BACKWARD_PASSES * passes_bytes(training) / (rates.pass_gbps * 1e9)
        + (number_of_scores(training) * rates.scores_backward_ns * 1e-9 if training.scores else 0.0)
        + LOGITS_PASSES * _logits_bytes(training) / (rates.pass_gbps * 1e9)
        + 2 * _operations(training) * rates.operation_us * 1e-6
        + ACCUMULATE_PASSES * training.trained_parameters * 4 / training.share / (rates.update_gbps * 1e9)
    )
    return seconds + (forward_seconds(training, rates) if training.checkpointing else 0.0)


def update_seconds(training: Training, rates: Calibration) -> float:
    """Of one optimizer step: norm, clipping and AdamW."""
    return UPDATE_PASSES * training.trained_parameters * 4 / training.share / (rates.update_gbps * 1e9)


def _seconds(product: Product, rates: Calibration, *, backward: bool = False) -> float:
    work = 2 * product.flops if backward else product.flops
    return rates.matmul_seconds(work, product.rows, product.inner, product.outer, backward=backward)


def _logits_bytes(training: Training) -> float:
    return 4.0 * training.tokens * training.trained_share * training.shape.vocab_size


def _operations(training: Training) -> float:
    dense, sparse = layers_of(training.shape)
    # Each expert's product is a call of its own on CPU.
    experts = 2 * training.shape.num_experts * sparse
    return dense * OPERATIONS["dense"] + sparse * OPERATIONS["sparse"] + experts


def step_seconds(
    training: Training, rates: Calibration, *, scored: float, trained: float, models: int, updates: float
) -> float:
    """Of a rank's part of a step.

    Args:
        training: how it trains.
        rates: of the machine's kernels.
        scored: microbatches that are scored before.
        trained: microbatches that are trained on, each pass counted.
        models: that score.
        updates: optimizer steps.
    """
    forward = forward_seconds(training, rates)
    learned = trained * (forward + backward_seconds(training, rates)) + updates * update_seconds(training, rates)
    return scored * models * forward + learned
