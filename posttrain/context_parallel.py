"""Context parallelism: the ranks of a group share each row of tokens, so that a long sample's activations fit.

All but attention works on tokens one by one, so each of C ranks computes its part of a row, W / C neighbouring tokens. In
attention a rank gets the whole row for its part of the heads (all-to-all there and back: DeepSpeed-Ulysses, arXiv 2309.14509),
with positions and mask of the whole row. The ranks of a group are given the same microbatch; logprobs are put together again,
and every rank computes the same loss from them, whose gradient reaches its own tokens only. Summed over ranks that is the
gradient of one rank.

Shapes: R rows of W tokens, B of them for this rank (W / C, rounded up), H heads, D of a head.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain.collectives import AllToAll, Gather
from posttrain.layout import require_context_groups
from posttrain.model.router import RouterTrace
from posttrain.prompt_sharing import added_to_scores


class ContextParallel:
    """This rank's place in its group.

    Args:
        size: C, ranks of a group.
        ranks: all of them; groups are neighbours.
        device_type: that they compute on.
    """

    def __init__(self, size: int, ranks: int, device_type: str) -> None:
        mesh = init_device_mesh(device_type, (ranks // size, size), mesh_dim_names=("samples", "context"))
        self._group, self.size = mesh.get_group(1), size
        self.rank = mesh.get_local_rank(1)

    def attach(self, model: Any) -> None:
        """Let a model's attention see whole rows, of which it is given parts; in place.

        Raises:
            ValueError: its heads do not divide, or its attention takes no mask.
        """
        config = model.config.get_text_config()
        require_context_groups(config.to_dict(), self.size)
        inner = config._attn_implementation
        if inner not in ("sdpa", "eager"):
            raise ValueError(
                f"learner.context_parallel_size: attention {inner!r} takes no mask of its own; set "
                f"model.attn_implementation: sdpa"
            )
        # Eager attention is a function of each model's own file.
        eager = import_module(type(model).__module__).eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
        name = f"whole_rows_{inner}_{type(model).__name__}"
        AttentionInterface.register(name, _WholeRows(attention, self._group, self.size))
        config._attn_implementation = name

    def own(self, values_RW: torch.Tensor, fill: Any = 0) -> torch.Tensor:
        """[R, B, ...], this rank's part of [R, W, ...]."""
        part = -(-values_RW.shape[1] // self.size)
        missing = part * self.size - values_RW.shape[1]
        if missing:
            end = values_RW.new_full((len(values_RW), missing, *values_RW.shape[2:]), fill)
            values_RW = torch.cat([values_RW, end], dim=1)
        return values_RW[:, self.rank * part : (self.rank + 1) * part].contiguous()

    def whole(self, values_RB: torch.Tensor, width: int) -> torch.Tensor:
        """[R, W, ...] of the parts of all ranks, with gradient."""
        found: torch.Tensor = Gather.apply(values_RB, self._group)
        return found[:, :width]

    def whole_trace(self, trace: RouterTrace, rows: int, width: int) -> RouterTrace:
        """What the routers did with the tokens of all ranks, [R x W, ...] of each layer."""

        def of_rows(layer: torch.Tensor) -> torch.Tensor:
            return self.whole(layer.view(rows, -1, *layer.shape[1:]), width).flatten(0, 1)

        return RouterTrace(*([of_rows(layer) for layer in part] for part in (trace.logits, trace.chosen, trace.used)))


class _WholeRows:
    """An attention function of transformers for a part of the row, by way of one for a part of the heads."""

    def __init__(self, attention: Any, group: dist.ProcessGroup, size: int) -> None:
        self._attention, self._group, self._size = attention, group, size

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        whole = [self._to_heads(tensor) for tensor in (query, key, value)]
        found, _ = self._attention(module, *whole, attention_mask, **settings)
        return self._to_tokens(found), None

    def _to_heads(self, tensor_RHBD: torch.Tensor) -> torch.Tensor:
        """[R, H, B, D] to [R, H / C, C x B, D]."""
        rows, heads, part, depth = tensor_RHBD.shape
        by_rank = tensor_RHBD.view(rows, self._size, heads // self._size, part, depth).transpose(0, 1)
        return self._swap(by_rank).permute(1, 2, 0, 3, 4).reshape(rows, heads // self._size, -1, depth)

    def _to_tokens(self, tensor_RWHD: torch.Tensor) -> torch.Tensor:
        """[R, C x B, H / C, D] to [R, B, H, D]."""
        rows, width, heads, depth = tensor_RWHD.shape
        by_rank = tensor_RWHD.view(rows, self._size, width // self._size, heads, depth).transpose(0, 1)
        return self._swap(by_rank).permute(1, 2, 0, 3, 4).reshape(rows, width // self._size, -1, depth)

    def _swap(self, by_rank: torch.Tensor) -> torch.Tensor:
        ones = [1] * self._size
        found: torch.Tensor = AllToAll.apply(by_rank, ones, ones, self._group)
        return found


def mask_of_rows(position_ids_RW: torch.Tensor, width: int, *, additive: bool) -> torch.Tensor:
    """[R, 1, width, width], which tokens each one sees: those before it of its sample, and itself.

    Args:
        position_ids_RW: they restart at each sample.
        width: W and more, for what rows are filled up with.
        additive: float32, to be added to the scores, and not bool.
    """
    rows, device = len(position_ids_RW), position_ids_RW.device
    samples_RX = torch.full((rows, width), -1, device=device)
    samples_RX[:, : position_ids_RW.shape[1]] = (position_ids_RW == 0).cumsum(1)
    before_XX = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen = (before_XX & (samples_RX[:, :, None] == samples_RX[:, None, :]))[:, None]
    return added_to_scores(seen) if additive else seen
