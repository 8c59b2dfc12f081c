"""How a policy in training is written: plain weights, with adapters merged and the prediction module along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from posttrain.model import load, lora, mtp
from posttrain.model.mtp import MtpModule


class PolicyFiles:
    """Writes one policy.

    Args:
        policy: the model that is trained, with adapters or without.
        tokenizer: saved beside it, with the chat template it was trained with.
        origin: the checkpoint it came from; a prediction module there that is not trained is carried along.
        module: the prediction module that is trained along, None without.
    """

    def __init__(self, policy: Any, tokenizer: Any, origin: Path, module: MtpModule | None) -> None:
        self._policy = policy
        self._tokenizer = tokenizer
        self._origin = origin
        self._module = module

    @property
    def has_adapters(self) -> bool:
        return isinstance(self._policy, PeftModel)

    def write(self, path: str, state_dict: dict[str, Any] | None = None) -> None:
        """What training can go on from: adapters alone, or the whole policy.

        Args:
            path: an existing directory.
            state_dict: all weights, where the policy's own are spread over ranks.
        """
        if self.has_adapters:
            lora.save_adapter(self._policy, Path(path) / lora.ADAPTER)
            self._tokenizer.save_pretrained(path)
            return
        self._write_whole(self._policy, path, state_dict)

    def write_merged(self, path: str) -> None:
        """The adapters, and plain weights with them merged in. The policy cannot be trained afterwards."""
        self.write(path)
        self._write_whole(lora.merge(self._policy), path, None)

    def _write_whole(self, policy: Any, path: str, state_dict: dict[str, Any] | None) -> None:
        if state_dict is not None and self._module is not None:
            raise ValueError(
                "mtp: a prediction module cannot be saved when the policy is spread over ranks (FSDP); use plain data "
                "parallelism, or leave the mtp section out"
            )
        load.save_policy(policy, self._tokenizer, path, state_dict)
        if self._module is not None:
            mtp.save_mtp(policy, self._module, Path(path))
        elif mtp.has_mtp(self._origin):
            mtp.copy_mtp(self._origin, policy, Path(path))
