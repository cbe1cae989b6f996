"""Compiled blocks under streaming: each class is compiled once, whatever block and slot its weights are in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from stores import prepared
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend

from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import Blocks, transformer_blocks, transformer_on_meta
from lowmem_flux2.runtime.layout import BlockSource
from lowmem_flux2.runtime.quantize import STORED
from lowmem_flux2.runtime.streaming import BlockStreamer

CPU = torch.device("cpu")
DOUBLES, WIDTH, ROUNDS = 2, 64, 4
GPU, PINNED, PAGEABLE, DISK = Placement.GPU, Placement.PINNED, Placement.PAGEABLE, Placement.DISK
MIXED = (DISK, PINNED, GPU, DISK, PAGEABLE)


@pytest.fixture(autouse=True)
def forgets_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


@torch.no_grad()
def forward(streamer: BlockStreamer) -> tuple[list[torch.Tensor], list[set[int]]]:
    """Some rounds over the transformer's blocks: the output of each, and the addresses at which each block lay."""
    generator = torch.Generator().manual_seed(0)
    image, text = draw(generator, 1, 24, WIDTH), draw(generator, 1, 8, WIDTH)
    double, single = draw(generator, 1, 1, 6 * WIDTH), draw(generator, 1, 1, 3 * WIDTH)
    rope = (draw(generator, 32, 32), draw(generator, 32, 32))
    outputs, addresses = [], [set[int]() for _ in MIXED]
    for _ in range(ROUNDS):
        hidden, encoded = image, text
        for index, block in enumerate(streamer.round()):
            addresses[index].add(next(block.buffers(), next(block.parameters())).data_ptr())
            if index < DOUBLES:
                encoded, hidden = block(
                    hidden_states=hidden,
                    encoder_hidden_states=encoded,
                    temb_mod_img=double,
                    temb_mod_txt=double,
                    image_rotary_emb=rope,
                )
            else:
                hidden = torch.cat([encoded, hidden], dim=1) if index == DOUBLES else hidden
                hidden = block(hidden_states=hidden, encoder_hidden_states=None, temb_mod=single, image_rotary_emb=rope)
        outputs.append(hidden)
    return outputs, addresses


def streamed(
    blocks: Blocks, sources: Sequence[BlockSource], slots: int = 3
) -> tuple[list[torch.Tensor], list[set[int]]]:
    streamer = BlockStreamer(blocks.modules, sources, MIXED, CPU, slots, ROUNDS)
    slot = weakref.ref(streamer._slots[0].span.untyped_storage())
    try:
        return forward(streamer)
    finally:
        streamer.close()
        assert slot() is None  # nothing, compiled code least of all, keeps a slot


def compare(blocks: Blocks, sources: Sequence[BlockSource], backend: str) -> None:
    expected, _ = streamed(blocks, sources)
    compiled = CompileCounterWithBackend(backend)
    for block in blocks.modules:
        block.compile(backend=compiled, fullgraph=True)
    outputs, addresses = streamed(blocks, sources)
    # One a class, at its first block; nf4-mixed has blocks of a class with Linears in other bits.
    assert compiled.frame_count == len({tuple(map(type, block.modules())) for block in blocks.modules})
    for index, placed in enumerate(MIXED):
        assert len(addresses[index]) == (1 if placed is GPU else 3)  # and streamed blocks did move
    for found, wanted in zip(outputs, expected, strict=True):
        if backend == "eager":
            assert torch.equal(found, wanted)
        else:
            assert torch.allclose(found, wanted, atol=1e-4)
    with config.patch(error_on_recompile=True):
        assert torch.equal(streamed(blocks, sources)[0][-1], outputs[-1])  # nor do other slots recompile
        streamed(blocks, sources, slots=2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_are_those_of_the_checkpoint(backend: str, tiny_klein: Path) -> None:
    with TensorFile(tiny_klein / "transformer") as files:
        blocks = transformer_blocks(transformer_on_meta(tiny_klein / "transformer"))
        compare(blocks, blocks.sources(files, torch.float32), backend)


@pytest.mark.parametrize("weight_format", STORED)
def test_compiled_blocks_expand_stored_weights(weight_format: str, tiny_klein: Path, tmp_path: Path) -> None:
    blocks = transformer_blocks(transformer_on_meta(tiny_klein / "transformer"))
    compare(blocks, prepared(tiny_klein, tmp_path, weight_format).sources(blocks), "eager")
