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
        tensor_inputs: of ``latents``, packed (images, tokens, channels), and ``prompt_embeds``. Only latents may be
            replaced: text is projected once for all steps.
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
    ) -> torch.Tensor:
        """The latents to go on with.

        Raises:
            UsageError: it replaced something else.
        """
        given = {name: tensors[name] for name in self.tensor_inputs}
        changed = dict(self.callback(denoiser, step, timestep, dict(given)) or {})
        latents = changed.pop("latents", tensors["latents"])
        others = [name for name, tensor in changed.items() if tensor is not given.get(name)]
        if others:
            raise UsageError(f"the step callback may change only 'latents', not {', '.join(others)}")
        return latents
