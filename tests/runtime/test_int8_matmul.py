"""Linears in integers: exact products of what was rounded, in any pieces and shape, in the memory that is planned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.models import BlockSpec
from lowmem_flux2.runtime import int8_matmul
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.int8_matmul import int8_linear
from lowmem_flux2.runtime.live import LiveBytes
from lowmem_flux2.runtime.quantize import STORED

W8A8 = STORED["w8a8"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(rows: int, columns: int, dtype: torch.dtype, bias: bool = False) -> nn.Module:
    """A w8a8 Linear with Gaussian weights."""
    linear = W8A8(nn.Linear(columns, rows, bias=bias, device="meta"), dtype)
    linear._buffers.update(W8A8.quantize(gaussian(rows, columns) * 0.02, dtype))
    if bias:
        linear.bias = nn.Parameter(gaussian(rows, seed=1).to(dtype), requires_grad=False)
    return linear


def exact(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """The formula in fp64, of values and scales rounded as they are stored."""
    scales = (x.abs().amax(dim=-1, keepdim=True).float() / 127).clamp(min=int8_matmul.LEAST_SCALE)
    values = torch.round(x / scales).double()
    made = values @ linear.weight.double().t() * scales.double() * linear.scale.double().view(-1)
    return made if linear.bias is None else made + linear.bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (5, 33), (3, 1), (130, 160), (17, 8)])
def test_results_are_the_exact_ones_rounded(rows: int, columns: int, tokens: int, bias: bool, dtype: str) -> None:
    kind = DTYPES[dtype]
    linear, x = stored(rows, columns, kind, bias), gaussian(tokens, columns, seed=2).to(kind)
    found, wanted = linear(x), exact(x, linear)
    assert found.dtype == kind and found.shape == (tokens, rows)
    rounding = torch.finfo(kind).eps + 4 * torch.finfo(torch.float32).eps  # of the result, and of the scaling before
    assert ((found.double() - wanted).abs() <= rounding * wanted.abs() + 1e-6 * wanted.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_depends_on_nothing_but_its_row(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the batch, not on chunks, not on the pieces that are worked off: bit for bit."""
    kind = DTYPES[dtype]
    linear, x = stored(72, 96, kind, bias=True), gaussian(3, 50, 96, seed=3).to(kind)
    whole = linear(x)
    assert torch.equal(torch.cat([linear(each) for each in x.split(1)]), whole)
    assert torch.equal(torch.cat([linear(each) for each in x.split(7, dim=1)], dim=1), whole)
    for tokens, rows in ((64, 72), (20, 16), (33, 40)):
        monkeypatch.setattr(int8_matmul, "INT8_TOKENS", tokens)
        monkeypatch.setattr(int8_matmul, "INT8_ROWS", rows)
        assert torch.equal(linear(x), whole)


def test_it_is_the_linear_of_its_weights_but_for_its_inputs_rounding() -> None:
    linear, x = stored(256, 1024, torch.float32), gaussian(64, 1024, seed=4)
    wanted = x @ linear.dequantize().t()
    assert 0.004 < float((linear(x) - wanted).norm() / wanted.norm()) < 0.012
    assert torch.equal(linear.dequantize(), STORED["int8"].dequantize(linear))


def test_outliers_of_a_token_stay_its_own() -> None:
    linear, x = stored(64, 128, torch.float32), gaussian(4, 128, seed=5)
    found = linear(x)
    x[1, 7] = 1e4
    assert torch.equal(linear(x)[[0, 2, 3]], found[[0, 2, 3]])


def test_zeros_give_the_bias_and_what_is_not_finite_stays_so() -> None:
    linear = stored(24, 32, torch.bfloat16, bias=True)
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    assert torch.equal(linear(x), linear.bias.expand(3, -1))
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    found = linear(x)
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1:]).any()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 256), (256, 2048), (20480, 64)])
@pytest.mark.parametrize("tokens", [100, 1200])
def test_pieces_take_the_bytes_that_are_planned(rows: int, columns: int, tokens: int, dtype: str) -> None:
    kind = DTYPES[dtype]
    weight = torch.zeros(rows, columns, dtype=torch.int8)
    scale, x = torch.ones(rows, 1, dtype=kind), torch.ones(tokens, columns, dtype=kind)
    with LiveBytes() as live:
        int8_linear(x, weight, scale)
    planned = FORMATS["w8a8"].pieces_bytes(rows, columns, tokens) + tokens * rows * kind.itemsize
    assert live.peak_bytes["cpu"] == pytest.approx(planned, rel=0.03)


def test_a_transient_does_not_grow_with_the_weight_beyond_its_sides() -> None:
    def transient(side: int) -> int:
        return FORMATS["w8a8"].transient_bytes(BlockSpec("single", linears=((side, side),), others=()))

    assert transient(4096) < 2.1 * transient(2048)
    assert transient(6144) < FORMATS["int8"].transient_bytes(BlockSpec("single", linears=((6144, 6144),), others=()))
