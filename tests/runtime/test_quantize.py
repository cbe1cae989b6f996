"""Stored Linears: their storage, how far their weights are from the source's, and their bytes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel
from torch import nn
from torch.nn import functional

from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.runtime import stored_linear
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import layout_of
from lowmem_flux2.runtime.normal_float import Levels
from lowmem_flux2.runtime.quantize import MIXED_LINEARS, STORED, convert
from lowmem_flux2.runtime.stored_linear import StoredLinear

MEASURED = {"int8": 0.008, "w8a8": 0.008, "int6": 0.025, "fp8": 0.033, "nf4": 0.092, "nf4-mixed": 0.085, "int4": 0.100}
"""Relative errors of Gaussian weights of a deviation as FLUX.2's have: fp8's depends on it, int8's on the width."""
DEVIATION = 0.02
SHAPES = [(48, 64), (5, 33), (7, 96), (3, 1), (1, 129), (130, 160)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * DEVIATION


def quantized(name: str, weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> StoredLinear:
    """A Linear of the format that holds the weight."""
    rows, columns = weight.shape
    linear = STORED[name](nn.Linear(columns, rows, bias=bias is not None, device="meta"), dtype)
    for leaf, tensor in STORED[name].quantize(weight, dtype).items():
        assert (tensor.shape, tensor.dtype) == (linear._buffers[leaf].shape, linear._buffers[leaf].dtype), leaf
        linear._buffers[leaf] = tensor
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", STORED)
def test_storage_is_what_quantizing_gives_at_any_width(name: str, shape: tuple[int, int], dtype: str) -> None:
    weight = gaussian(*shape)
    linear = quantized(name, weight, DTYPES[dtype])  # compares shapes and dtypes
    found = linear.dequantize()
    assert (found.shape, found.dtype) == (weight.shape, DTYPES[dtype])
    assert relative_error(found, weight) < 2 * MEASURED[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STORED)
def test_weight_errors_are_those_that_planning_counts_on(name: str, dtype: str) -> None:
    if not FORMATS[name].compute_class:
        assert FORMATS[name].weight_error == pytest.approx(MEASURED[name], rel=0.25)
    weight = gaussian(512, 1024).to(DTYPES[dtype])
    error = relative_error(quantized(name, weight, DTYPES[dtype]).dequantize(), weight)
    assert error == pytest.approx(MEASURED[name], rel=0.1)


@pytest.mark.parametrize("name", STORED)
def test_zeros_stay_zeros_and_outliers_keep_their_sign(name: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1, 3], weight[2, 5] = 1000.0, -1000.0
    found = quantized(name, weight, torch.float32).dequantize()
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], weight[0]) and torch.equal(found[3], weight[3])
    assert found[1, 3] > 400 and found[2, 5] < -400
    assert found[1].argmax() == 3 and found[2].argmin() == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "error"), [(3, 0.1775), (4, 0.0856), (5, 0.0455)])
def test_mixed_linears_round_to_the_nearest_level_of_the_best_scale(bits: int, error: float, dtype: str) -> None:
    weight = gaussian(130, 160).to(DTYPES[dtype])
    linear = MIXED_LINEARS[bits](nn.Linear(160, 130, bias=False, device="meta"), weight.dtype)
    linear._buffers.update(MIXED_LINEARS[bits].quantize(weight, weight.dtype))
    found = linear.dequantize()
    assert relative_error(found, weight) == pytest.approx(error, rel=0.02)
    scale = found.float().view(-1, 64).abs().amax(dim=1, keepdim=True)
    levels = Levels.normal(bits).values
    distance = (found.float().view(-1, 64)[:, :, None] / scale[:, :, None] - levels).abs().amin(dim=-1)
    is_whole = (found.float().view(-1, 64) / scale).amax(dim=1) == 1  # its largest is the last level
    assert is_whole.any() and distance[is_whole].max() < 0.01
    assert torch.equal(linear(weight), functional.linear(weight, found))


@pytest.mark.parametrize("bits", [3, 5])
def test_pieces_of_a_mixed_linear_give_what_the_whole_gives(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(96, 160)
    whole = MIXED_LINEARS[bits].quantize(weight, torch.bfloat16)
    monkeypatch.setattr(stored_linear, "PIECE_WEIGHTS", 64 * 31)
    pieces = MIXED_LINEARS[bits].quantize(weight, torch.bfloat16)
    assert all(torch.equal(whole[leaf], pieces[leaf]) for leaf in whole)


@pytest.mark.parametrize("name", STORED)
def test_pieces_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(96, 160)
    whole = STORED[name].quantize(weight, torch.bfloat16)
    monkeypatch.setattr(stored_linear, "PIECE_WEIGHTS", 64 * 31)
    pieces = STORED[name].quantize(weight, torch.bfloat16)
    assert whole.keys() == pieces.keys()
    for leaf in whole:
        assert torch.equal(whole[leaf].reshape(-1).view(torch.uint8), pieces[leaf].reshape(-1).view(torch.uint8)), leaf


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in STORED if not FORMATS[name].compute_class])
def test_forward_is_linear_with_the_dequantized_weight(name: str, dtype: str, bias: bool) -> None:
    kind = DTYPES[dtype]
    linear = quantized(name, gaussian(24, 96), kind, gaussian(24, seed=1) if bias else None)
    x = gaussian(2, 5, 96, seed=2).to(kind)
    assert torch.equal(linear(x), functional.linear(x, linear.dequantize(), linear.bias))
    assert linear(x).dtype == kind
    assert name in repr(linear)


