"""Batches of prompts: which go through the text encoder as one, and how many batches one pass over its weights takes.

A batch's composition decides how Linear kernels round, so it is the plan's, and the same whatever the prompt cache
holds. Batches of one pass share the weights: layer by layer each is computed by itself, and the others' hidden states
wait on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_flux2.planning.models import TextEncoderSpec
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import MIB

Batch = tuple[str, ...]

WAITING_MOST_BYTES = 128 * MIB
"""What may wait on the device in one pass: 22 prompts of 512 tokens for dev's encoder in 16 bits. 23 prompts are 24,000
FLOP a weight: at 70 TFLOP/s bf16 weights are then needed at 6 GB/s, which any link brings, so more would win little."""


def prompt_batches(prompts: Sequence[str], batch_size: int) -> list[Batch]:
    """The prompts in batches of at most ``batch_size``, in order."""
    return [tuple(prompts[at : at + batch_size]) for at in range(0, len(prompts), batch_size)]


def negatives_of(batches: Sequence[Batch], negative_prompt: str | None) -> list[Batch]:
    """For each batch one of as many negative prompts, as the stock pipelines encode them; equal ones are one batch."""
    return [(negative_prompt or "",) * len(batch) for batch in batches]


def batch_sizes(workload: Workload, batch_size: int) -> list[int]:
    """Prompts in each batch that a run encodes, where no two prompts are alike; negative batches last."""
    sizes = [len(batch) for batch in prompt_batches([""] * workload.num_prompts, batch_size)]
    return sizes + (sorted(set(sizes)) if workload.guidance_passes == 2 else [])


def waiting_bytes(encoder: TextEncoderSpec, prompts: int, text_tokens: int, dtype_bytes: int) -> int:
    """What a batch keeps on the device while others are computed: hidden states, attention mask, rotary tables."""
    rotary = 2 * text_tokens * encoder.head_dim
    return (prompts * text_tokens * (encoder.hidden_size + text_tokens) + rotary) * dtype_bytes


def batches_a_pass(encoder: TextEncoderSpec, batch_size: int, text_tokens: int, dtype_bytes: int) -> int:
    """How many batches one pass over the weights takes at most: at least one."""
    return 1 + WAITING_MOST_BYTES // waiting_bytes(encoder, batch_size, text_tokens, dtype_bytes)
