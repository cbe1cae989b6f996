"""Pinned memory: never more than may be, and one warning with a number where the system refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel

from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import transformer_blocks
from lowmem_flux2.runtime.pinning import Pinning
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.transport import HostTransport

CPU = torch.device("cpu")
PLENTY = 1 << 40


class Card(HostTransport):
    """A device of its own, as the streamer sees it: copies go through pinned memory, which may be refused."""

    is_asynchronous = True

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.pinned: list[int] = []
        self.asked = 0

    def pin(self, span: torch.Tensor) -> str | None:
        self.asked += 1
        if self.refusal is None:
            self.pinned.append(span.numel())
        return self.refusal

    def unpin(self, span: torch.Tensor) -> None:
        self.pinned.remove(span.numel())


def stream(folder: Path, placement: Placement, card: Card, pinning: Pinning | None, told: list[str]) -> int:
    """Two rounds over the tiny transformer's blocks; the bytes that were pinned meanwhile."""
    with init_empty_weights(include_buffers=False):
        net = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder)).eval()
    blocks = transformer_blocks(net)
    with TensorFile(folder) as files:
        sources = blocks.sources(files, torch.float32)
        placements = [placement] * len(sources)
        streamer = BlockStreamer(blocks.modules, sources, placements, CPU, 2, 2, told.append, card, pinning)
        held = sum(card.pinned)
        for _ in range(2):
            assert len(list(streamer.round())) == len(sources)
        streamer.close()
    assert card.pinned == []
    return held


@pytest.mark.parametrize("placement", [Placement.PINNED, Placement.DISK])
def test_a_refusal_is_told_once_with_what_it_costs(placement: Placement, tiny_klein: Path) -> None:
    told: list[str] = []
    card = Card("CUDA error 2")
    assert stream(tiny_klein / "transformer", placement, card, Pinning(PLENTY, 25e9, 10e9), told) == 0
    (line,) = told
    assert "CUDA error 2" in line
    assert "planned at 10.0 GB/s in place of 25.0 GB/s, so 2.5 times slower" in line
    assert "ulimit -l" in line


@pytest.mark.parametrize("placement", [Placement.PINNED, Placement.DISK])
def test_no_more_is_pinned_than_may_be(placement: Placement, tiny_klein: Path) -> None:
    told: list[str] = []
    folder = tiny_klein / "transformer"
    whole = stream(folder, placement, Card(), Pinning(PLENTY, 25e9, 10e9), told)
    assert whole > 0
    assert stream(folder, placement, Card(), Pinning(whole, 25e9, 10e9), told) == whole
    short = stream(folder, placement, Card(), Pinning(whole - 1, 25e9, 10e9), told)
    assert short < whole
    none = Card()
    assert stream(folder, placement, none, Pinning(0, 25e9, 10e9), told) == 0
    assert none.asked == 0
    assert told == []  # the plan knows it
