"""Values of tensors that a checkpoint holds quantized: fp8 with scales, GGUF blocks, bitsandbytes' 4-bit blocks.

A few rows at a time, straight from the file, in fp32. The values are the same to the last bit however rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.gguf_header import BLOCKS
from lowmem_flux2.planning.stored import Place, StoredTensor
from lowmem_flux2.runtime.quantize import gguf_values
from lowmem_flux2.runtime.rawfile import RawFile

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
"""Of the names in safetensors and GGUF headers."""

Open = Callable[[Place], RawFile]
"""The open file that holds a place."""


def check_decodable(tensor: StoredTensor) -> None:
    """Raises UsageError where the library that decodes it is not installed."""
    if tensor.encoding == "gguf" and find_spec("gguf") is None:
        raise UsageError(
            f"{tensor.place.header.path} is a GGUF file, and gguf is not installed: pip install 'lowmem-flux2[gguf]'"
        )


def decoded_rows(tensor: StoredTensor, opened: Open, first: int, rows: int, direct: bool) -> torch.Tensor:
    """Rows of the stored tensor from ``first`` on, decoded: (rows * values a row,) in fp32."""
    if tensor.encoding == "scaled":
        return _scaled(tensor, opened, first, rows, direct)
    if tensor.encoding == "gguf":
        return _gguf(tensor, opened, first, rows, direct)
    return _bnb4(tensor, opened, first, rows, direct)


def _read(place: Place, opened: Open, first: int, count: int, direct: bool = False) -> torch.Tensor:
    """``count`` stored values from the ``first`` on."""
    kind = TORCH_DTYPES[place.info.dtype]
    values = torch.empty(count, dtype=kind)
    opened(place).read_into(values, place.offset + first * kind.itemsize, direct)
    return values


def _scaled(tensor: StoredTensor, opened: Open, first: int, rows: int, direct: bool) -> torch.Tensor:
    """fp8 times its scale in fp32, as ``dequantize_fp8r`` of diffusers 0.42.1 (quantizers/bfl/utils.py)."""
    columns, scale = tensor.row_values, tensor.aids["scale"]
    values = _read(tensor.place, opened, first * columns, rows * columns, direct).float().view(rows, columns)
    of_rows = scale.info.num_values > 1
    factors = _read(scale, opened, first, rows) if of_rows else _read(scale, opened, 0, 1)
    return values.mul_(factors.float().view(-1, 1)).view(-1)


def _gguf(tensor: StoredTensor, opened: Open, first: int, rows: int, direct: bool) -> torch.Tensor:
    kind = tensor.place.info.dtype
    weights, size = BLOCKS[kind]
    blocks_a_row = tensor.row_values // weights
    raw = torch.empty(rows * blocks_a_row * size, dtype=torch.uint8)
    opened(tensor.place).read_into(raw, tensor.place.offset + first * blocks_a_row * size, direct)
    return gguf_values(kind, raw.view(-1, size), torch.float32).reshape(-1)


def _bnb4(tensor: StoredTensor, opened: Open, first: int, rows: int, direct: bool) -> torch.Tensor:
    """16 levels times an absmax a block; blocks run over rows (bitsandbytes, functional.dequantize_4bit)."""
    block, total = int(tensor.state["blocksize"]), tensor.place.info.num_bytes * 2
    start, stop = first * tensor.row_values, (first + rows) * tensor.row_values
    begin, end = start // block * block, min(-(-stop // block) * block, total)
    packed = _read(tensor.place, opened, begin // 2, (end - begin + 1) // 2, direct).to(torch.int32)
    levels = _read(tensor.aids["quant_map"], opened, 0, 16)
    values = torch.stack([levels[packed >> 4], levels[packed & 15]], dim=1).view(-1)
    absmax = _absmax(tensor, opened, begin // block, -(-end // block))
    values.mul_(absmax.repeat_interleave(block)[: len(values)])
    return values[start - begin : stop - begin]


def _absmax(tensor: StoredTensor, opened: Open, first: int, stop: int) -> torch.Tensor:
    """Of blocks ``first`` to ``stop``, themselves quantized where they are nested."""
    stored = _read(tensor.aids["absmax"], opened, first, stop - first)
    if "nested_absmax" not in tensor.aids:
        return stored.float()
    nested = int(tensor.state["nested_blocksize"])
    outer = _read(tensor.aids["nested_absmax"], opened, first // nested, -(-stop // nested) - first // nested)
    code = _read(tensor.aids["nested_quant_map"], opened, 0, 256)
    places = torch.arange(first, stop) // nested - first // nested
    return code[stored.to(torch.int32)] * outer[places] + float(tensor.state["nested_offset"])
