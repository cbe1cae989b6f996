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

from lowmem_flux2.runtime.reference_keys import KeptLayer, Modulation, modulation_of

FP16_MAX = 65504
"""What the blocks clip to in fp16."""

Rope = tuple[torch.Tensor, torch.Tensor]
Chunks = Callable[[int], Sequence[tuple[int, int]]]
"""Of so many tokens: (start, stop) of each chunk."""


def double_block(
    block: Any,
    hidden: torch.Tensor,
    encoder_hidden: torch.Tensor,
    image_modulation: Modulation,
    text_modulation: torch.Tensor,
    rope: Rope,
    chunks: Chunks,
    layer: KeptLayer | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A double-stream block on image tokens (B, I, h) and text tokens (B, T, h): the successors of text and image.

    They are views of one tensor (B, T + I, h).

    Args:
        rope: cosines and sines of all tokens (T + I, head_dim), text first.
        layer: keys and values of references that are kept.
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
    heads = _Heads(attn, hidden, text + hidden.shape[1], layer)
    for stream in streams:
        stream.project(heads, rope, chunks)
    joint = heads.attend()
    for stream in streams:
        stream.finish(joint, chunks)
    return joint[:, :text], joint[:, text:]


def single_block(
    block: Any,
    hidden: torch.Tensor,
    modulation: Modulation,
    rope: Rope,
    chunks: Chunks,
    layer: KeptLayer | None = None,
) -> torch.Tensor:
    """A single-stream block on all tokens (B, S, h): their successors."""
    attn, (batch, tokens, _) = block.attn, hidden.shape
    heads = _Heads(attn, hidden, tokens, layer)
    gated = hidden.new_empty(batch, tokens, attn.mlp_hidden_dim)
    for start, stop in chunks(tokens):
        ((shift, scale, _),) = Flux2Modulation.split(modulation_of(modulation, start, stop), 1)
        projected = attn.to_qkv_mlp_proj(_modulated(block.norm(hidden[:, start:stop]), shift, scale))
        query, key, value = projected[..., : 3 * attn.inner_dim].chunk(3, dim=-1)
        heads.put_turned(heads.query, start, attn.norm_q, query, rope)
        heads.put_turned(heads.key, start, attn.norm_k, key, rope)
        heads.put(heads.value, start, value)
        gated[:, start:stop] = attn.mlp_act_fn(projected[..., 3 * attn.inner_dim :])
        del projected, query, key, value  # else they live until the next chunk has its own
    joint = heads.attend()
    for start, stop in chunks(tokens):
        ((_, _, gate),) = Flux2Modulation.split(modulation_of(modulation, start, stop), 1)
        made = attn.to_out(torch.cat([joint[:, start:stop], gated[:, start:stop]], dim=-1))
        joint[:, start:stop] = _clipped(hidden[:, start:stop] + gate * made)
    return joint


class _Heads:
    """Query, key and value of all tokens, each (B, S, heads, head_dim), filled chunk by chunk.

    Keys and values of references that were kept are in their places from the beginning.
    """

    def __init__(self, attn: Any, like: torch.Tensor, tokens: int, layer: KeptLayer | None) -> None:
        self._attn, self._layer = attn, layer
        kept = 0 if layer is None or layer.is_filling else layer.count
        self.query, self.key, self.value = (
            like.new_empty(like.shape[0], tokens + more, attn.heads, attn.head_dim) for more in (0, kept, kept)
        )
        self._gap = (0, 0)
        if layer is not None and kept:
            self._gap = (layer.text, kept)
            for target, states in zip((self.key, self.value), layer.kept.get(), strict=True):
                target[:, layer.text : layer.text + kept] = states

    def put(self, target: torch.Tensor, start: int, states: torch.Tensor) -> None:
        self._write(target, start, states.unflatten(-1, (-1, self._attn.head_dim)))

    def _write(self, target: torch.Tensor, start: int, states: torch.Tensor) -> None:
        """Of tokens from ``start`` on; those behind the text lie behind what is kept, too."""
        text, kept = self._gap if target is not self.query else (0, 0)
        before = min(max(text - start, 0), states.shape[1]) if kept else 0
        if before:
            target[:, start : start + before] = states[:, :before]
        if before < states.shape[1]:
            target[:, start + before + kept : start + states.shape[1] + kept] = states[:, before:]

    def put_turned(self, target: torch.Tensor, start: int, norm: nn.Module, states: torch.Tensor, rope: Rope) -> None:
        """Normed over each head, and rotated by the tokens' positions."""
        rows = slice(start, start + states.shape[1])
        normed = norm(states.unflatten(-1, (-1, self._attn.head_dim)))
        self._write(target, start, apply_rotary_emb(normed, (rope[0][rows], rope[1][rows]), sequence_dim=1))

    def attend(self) -> torch.Tensor:
        """Attention over all tokens, (B, S, h), by the processor's own backend; what was filled in is dropped."""
        if self._layer is not None and self._layer.is_filling:
            return self._attend_and_keep(self._layer)
        joint = self._attention(self.query, self.key, self.value)
        del self.query, self.key, self.value
        return joint.flatten(2, 3)

    def _attend_and_keep(self, layer: KeptLayer) -> torch.Tensor:
        """References attend to themselves alone, and leave their keys and values."""
        start, stop = layer.text, layer.text + layer.count
        key, value = self.key[:, start:stop], self.value[:, start:stop]
        layer.kept.store(key.clone(), value.clone())
        references = self._attention(self.query[:, start:stop], key, value)
        query = torch.cat([self.query[:, :start], self.query[:, stop:]], dim=1)
        del self.query
        others = self._attention(query, self.key, self.value)
        del self.key, self.value, key, value, query
        return torch.cat([others[:, :start], references, others[:, start:]], dim=1).flatten(2, 3)

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        processor = self._attn.processor
        joint: torch.Tensor = dispatch_attention_fn(
            query, key, value, backend=processor._attention_backend, parallel_config=processor._parallel_config
        )
        return joint


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream of a double-stream block: its tokens (B, n, h), which begin at ``offset`` of all, and its modules."""

    hidden: torch.Tensor
    offset: int
    modulation: Modulation
    norms: tuple[nn.Module, nn.Module]
    projections: tuple[nn.Module, nn.Module, nn.Module]
    head_norms: tuple[nn.Module, nn.Module]
    output: tuple[nn.Module, ...]
    feed_forward: nn.Module
    is_clipped: bool

    def project(self, heads: _Heads, rope: Rope, chunks: Chunks) -> None:
        """Fill in query, key and value."""
        to_query, to_key, to_value = self.projections
        norm_query, norm_key = self.head_norms
        for start, stop in chunks(self.hidden.shape[1]):
            (shift, scale, _), _ = Flux2Modulation.split(modulation_of(self.modulation, start, stop), 2)
            normed = _modulated(self.norms[0](self.hidden[:, start:stop]), shift, scale)
            at = self.offset + start
            heads.put_turned(heads.query, at, norm_query, to_query(normed), rope)
            heads.put_turned(heads.key, at, norm_key, to_key(normed), rope)
            heads.put(heads.value, at, to_value(normed))

    def finish(self, joint: torch.Tensor, chunks: Chunks) -> None:
        """Write the stream's result over attention's, (B, S, h)."""
        for start, stop in chunks(self.hidden.shape[1]):
            modulation = modulation_of(self.modulation, start, stop)
            (_, _, gate), (shift, scale, gate_forward) = Flux2Modulation.split(modulation, 2)
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
