"""Linears in integers (W8A8): int8 weights with a scale a row, inputs quantized to int8 with a scale a token.

y = (q_x q_w^T) s_x s_w + b with q_x = round(x / s_x), s_x = max|x| / 127 of each token: LLM.int8's vector-wise scheme
(arXiv:2208.07339, section 2.2) without its outlier columns. Sums are exact in int32: 2^17 columns of 127^2 would be the
first to overflow. So a token's result depends on nothing but its own row, whatever the batch, the chunks or the pieces.

The matmul is ``torch._int_mm``, which torchao's Int8DynamicActivationInt8WeightConfig comes down to as well. torchao
itself is not used: its weights are tensor subclasses, which cannot be bound to a slot; it holds the products of a whole
Linear at once (0.95 GiB in int32 for dev's widest at 1024 px, and as much again scaled in fp32); and diffusers and
transformers change what they do where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from lowmem_flux2.planning.formats import INT8_ROWS, INT8_TOKENS

LEAST_SCALE = 1e-30
"""Of a token of zeros."""
MULTIPLE = 8
"""cuBLASLt wants rows and columns of an int8 weight to be multiples of it. All of FLUX.2's are; others are padded."""
LEAST_TOKENS = 32
"""It wants more than 16 tokens; fewer are padded to this."""


Starts = Callable[[int, int], Iterable[int]]


def starts(total: int, step: int) -> Iterable[int]:
    """Where each piece begins."""
    return range(0, total, step)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    starts: Starts = starts,
) -> torch.Tensor:
    """A Linear's result in the input's dtype, worked off in pieces of ``INT8_TOKENS`` by ``INT8_ROWS``.

    Args:
        x: (..., columns).
        weight: (rows, columns) int8.
        scale: (rows, 1), of any float dtype; products are scaled in fp32.
        bias: (rows,).
        starts: which pieces are worked off, in both directions; fewer than all leave holes.
    """
    rows, columns = weight.shape
    tokens = x.reshape(-1, columns)
    made = torch.empty(len(tokens), rows, dtype=x.dtype, device=x.device)
    for first in starts(len(tokens), INT8_TOKENS):
        piece = slice(first, first + INT8_TOKENS)
        _fill(made[piece], tokens[piece], weight, scale, bias, starts)
    return made.view(*x.shape[:-1], rows)


def _fill(
    made: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    starts: Starts,
) -> None:
    values, scales = _quantized(tokens)
    for first in starts(len(weight), INT8_ROWS):
        part = slice(first, first + INT8_ROWS)
        made[:, part] = _scaled(values, scales, weight[part], scale[part], None if bias is None else bias[part])


def _scaled(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The products in fp32."""
    scaled = (_multiplied(values, weight) * scales).mul_(scale.view(-1))
    return scaled if bias is None else scaled.add_(bias)


def _quantized(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values (tokens, columns), and scales (tokens, 1) in fp32. NaN and infinity go on in the scale."""
    most = torch.maximum(tokens.amax(dim=1, keepdim=True), tokens.amin(dim=1, keepdim=True).neg_())
    scales = most.float().div_(127).clamp_(min=LEAST_SCALE)
    return (tokens / scales).round_().to(torch.int8), scales


def _multiplied(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """values @ weight^T in int32, exact."""
    (tokens, columns), rows = values.shape, len(weight)
    wide, high, long = -columns % MULTIPLE, -rows % MULTIPLE, LEAST_TOKENS - tokens if tokens <= 16 else 0
    if not (wide or high or long):
        return torch._int_mm(values, weight.t())
    padded = functional.pad(values, (0, wide, 0, long)), functional.pad(weight, (0, wide, 0, high))
    return torch._int_mm(padded[0], padded[1].t())[:tokens, :rows]
