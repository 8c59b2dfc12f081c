"""Seconds of a learner whose machine's kernels were measured: a sum over products, elementwise passes and optimizer.

Each product is taken at the rate that was measured at its size; a backward pass is two more products of it. Elementwise
operations move the numbers that are kept (posttrain/planning/activations.py) so many times. How often follows from the
operations, see the constants.
"""

from __future__ import annotations

from posttrain.planning.activations import layers_of
from posttrain.planning.hardware import Calibration
from posttrain.planning.learner import Training, passes_bytes, scores_bytes
from posttrain.planning.work import Product

# Each number that is kept was written and is read again by the operation after it, and about half as many again are not kept.
FORWARD_PASSES = 3.0
# What is kept is read, its gradient written and read, and where two paths meet gradients are added.
BACKWARD_PASSES = 6.0
# A score is written by the product, read and written by the mask's sum and by the softmax; backwards the softmax reads two
# and writes one, the products read and write one each.
SCORES_FORWARD = 5.0
SCORES_BACKWARD = 6.0
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
        + (SCORES_FORWARD * scores_bytes(training) / (rates.softmax_gbps * 1e9) if training.scores else 0.0)
        + LOGITS_PASSES * _logits_bytes(training) / (rates.pass_gbps * 1e9)
        + _operations(training) * rates.operation_us * 1e-6
    )


def backward_seconds(training: Training, rates: Calibration) -> float:
    """Of one backward pass over a microbatch, the head's chunks computed again."""
    head = [product for product in training.products() if product.group == "head"]
    again = sum(_seconds(product, rates) for product in head) if training.logits_chunk is not None else 0.0
    seconds = (
        2 * sum(_seconds(product, rates) for product in training.products())
        + again
        + BACKWARD_PASSES * passes_bytes(training) / (rates.pass_gbps * 1e9)
        + (SCORES_BACKWARD * scores_bytes(training) / (rates.softmax_gbps * 1e9) if training.scores else 0.0)
        + LOGITS_PASSES * _logits_bytes(training) / (rates.pass_gbps * 1e9)
        + 2 * _operations(training) * rates.operation_us * 1e-6
        + ACCUMULATE_PASSES * training.trained_parameters * 4 / training.share / (rates.update_gbps * 1e9)
    )
    return seconds + (forward_seconds(training, rates) if training.checkpointing else 0.0)


def update_seconds(training: Training, rates: Calibration) -> float:
    """Of one optimizer step: norm, clipping and AdamW."""
    return UPDATE_PASSES * training.trained_parameters * 4 / training.share / (rates.update_gbps * 1e9)


def _seconds(product: Product, rates: Calibration) -> float:
    return rates.matmul_seconds(product.flops, product.rows, product.inner, product.outer)


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
