"""FLUX.2's blocks worked off in chunks of tokens, over diffusers' own submodules: all but attention goes row by row.

Of a chunk only query, key and value are kept (and a single-stream block's gated MLP) until attention has run over the
whole sequence; then output projection, feed-forward and residual of a chunk are written over attention's result. The
operators and their order are those of ``Flux2TransformerBlock`` and ``Flux2SingleTransformerBlock``: where a matmul
rounds a row alike however many there are, the result is bit-equal to theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from torch import nn

FP16_MAX = 65504
"""What the blocks clip to in fp16."""

Rope = tuple[torch.Tensor, torch.Tensor]
Chunks = Callable[[int], Sequence[tuple[int, int]]]
"""Of so many tokens: (start, stop) of each chunk."""


def double_block(
    block: Any,
    hidden: torch.Tensor,
    encoder_hidden: torch.Tensor,
    image_modulation: torch.Tensor,
    text_modulation: torch.Tensor,
    rope: Rope,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A double-stream block on image tokens (B, I, h) and text tokens (B, T, h): the successors of text and image.

    They are views of one tensor (B, T + I, h).

    Args:
        rope: cosines and sines of all tokens (T + I, head_dim), text first.
    """
    attn, text = block.attn, encoder_hidden.shape[1]
    streams = (
        _Stream(
            encoder_hidden,
            offset=0,
            modulation=text_modulation,
            norms=(block.norm1_context, block.norm2_context),
            projections=(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            head_norms=(attn.norm_added_q, attn.norm_added_k),
            output=(attn.to_add_out,),
            feed_forward=block.ff_context,
            is_clipped=True,
        ),
        _Stream(
            hidden,
            offset=text,
            modulation=image_modulation,
            norms=(block.norm1, block.norm2),
            projections=(attn.to_q, attn.to_k, attn.to_v),
            head_norms=(attn.norm_q, attn.norm_k),
            output=tuple(attn.to_out),
            feed_forward=block.ff,
            is_clipped=False,
        ),
    )
    heads = _Heads(attn, hidden, text + hidden.shape[1])
    for stream in streams:
        stream.project(heads, rope, chunks)
    joint = heads.attend()
    for stream in streams:
        stream.finish(joint, chunks)
    return joint[:, :text], joint[:, text:]


def single_block(
    block: Any, hidden: torch.Tensor, modulation: torch.Tensor, rope: Rope, chunks: Chunks
) -> torch.Tensor:
    """A single-stream block on all tokens (B, S, h): their successors."""
    attn, (batch, tokens, _) = block.attn, hidden.shape
    ((shift, scale, gate),) = Flux2Modulation.split(modulation, 1)
    heads = _Heads(attn, hidden, tokens)
    gated = hidden.new_empty(batch, tokens, attn.mlp_hidden_dim)
    for start, stop in chunks(tokens):
        projected = attn.to_qkv_mlp_proj(_modulated(block.norm(hidden[:, start:stop]), shift, scale))
        query, key, value = projected[..., : 3 * attn.inner_dim].chunk(3, dim=-1)
        heads.put_turned(heads.query, start, attn.norm_q, query, rope)
        heads.put_turned(heads.key, start, attn.norm_k, key, rope)
        heads.put(heads.value, start, value)
        gated[:, start:stop] = attn.mlp_act_fn(projected[..., 3 * attn.inner_dim :])
        del projected, query, key, value  # else they live until the next chunk has its own
    joint = heads.attend()
    for start, stop in chunks(tokens):
        made = attn.to_out(torch.cat([joint[:, start:stop], gated[:, start:stop]], dim=-1))
        joint[:, start:stop] = _clipped(hidden[:, start:stop] + gate * made)
    return joint


class _Heads:
    """Query, key and value of all tokens, each (B, S, heads, head_dim), filled chunk by chunk."""

    def __init__(self, attn: Any, like: torch.Tensor, tokens: int) -> None:
        self._attn = attn
        shape = (like.shape[0], tokens, attn.heads, attn.head_dim)
        self.query, self.key, self.value = (like.new_empty(shape) for _ in range(3))

    def put(self, target: torch.Tensor, start: int, states: torch.Tensor) -> None:
        target[:, start : start + states.shape[1]] = states.unflatten(-1, (-1, self._attn.head_dim))

    def put_turned(self, target: torch.Tensor, start: int, norm: nn.Module, states: torch.Tensor, rope: Rope) -> None:
        """Normed over each head, and rotated by the tokens' positions."""
        rows = slice(start, start + states.shape[1])
        normed = norm(states.unflatten(-1, (-1, self._attn.head_dim)))
        target[:, rows] = apply_rotary_emb(normed, (rope[0][rows], rope[1][rows]), sequence_dim=1)

    def attend(self) -> torch.Tensor:
        """Attention over all tokens, (B, S, h), by the processor's own backend; what was filled in is dropped."""
        processor = self._attn.processor
        joint: torch.Tensor = dispatch_attention_fn(
            self.query,
            self.key,
            self.value,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        del self.query, self.key, self.value
        return joint.flatten(2, 3)


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream of a double-stream block: its tokens (B, n, h), which begin at ``offset`` of all, and its modules."""

    hidden: torch.Tensor
    offset: int
    modulation: torch.Tensor
    norms: tuple[nn.Module, nn.Module]
    projections: tuple[nn.Module, nn.Module, nn.Module]
    head_norms: tuple[nn.Module, nn.Module]
    output: tuple[nn.Module, ...]
    feed_forward: nn.Module
    is_clipped: bool

    def project(self, heads: _Heads, rope: Rope, chunks: Chunks) -> None:
        """Fill in query, key and value."""
        (shift, scale, _), _ = Flux2Modulation.split(self.modulation, 2)
        to_query, to_key, to_value = self.projections
        norm_query, norm_key = self.head_norms
        for start, stop in chunks(self.hidden.shape[1]):
            normed = _modulated(self.norms[0](self.hidden[:, start:stop]), shift, scale)
            at = self.offset + start
            heads.put_turned(heads.query, at, norm_query, to_query(normed), rope)
            heads.put_turned(heads.key, at, norm_key, to_key(normed), rope)
            heads.put(heads.value, at, to_value(normed))

    def finish(self, joint: torch.Tensor, chunks: Chunks) -> None:
        """Write the stream's result over attention's, (B, S, h)."""
        (_, _, gate), (shift, scale, gate_forward) = Flux2Modulation.split(self.modulation, 2)
        for start, stop in chunks(self.hidden.shape[1]):
            rows = slice(self.offset + start, self.offset + stop)
            made = joint[:, rows].contiguous()  # else a matmul over a batch copies its weight, not its input
            for module in self.output:
                made = module(made)
            made = self.hidden[:, start:stop] + gate * made
            made = made + gate_forward * self.feed_forward(_modulated(self.norms[1](made), shift, scale))
            joint[:, rows] = _clipped(made) if self.is_clipped else made


def _modulated(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (1 + scale) * normed + shift


def _clipped(made: torch.Tensor) -> torch.Tensor:
    return made.clip(-FP16_MAX, FP16_MAX) if made.dtype == torch.float16 else made
