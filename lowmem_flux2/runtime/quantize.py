"""Weight formats as modules: `stored_linear` in each format. Only this file knows a quantization library.

int8 and int4 are optimum-quanto's qint8 (per row) and qint4 (in groups of 128), equal in every value, but in torch
alone. int6 is int4's scheme with 64 levels. nf4 is bitsandbytes'. w8a8 is stored as int8 and multiplies integers
(`int8_matmul`, which says why torchao does not). nf4-mixed expands 4 bits with bitsandbytes, 3 and 5 by itself. Why not
optimum-quanto itself: the README's section on installing says it.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from lowmem_flux2.planning.formats import MIXED, MIXED_PIECE_WEIGHTS, NF4_BLOCK, NF4_NESTED_BLOCK, group_size
from lowmem_flux2.planning.gguf_header import BLOCKS
from lowmem_flux2.runtime.int8_matmul import Starts, int8_linear, starts
from lowmem_flux2.runtime.normal_float import Levels, fill, packed, unpack
from lowmem_flux2.runtime.stored_linear import StoredLinear


class Int8Linear(StoredLinear):
    """Symmetric, one scale a row: q = round(w / s), s = max|w| / 127 (optimum-quanto qint8 with AbsmaxOptimizer)."""

    format_name = "int8"
    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((rows, columns), torch.int8), "scale": ((rows, 1), dtype)}

    @classmethod
    def quantize_rows(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return {"weight": (weight / scale).round_().clamp_(-128, 127), "scale": scale}

    def dequantize(self) -> torch.Tensor:
        return self.weight.to(self.compute_dtype).mul_(self.scale)


class W8A8Linear(Int8Linear):
    """int8's weights, multiplied as they are: the input is quantized a token at a time, nothing is expanded."""

    format_name = "w8a8"
    starts: Starts = staticmethod(starts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias, self.starts)


class Fp8Linear(StoredLinear):
    """A cast to e4m3, no scales, as diffusers' layerwise casting stores it; values beyond 448 saturate."""

    format_name = "fp8"
    weight: torch.Tensor

    @classmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((rows, columns), torch.float8_e4m3fn)}

    @classmethod
    def quantize_rows(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight.clamp(-448, 448)}

    def dequantize(self) -> torch.Tensor:
        return self.weight.to(self.compute_dtype)


