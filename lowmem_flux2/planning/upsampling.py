"""What rewriting prompts with the whole text encoder takes (Flux2Pipeline.upsample_prompt, diffusers 0.42.1)."""

from __future__ import annotations

from lowmem_flux2.planning.models import TextEncoderSpec

PROMPT_TOKENS = 2048
"""System message and prompt, padded to this."""
NEW_TOKENS = 512
"""At most so many are made; each is a round over all layers."""
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


def token_activation_bytes(dims: TextEncoderSpec, prompts: int, dtype_bytes: int) -> int:
    """Peak while the last token is made: the whole cache, one layer's keys and values while they are joined and then
    repeated to all heads, and the scores of the vocabulary in fp32."""
    tokens = PROMPT_TOKENS + NEW_TOKENS
    cache = cache_bytes(dims, prompts, tokens, dtype_bytes)
    repeated = 2 * dims.num_heads * dims.head_dim * prompts * tokens * dtype_bytes
    scores = SCORES * prompts * dims.vocab_size * FP32_BYTES
    return cache + max(repeated, scores)
