"""Values of tensors that a checkpoint holds quantized: fp8 with scales, GGUF, bitsandbytes' 4-bit blocks, SDNQ.

A few rows at a time, straight from the file, in fp32. The values are the same to the last bit however rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from lowmem_flux2.planning import sdnq
from lowmem_flux2.planning.gguf_header import BLOCKS
from lowmem_flux2.planning.stored import Place, StoredTensor
from lowmem_flux2.runtime.quantize import gguf_values, sdnq_functions
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
_PACKED_DTYPES = {"U16": torch.uint16, "I16": torch.int16}
"""That SDNQ packs values of 9 to 15 bits into."""

_TOGETHER_ROWS, _TRANSPOSED_ROWS = 64, 1024
"""Of SDNQ's, decoded together: whole groups of packed values, and the same products however rows are cut; the second
where the matrix lies transposed, so that each column is a read of its own."""

Open = Callable[[Place], RawFile]
"""The open file that holds a place."""


def rows_together(tensor: StoredTensor) -> int:
    """Rows, from a multiple of so many on, that are not decoded one by one."""
    if tensor.encoding != "sdnq":
        return 1
    if not tensor.state["transposed"]:
        return _TOGETHER_ROWS
    return _TRANSPOSED_ROWS if "svd_up" in tensor.aids or tensor.state["use_hadamard"] else 1


def decoded_rows(tensor: StoredTensor, opened: Open, first: int, rows: int, direct: bool) -> torch.Tensor:
    """Rows of the stored tensor from ``first`` on, decoded: (rows * values a row,) in fp32."""
    if tensor.encoding == "scaled":
        return _scaled(tensor, opened, first, rows, direct)
    if tensor.encoding == "gguf":
        return _gguf(tensor, opened, first, rows, direct)
    if tensor.encoding == "sdnq":
        least = rows_together(tensor)
        begin, step = first // least * least, least if least > 1 else rows
        parts = [_sdnq(tensor, opened, at, min(step, tensor.shape[0] - at)) for at in range(begin, first + rows, step)]
        return torch.cat(parts)[first - begin :][:rows].reshape(-1)
    return _bnb4(tensor, opened, first, rows, direct)


def _read(place: Place, opened: Open, first: int, count: int, direct: bool = False) -> torch.Tensor:
    """``count`` stored values from the ``first`` on."""
    kind = TORCH_DTYPES.get(place.info.dtype) or _PACKED_DTYPES[place.info.dtype]
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


def _sdnq(tensor: StoredTensor, opened: Open, first: int, rows: int) -> torch.Tensor:
    """Rows of a matrix, (rows, columns) in fp32; from a multiple of ``rows_together`` on, or all that are left."""
    of_all, state, aids = tensor.shape[0], tensor.state, {}
    for leaf, aid in tensor.aids.items():
        shape = aid.info.shape
        if leaf == "svd_down" or of_all not in shape:  # of the whole matrix
            part = _read(aid, opened, 0, aid.info.num_values).view(shape)
            aids[leaf] = part.t() if leaf == "svd_down" and shape[1] != tensor.row_values else part
        elif shape[0] == of_all:
            part = _read(aid, opened, first * prod(shape[1:]), rows * prod(shape[1:]))
            aids[leaf] = part.view(rows, *shape[1:])
        else:
            aids[leaf] = _columns(aid, opened, first, rows)
        if aids[leaf].dtype in (torch.float16, torch.bfloat16):
            aids[leaf] = aids[leaf].float()
    shape, scale, stored = torch.Size((rows, tensor.row_values)), aids["scale"], tensor.place.info
    grouped = torch.Size((rows, scale.shape[1], shape[1] // scale.shape[1])) if scale.ndim == 3 else shape
    if state["transposed"]:
        weight = _columns(tensor.place, opened, first, rows)
    else:
        start, stop = (row * shape[1] * stored.num_values // tensor.num_values for row in (first, first + rows))
        weight = _read(tensor.place, opened, start, stop - start)
        weight = weight.view(grouped if stored.num_values == tensor.num_values else (-1, *stored.shape[1:]))
    dequantize, hadamard = sdnq_functions()
    turned = sdnq.hadamard_size(state, shape[1])
    return dequantize(
        weight=weight,
        **aids,
        hadamard=hadamard(turned) if turned else None,
        dtype=torch.float32,
        result_shape=shape,
        quantized_weight_shape=grouped,
        layer_class_name="Linear",
        **{key: state[key] for key in ("weights_dtype", "group_size", "use_codebook")},
    )


def _columns(place: Place, opened: Open, first: int, count: int) -> torch.Tensor:
    """Columns of a stored matrix as rows."""
    rows, columns = place.info.shape
    values = torch.empty(rows, count, dtype=TORCH_DTYPES[place.info.dtype])
    file, size = opened(place), values.element_size()
    for row in range(rows):
        file.read_into(values[row], place.offset + (row * columns + first) * size)
    return values.t().contiguous()