class _AffineLinear(StoredLinear):
    """A scale and a shift per ``group_size`` weights of a row: w = s q + z, q whole, from 0 to ``levels`` - 1."""

    levels: ClassVar[int]
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    @abstractmethod
    def packed_bytes(cls, group: int) -> int:
        """Of the whole numbers of a group."""

    @classmethod
    @abstractmethod
    def pack(cls, values: torch.Tensor) -> torch.Tensor:
        """Whole numbers (groups, weights of a group) in uint8 to (groups, ``packed_bytes``)."""

    @classmethod
    @abstractmethod
    def unpack(cls, packed: torch.Tensor, expanded: torch.Tensor) -> None:
        """Whole numbers into ``expanded``, (groups, weights of a group) of a float dtype."""

    @classmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        group = group_size(columns)
        groups = rows * columns // group
        return {
            "weight": ((groups, cls.packed_bytes(group)), torch.uint8),
            "scale": ((groups, 1), dtype),
            "shift": ((groups, 1), dtype),
        }

    @classmethod
    def quantize_rows(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        grouped = weight.reshape(-1, group_size(weight.shape[1]))
        low, high = grouped.amin(dim=1, keepdim=True), grouped.amax(dim=1, keepdim=True)
        most = cls.levels - 1
        scale = (high - low) / most
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        values = (grouped - low).div_(scale).round_().clamp_(0, most).to(torch.uint8)
        return {"weight": cls.pack(values), "scale": scale, "shift": low}

    def dequantize(self) -> torch.Tensor:
        group = group_size(self.in_features)
        expanded = torch.empty(len(self.weight), group, dtype=self.compute_dtype, device=self.weight.device)
        self.unpack(self.weight, expanded)
        return expanded.mul_(self.scale).add_(self.shift).view(self.out_features, self.in_features)


class Int4Linear(_AffineLinear):
    """16 levels, two weights a byte: optimum-quanto's qint4 with MaxOptimizer, the shift kept as a float."""

    format_name = "int4"
    levels = 16

    @classmethod
    def packed_bytes(cls, group: int) -> int:
        return (group + 1) // 2

    @classmethod
    def pack(cls, values: torch.Tensor) -> torch.Tensor:
        packed = values[:, 0::2].clone()
        packed[:, : values.shape[1] // 2] |= values[:, 1::2] << 4
        return packed

    @classmethod
    def unpack(cls, packed: torch.Tensor, expanded: torch.Tensor) -> None:
        expanded[:, 0::2] = packed & 15
        expanded[:, 1::2] = packed[:, : expanded.shape[1] // 2] >> 4


class Int6Linear(_AffineLinear):
    """64 levels, four weights in three bytes: a group's low four bits as int4 packs them, then its high two bits,
    four a byte."""

    format_name = "int6"
    levels = 64

    @classmethod
    def packed_bytes(cls, group: int) -> int:
        return (group + 1) // 2 + (group + 3) // 4

    @classmethod
    def pack(cls, values: torch.Tensor) -> torch.Tensor:
        low, high = Int4Linear.pack(values & 15), values >> 4
        quarters = high[:, 0::4].clone()
        for place in (1, 2, 3):
            part = high[:, place::4]
            quarters[:, : part.shape[1]] |= part << 2 * place
        return torch.cat([low, quarters], dim=1)

    @classmethod
    def unpack(cls, packed: torch.Tensor, expanded: torch.Tensor) -> None:
        split = (expanded.shape[1] + 1) // 2
        Int4Linear.unpack(packed[:, :split], expanded)
        for place in range(4):
            part = expanded[:, place::4]
            part.add_((packed[:, split : split + part.shape[1]] >> 2 * place).bitwise_and_(3), alpha=16)


class Nf4Linear(StoredLinear):
    """bitsandbytes NF4 with double quantization: 16 normal-quantile levels times an absmax per 64 weights.

    QLoRA, arXiv:2305.14314, section 3.
    """

    format_name = "nf4"
    bits: ClassVar[int] = 4
    weight: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    offset: torch.Tensor
    levels: torch.Tensor
    nested_levels: torch.Tensor

    @classmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = -(-rows * columns // NF4_BLOCK)
        return {
            "weight": (((rows * columns + 1) // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // NF4_NESTED_BLOCK),), torch.float32),
            "offset": ((), torch.float32),
            "levels": ((16,), torch.float32),
            "nested_levels": ((256,), torch.float32),
        }

    @classmethod
    def scratch(cls, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {"plain_absmax": torch.empty(-(-rows * columns // NF4_BLOCK))}

    @classmethod
    def fill_rows(cls, storage: Mapping[str, torch.Tensor], first: int, weight: torch.Tensor) -> None:
        packed, absmax = _nf4_packed(weight.reshape(-1))
        start = first * weight.shape[1]
        storage["weight"][start // 2 : start // 2 + len(packed)] = packed
        storage["plain_absmax"][start // NF4_BLOCK : start // NF4_BLOCK + len(absmax)] = absmax

    @classmethod
    def finish(cls, storage: Mapping[str, torch.Tensor]) -> None:
        from bitsandbytes import functional as bnb

        absmax = storage["plain_absmax"]
        offset = absmax.mean()
        nested, outer = bnb.quantize_blockwise(absmax - offset, blocksize=NF4_NESTED_BLOCK)
        made = {"absmax": nested, "nested_absmax": outer.absmax, "offset": offset, "nested_levels": outer.code}
        made["levels"] = _levels(cls.bits).values
        for name, tensor in made.items():
            storage[name].copy_(tensor)

    def _nested_state(self) -> Any:
        from bitsandbytes import functional as bnb

        return bnb.QuantState(
            absmax=self.nested_absmax, blocksize=NF4_NESTED_BLOCK, code=self.nested_levels, dtype=torch.float32
        )

    def dequantize(self) -> torch.Tensor:
        from bitsandbytes import functional as bnb

        state = bnb.QuantState(
            absmax=self.absmax,
            # As one row: 0.50.2 takes wrong absmax on a CPU where rows are not a multiple of 64.
            shape=torch.Size((1, self.out_features * self.in_features)),
            code=self.levels,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.compute_dtype,
            offset=self.offset,
            state2=self._nested_state(),
        )
        weight: torch.Tensor = bnb.dequantize_4bit(self.weight, state)
        return weight.view(self.out_features, self.in_features)


def _nf4_packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed values (n / 2, 1) and absmax per block in fp32, equal to those of ``bitsandbytes.quantize_4bit``.

    Its CPU kernel searches the 15 bounds for each weight: 25 to 60 ns a weight, 90 s for klein-4b.
    """
    from bitsandbytes import functional as bnb

    full = len(weight) // NF4_BLOCK * NF4_BLOCK
    blocks = weight[:full].float().view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    values = _levels(4).nearest(blocks * (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)).view(-1)
    pairs = (values[0::2] << 4).bitwise_or_(values[1::2]).unsqueeze(1)
    if full == len(weight):
        return pairs, absmax
    rest, state = bnb.quantize_4bit(weight[full:], quant_type="nf4", blocksize=NF4_BLOCK)
    return torch.cat([pairs, rest]), torch.cat([absmax, state.absmax])


@cache
def _levels(bits: int) -> Levels:
    """bitsandbytes' own for 4 bits."""
    if bits != 4:
        return Levels.normal(bits)
    from bitsandbytes import functional as bnb

    return Levels.of(bnb.get_4bit_type("nf4", device="cpu"))


class MixedLinear(Nf4Linear):
    """NormalFloat in so many ``bits``, its scales stored as nf4's, but searched: ``Levels.best_scale``. 4 bits rest
    as nf4's do.

    Others lie in planes: the low bits, all but one, several a byte (``weight``), and the high one, eight a byte
    (``high``). They are expanded a piece at a time.
    """

    format_name = MIXED
    high: torch.Tensor

    @classmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        made = super().storage(rows, columns, dtype)
        if cls.bits != 4:
            weights = rows * columns
            made["weight"] = ((-(-weights * (cls.bits - 1) // 8), 1), torch.uint8)
            made["high"] = ((-(-weights // 8), 1), torch.uint8)
            made["levels"] = ((1 << cls.bits,), torch.float32)
        return made

    @classmethod
    def fill_rows(cls, storage: Mapping[str, torch.Tensor], first: int, weight: torch.Tensor) -> None:
        start, flat = first * weight.shape[1], weight.float().reshape(-1)
        blocks = nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
        scale = _levels(cls.bits).best_scale(blocks)
        storage["plain_absmax"][start // NF4_BLOCK : start // NF4_BLOCK + len(scale)] = scale.view(-1)
        values = _levels(cls.bits).nearest(blocks / scale).view(-1)
        if cls.bits == 4:
            fill(storage["weight"], start // 2, (values[0::2] << 4).bitwise_or_(values[1::2]))
            return
        low = cls.bits - 1
        fill(storage["weight"], start * low // 8, packed(values & ((1 << low) - 1), low))
        fill(storage["high"], start // 8, packed(values >> low, 1))

    def dequantize(self) -> torch.Tensor:
        if self.bits == 4:
            return super().dequantize()
        from bitsandbytes import functional as bnb

        count, low = self.out_features * self.in_features, self.bits - 1
        absmax = bnb.dequantize_blockwise(self.absmax, self._nested_state()).add_(self.offset)
        expanded = torch.empty(count, dtype=self.compute_dtype, device=self.weight.device)
        for first in range(0, count, MIXED_PIECE_WEIGHTS):
            piece = expanded[first : first + MIXED_PIECE_WEIGHTS]
            blocks = absmax[first // NF4_BLOCK : -(-(first + len(piece)) // NF4_BLOCK)]
            values = self.weight.new_zeros(len(blocks) * NF4_BLOCK)
            unpack(self.weight[first * low // 8 :], low, values[: len(piece)])
            unpack(self.high[first // 8 :], 1, values[: len(piece)], low)
            scaled = self.levels.index_select(0, values.int()).view(-1, NF4_BLOCK).mul_(blocks.view(-1, 1))
            piece.copy_(scaled.view(-1)[: len(piece)])
        return expanded.view(self.out_features, self.in_features)


MIXED_LINEARS: dict[int, type[MixedLinear]] = {
    4: MixedLinear,
    **{bits: type(f"Mixed{bits}Linear", (MixedLinear,), {"bits": bits}) for bits in (3, 5)},
}
"""By bits."""


def gguf_values(kind: str, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(blocks, bytes) uint8 -> (blocks, weights) in ``dtype``, by diffusers' own arithmetic."""
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGMLQuantizationType

    values: torch.Tensor = dequantize_functions[GGMLQuantizationType[kind]](blocks, *BLOCKS[kind], dtype)
    return values


@cache
def sdnq_functions() -> tuple[Callable[..., torch.Tensor], ...]:
    """sdnq's ``dequantize_weight`` and ``get_hadamard``: eager, for importing it would compile."""
    os.environ |= {"SDNQ_USE_TORCH_COMPILE": "0", "SDNQ_USE_OPENVINO_MM": "0"} | os.environ
    from sdnq import dequantizer, quant_utils

    return dequantizer.dequantize_weight, quant_utils.get_hadamard


STORED: dict[str, type[StoredLinear]] = {
    kind.format_name: kind
    for kind in (Int8Linear, W8A8Linear, Int6Linear, Fp8Linear, Nf4Linear, MixedLinear, Int4Linear)
}


def convert(
    module: nn.Module, weight_format: str, dtype: torch.dtype, bits: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Replace every Linear of a module on the meta device by its stored form. Unquantized formats leave it as it is.

    Args:
        bits: in ``MIXED``, of the Linears of these names; of all others 4.
    """
    if weight_format not in STORED:
        return
    for name, linear in linears_of(module):
        parent, _, leaf = name.rpartition(".")
        kind = MIXED_LINEARS[bits.get(name, 4)] if weight_format == MIXED else STORED[weight_format]
        module.get_submodule(parent)._modules[leaf] = kind(linear, dtype)


def linears_of(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """By name, in the module's order."""
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
