"""What a caller has called after each denoising step: diffusers' ``callback_on_step_end``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_flux2.errors import UsageError

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]
"""(denoiser, step, timestep, tensors) -> tensors that replace those of the run, or None. ``denoiser.interrupt = True``
(or ``_interrupt``, as with the stock pipelines) takes no more steps, and what there is becomes the picture."""
TENSOR_INPUTS = ("latents", "prompt_embeds")


@dataclass(frozen=True, slots=True)
class StepHook:
    """A callback with the tensors that it asks for.

    Args:
        tensor_inputs: of ``latents``, packed (images, tokens, channels), and ``prompt_embeds``, (images, tokens,
            joint_dim) on the host. Either may be replaced, or changed in place; latents go on in the run's own dtype,
            on its device, whatever they are replaced by.
    """

    callback: StepCallback
    tensor_inputs: Sequence[str] = ("latents",)

    @classmethod
    def of(cls, callback: StepCallback | None, tensor_inputs: Sequence[str]) -> StepHook | None:
        """None where there is no callback.

        Raises:
            UsageError: none that can be called, or a tensor that none is given.
        """
        if not isinstance(tensor_inputs, list | tuple):
            raise UsageError(f"callback_on_step_end_tensor_inputs: give a list of names, not {tensor_inputs!r}")
        if callback is not None and not callable(callback):
            raise UsageError(f"callback_on_step_end: {callback!r} cannot be called")
        hook = cls(callback or _nothing, tuple(tensor_inputs))
        return None if callback is None else hook

    def __post_init__(self) -> None:
        """Raises UsageError: a tensor that no callback is given."""
        unknown = [name for name in self.tensor_inputs if name not in TENSOR_INPUTS]
        if unknown:
            known = ", ".join(TENSOR_INPUTS)
            raise UsageError(f"callback_on_step_end_tensor_inputs: {', '.join(unknown)}: none of {known}")

    def __call__(
        self, denoiser: object, step: int, timestep: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents and the prompts' embeddings to go on with.

        Raises:
            UsageError: it replaced something else, or by what is no tensor of the same shape.
        """
        given = {name: tensors[name] for name in self.tensor_inputs}
        returned = self.callback(denoiser, step, timestep, dict(given))
        if not isinstance(returned, Mapping | None):
            raise UsageError(f"the step callback gave a {type(returned).__name__}: a dict of tensors, or None")
        changed = dict(returned or {})
        latents, embeds = (changed.pop(name, tensors[name]) for name in TENSOR_INPUTS)
        if changed:
            raise UsageError(
                f"the step callback may change only {' and '.join(TENSOR_INPUTS)}, not {', '.join(changed)}"
            )
        for name, tensor in zip(TENSOR_INPUTS, (latents, embeds), strict=True):
            wanted = tuple(tensors[name].shape)
            if not isinstance(tensor, torch.Tensor):
                raise UsageError(f"the step callback gave {name} that are a {type(tensor).__name__}: give a tensor")
            if tuple(tensor.shape) != wanted:
                raise UsageError(f"the step callback gave {name} of the shape {tuple(tensor.shape)}, not {wanted}")
        return latents.to(tensors["latents"]), embeds


def _nothing(*_: object) -> None:
    """Stands for a callback while the tensors' names alone are checked."""
