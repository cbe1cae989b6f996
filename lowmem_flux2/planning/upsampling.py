"""What rewriting prompts with the whole text encoder takes (Flux2Pipeline.upsample_prompt, diffusers 0.42.1)."""

from __future__ import annotations

from lowmem_flux2.planning.formats import WeightFormat
from lowmem_flux2.planning.models import TextEncoderSpec, VisionSpec

PROMPT_TOKENS = 2048
"""System message and prompt, padded to this."""
NEW_TOKENS = 512
"""At most so many are made; each is a round over all layers."""
SEEN_AREA_PX = 768 * 768
"""Reference images, side by side in one picture, are reduced to this (Flux2Pipeline.upsampling_max_image_size)."""
BATCH_PROMPTS = 4
"""Prompts of a batch that are rewritten together: each takes 0.4 GiB of cache of dev's encoder."""
FP32_BYTES = 4
SCORES = 3
"""Logits, scaled ones and probabilities live together while a token is drawn."""


def cache_bytes(dims: TextEncoderSpec, prompts: int, tokens: int, dtype_bytes: int) -> int:
    """Keys and values of so many tokens of each prompt in all layers."""
    return 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * prompts * tokens * dtype_bytes


def token_flops(dims: TextEncoderSpec, prompts: int) -> tuple[float, float]:
    """(linear, attention) of one layer for one new token of each prompt, the cache as long as it gets."""
    linear = 2 * prompts * dims.layer.linear_weights
    return linear, 4 * prompts * (PROMPT_TOKENS + NEW_TOKENS) * dims.num_heads * dims.head_dim


def token_activation_bytes(dims: TextEncoderSpec, prompts: int, dtype_bytes: int, fmt: WeightFormat) -> int:
    """Peak while the last token is made: the whole cache, one layer's keys and values while they are joined and then
    repeated to all heads, a quantized Linear while it is expanded, or the scores of the vocabulary in fp32."""
    tokens = PROMPT_TOKENS + NEW_TOKENS
    cache = cache_bytes(dims, prompts, tokens, dtype_bytes)
    repeated = 2 * dims.num_heads * dims.head_dim * prompts * tokens * dtype_bytes
    scores = SCORES * prompts * dims.vocab_size * FP32_BYTES
    expanded = 0
    if fmt.is_quantized and not fmt.compute_class:
        largest = max(rows * columns for rows, columns in dims.layer.linears)
        expanded = round(largest * (dtype_bytes + fmt.scratch_bytes_per_weight)) + fmt.scratch_bytes
    return cache + max(repeated, scores, expanded)


def most_patches(vision: VisionSpec) -> int:
    """Of the picture that is seen, at most: its sides are rounded up to what becomes a token."""
    token_px = vision.patch_px * vision.merge
    area = min(SEEN_AREA_PX, vision.longest_px**2)
    tokens = area // token_px**2 + 2 * (vision.longest_px // token_px) + 1
    return tokens * vision.merge**2


def seeing_bytes(vision: VisionSpec, text_width: int, dtype_bytes: int) -> int:
    """Of what sees a picture, at most: all weights, every layer's output (they are collected), the mask between
    patches, and one layer's feed-forward or the projector's width."""
    patches = most_patches(vision)
    states = (vision.num_layers + 2 + 6) * vision.hidden_size * patches
    mask = patches * patches
    widest = max(4 * vision.intermediate_size, 3 * text_width)
    return dtype_bytes * (vision.weights + states + mask + widest * patches)


def seeing_flops(vision: VisionSpec) -> tuple[float, float]:
    """(linear, attention) of seeing the largest picture."""
    patches = most_patches(vision)
    return 2 * patches * vision.weights, 4 * patches**2 * vision.hidden_size * vision.num_layers