# ----------------------------------------------------------------------------------------- the libraries' own


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "theirs"), [("int8", "qint8"), ("int4", "qint4")])
@pytest.mark.parametrize("shape", [(256, 512), (24, 96)], ids=str)
def test_values_are_those_of_optimum_quanto(
    name: str, theirs: str, dtype: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum import quanto
    from optimum.quanto.library.extensions import cpp

    # At first use it compiles an extension, for a minute, that takes nibbles apart, the low ones first.
    nibbles = SimpleNamespace(unpack=lambda packed, bits: torch.cat([packed & 15, packed >> 4]))
    monkeypatch.setattr(cpp.ext, "_lib", nibbles)
    weight = gaussian(*shape).to(DTYPES[dtype])
    holder = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=weight.dtype))
    with torch.no_grad():
        holder[0].weight.copy_(weight)
    quanto.quantize(holder, weights=getattr(quanto, theirs))
    quanto.freeze(holder)
    assert torch.equal(quantized(name, weight, weight.dtype).dequantize(), holder[0].weight.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 192), (96, 160), (33, 65), (300, 257)], ids=str)
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: str) -> None:
    from bitsandbytes import functional as bnb

    weight = gaussian(*shape).to(DTYPES[dtype])
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    ours = STORED["nf4"].quantize(weight, weight.dtype)
    theirs = (packed, state.absmax, state.state2.absmax, state.offset, state.code, state.state2.code)
    assert all(torch.equal(one, other) for one, other in zip(ours.values(), theirs, strict=True))
    if shape[1] % 64 == 0:  # else bitsandbytes 0.50.2 errs on a CPU
        found = quantized("nf4", weight, weight.dtype).dequantize()
        assert torch.equal(found, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("dtype", "apart"), [("fp32", 1e-5), ("fp16", 0.01), ("bf16", 0.08)])
def test_int8_is_llm_int8_but_for_where_the_scale_is_kept(dtype: str, apart: float) -> None:
    """Theirs is in fp32, ours in the compute dtype, which in bf16 costs a little."""
    from bitsandbytes import functional as bnb

    weight = gaussian(256, 512).to(DTYPES[dtype])
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    ours = STORED["int8"].quantize(weight, weight.dtype)["weight"]
    assert int((ours.int() - codes.int()).abs().max()) <= 1
    theirs = relative_error(codes.float() * absmax[:, None] / 127, weight)
    assert relative_error(quantized("int8", weight, weight.dtype).dequantize(), weight) == pytest.approx(
        theirs, rel=apart
    )


# --------------------------------------------------------------------------------------------------- in blocks


@pytest.mark.parametrize("name", STORED)
def test_conversion_leaves_no_linear_and_keeps_biases_and_norms(name: str, tiny_klein: Path) -> None:
    with init_empty_weights(include_buffers=False):
        config = Flux2Transformer2DModel.load_config(tiny_klein / "transformer")
        block = Flux2Transformer2DModel.from_config(config).transformer_blocks[0]
    before = dict(block.named_parameters())
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    convert(block, name, torch.bfloat16)
    after = {name for name, module in block.named_modules() if isinstance(module, StoredLinear)}
    assert after == linears
    assert not any(isinstance(module, nn.Linear) for module in block.modules())
    kept = dict(block.named_parameters())
    assert kept.keys() == {parameter for parameter in before if parameter.rpartition(".")[0] not in linears}
    assert all(tensor.is_meta for tensor in block.state_dict().values())


def test_an_unquantized_format_converts_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 4, device="meta"))
    convert(module, "bf16", torch.bfloat16)
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("format_name", [*STORED, "bf16"])
@pytest.mark.parametrize("model", ["flux2-dev", "flux2-klein-9b"])
def test_a_block_takes_the_bytes_that_planning_counts_on(model: str, format_name: str) -> None:
    spec = spec_from_configs(model, model, shipped_configs(model))
    dims = spec.transformer
    with init_empty_weights(include_buffers=False):
        net = Flux2Transformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=128,
            num_attention_heads=dims.hidden_size // 128,
            joint_attention_dim=spec.text_encoder.joint_dim,
            guidance_embeds=dims.guidance_embeds,
        )
    pairs = ((net.transformer_blocks[0], dims.double_block), (net.single_transformer_blocks[0], dims.single_block))
    for block, planned in pairs:
        convert(block, format_name, torch.bfloat16)
        size = layout_of(block, "", torch.bfloat16).total_bytes
        assert size == pytest.approx(FORMATS[format_name].block_bytes(planned), rel=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
@pytest.mark.parametrize("name", STORED)
def test_quantizing_takes_little_beside_the_weight(name: str) -> None:
    """Else dev's largest Linear, 648 MiB, would take several times that: bitsandbytes alone holds 28 bytes a weight."""
    weight = gaussian(4096, 4096).bfloat16()  # 32 MiB
    STORED[name].quantize(weight[:8], torch.bfloat16)  # what libraries load late
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = high_water()
    made = STORED[name].quantize(weight, torch.bfloat16)
    held = sum(tensor.nbytes for tensor in made.values())
    assert math.prod(weight.shape) * 2 == weight.nbytes
    assert high_water() - before < 2 * held + (128 << 20)


def high_water() -> int:
    """Peak RSS since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
