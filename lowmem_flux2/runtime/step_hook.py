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
            joint_dim) on the host. Either may be replaced, or changed in place.
    """

    callback: StepCallback
    tensor_inputs: Sequence[str] = ("latents",)

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
            UsageError: it replaced something else, or embeddings by some of another shape.
        """
        given = {name: tensors[name] for name in self.tensor_inputs}
        changed = dict(self.callback(denoiser, step, timestep, dict(given)) or {})
        latents, embeds = (changed.pop(name, tensors[name]) for name in TENSOR_INPUTS)
        if changed:
            raise UsageError(
                f"the step callback may change only {' and '.join(TENSOR_INPUTS)}, not {', '.join(changed)}"
            )
        shape, wanted = tuple(embeds.shape), tuple(tensors["prompt_embeds"].shape)
        if shape != wanted:
            raise UsageError(f"the step callback gave prompt_embeds of the shape {shape}, not {wanted}")
        return latents, embeds
