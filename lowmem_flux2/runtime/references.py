"""Reference images as the transformer takes them: packed latents and position ids, joined to an image's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class References:
    """All reference images of a run.

    Args:
        latents: packed (1, tokens, channels).
        ids: positions (1, tokens, axes).
    """

    latents: torch.Tensor
    ids: torch.Tensor
