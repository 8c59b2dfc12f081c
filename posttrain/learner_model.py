"""The policy that a learner trains: all its weights, or adapters on weights that stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from posttrain import learner_parallel
from posttrain.model import load, lora, mtp, spread_files
from posttrain.recipe import LoraSection, ModelSection


def load_weights(section: ModelSection, path: str, *, spread: bool = False) -> Any:
    """A causal language model in float32: a bfloat16 weight would swallow small updates.

    With `spread` it has no weights yet: it is to be spread over ranks first and then filled (posttrain/model/spread_files.py).
    """
    how: dict[str, Any] = {
        "attn_implementation": section.attn_implementation,
        "experts_implementation": section.experts_implementation,
        "trust_remote_code": section.trust_remote_code,
    }
    return spread_files.outline(path, **how) if spread else load.load_policy(path, dtype="float32", **how)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    keep = not tensor.is_floating_point() or name.endswith("e_score_correction_bias")
    return tensor if keep else tensor.to(dtype)


class LearnerPolicy:
    """The model in training, and its weights as others are to see them.

    Args:
        section: of the recipe; `model_name_or_path` is the checkpoint to go on from.
        origin: the checkpoint that the run began with. Adapters go onto it, whatever was trained meanwhile: `restore` puts the
            adapters of a checkpoint back, and the weights below are never rounded.
        adapters: None trains all weights.
        seed: of the adapters' start.
        gradient_checkpointing: compute layers again in the backward pass.
        spread: it has no weights yet: it is to be spread over ranks, and filled then (posttrain/model/spread_files.py).

    Raises:
        ValueError: see `posttrain.model.lora.apply_lora`.
    """

    def __init__(
        self,
        section: ModelSection,
        origin: str,
        adapters: LoraSection | None,
        *,
        seed: int,
        gradient_checkpointing: bool,
        spread: bool,
    ) -> None:
        assert section.model_name_or_path is not None
        path = section.model_name_or_path if adapters is None else origin
        self._origin = origin
        self._is_spread = spread
        self.model = load_weights(section, path, spread=spread)
        load.require_tied(self.model, path)
        self._adapted: PeftModel | None = None
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapters is not None:
            torch.manual_seed(seed)
            self._adapted = lora.apply_lora(
                self.model,
                r=adapters.r,
                alpha=adapters.alpha,
                dropout=adapters.dropout,
                targets=adapters.targets,
            )

    @property
    def has_adapters(self) -> bool:
        return self._adapted is not None

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The policy as it was before training, for the length of the block; only with adapters, and without gradient."""
        assert self._adapted is not None
        with self._adapted.disable_adapter():
            yield

    @torch.no_grad()
    def layers(self, dtype: torch.dtype, rank: int, ranks: int) -> Iterator[dict[str, torch.Tensor]]:
        """All weights a layer at a time, adapters merged, cast to a type but for the router's bias, which is compared.

        Where weights are spread over ranks, each gets every `ranks`-th layer and must go through all; else the first gets all.
        """
        if rank and not self._is_spread:
            return
        if self._adapted is not None:
            yield {name: _cast(name, tensor, dtype) for name, tensor in lora.merged_weights(self._adapted).items()}
            return
        for number, part in enumerate(self._parts()):
            cast = {name: _cast(name, tensor, dtype) for name, tensor in part.items()}
            keep = not self._is_spread or rank == number % ranks
            yield learner_parallel.gather(cast, keep=keep)

    def _parts(self) -> list[dict[str, torch.Tensor]]:
        """The model's tensors by layer, those outside the layers one by one."""
        tied = load.tied_names(self.model)
        tensors = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}
        return list(spread_files.by_layer(tensors).values())

    def write_parts(self, path: str | Path, rank: int, ranks: int) -> None:
        """Where weights are spread: write the layers that this rank gathers, into a file each. Collective, and before `save`.

        Raises:
            Exception: what kept this rank from writing, when the others have their layers.
        """
        spread_files.write(self.model, Path(path), self.layers(torch.float32, rank, ranks), len(self._parts()))

    def save(self, path: str | Path, tokenizer: Any) -> None:
        """Write plain weights, and the adapters beside them, into an existing directory; for the first rank."""
        if self._is_spread:
            spread_files.write_index(Path(path), len(self._parts()))
            load.save_config(self.model, tokenizer, path)
        else:
            weights = None if self._adapted is None else lora.merged_weights(self._adapted)
            load.save_policy(self.model, tokenizer, path, weights)
        if self._adapted is not None:
            lora.save_adapter(self._adapted, Path(path) / lora.ADAPTER)
        if mtp.has_mtp(self._origin):
            # Not trained here, but carried along: it goes on drafting for a policy that has moved a little.
            mtp.copy_mtp(self._origin, self.model, path)

    def restore(self, path: str | Path) -> None:
        """Take what is not loaded at the start from a checkpoint of this run: the adapters.

        Raises:
            ValueError: it has none, or others than this recipe's.
        """
        if self._adapted is None:
            return
        saved = Path(path) / lora.ADAPTER
        if not saved.is_dir():
            raise ValueError(
                f"{path} has no adapters: its run trained all weights; resume with the recipe the run was started with"
            )
        lora.load_adapter(self._adapted, saved)

    def roll_back(self, path: str | Path) -> None:
        """Take the weights of an earlier checkpoint of this run, or its adapters."""
        if self._adapted is None:
            spread_files.fill(self.model, str(path), next(self.model.parameters()).device)
        else:
            self.restore(path)
