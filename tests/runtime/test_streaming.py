"""The streamer hands out the right weights in place, in every placement, from slots that never move."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import Blocks as Component
from lowmem_flux2.runtime.layout import allocate, layout_of, load_module
from lowmem_flux2.runtime.streaming import BlockStreamer

CPU = torch.device("cpu")
COUNT = 5  # blocks of the tiny transformer: 2 double, 3 single
MIXTURES = {
    **{placement.value: (placement,) * COUNT for placement in Placement},
    "mixed": (Placement.GPU, Placement.PINNED, Placement.DISK, Placement.PAGEABLE, Placement.DISK),
    "resident last": (Placement.DISK, Placement.PAGEABLE, Placement.PINNED, Placement.GPU, Placement.GPU),
    "one streamed": (Placement.GPU, Placement.GPU, Placement.DISK, Placement.GPU, Placement.GPU),
}


@dataclass(frozen=True)
class Blocks:
    """The tiny transformer's blocks on meta, and what their weights must be."""

    folder: Path
    modules: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]
    stored: dict[str, torch.Tensor]

    def streamer(
        self,
        placements: tuple[Placement, ...],
        slots: int,
        files: TensorFile,
        dtype: torch.dtype = torch.float32,
        rounds: int = 100,
    ) -> BlockStreamer:
        sources = Component(self.modules, self.prefixes).sources(files, dtype)
        return BlockStreamer(self.modules, sources, placements, CPU, slots, rounds, warn=pytest.fail)

    def check(self, index: int, block: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """The block handed out is the one of this index, and all of its weights are right and aligned."""
        assert block is self.modules[index]
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, self.stored[self.prefixes[index] + name].to(dtype)), (index, name)
            assert tensor.data_ptr() % 256 == 0


def open_blocks(folder: Path) -> Blocks:
    with init_empty_weights(include_buffers=False):
        net = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder)).eval()
    doubles, singles = net.transformer_blocks, net.single_transformer_blocks
    prefixes = [f"transformer_blocks.{i}." for i in range(len(doubles))]
    prefixes += [f"single_transformer_blocks.{i}." for i in range(len(singles))]
    stored = {}
    for path in folder.glob("*.safetensors"):  # cloned: load_file maps the file, which some tests cut
        stored |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    assert len(prefixes) == COUNT
    return Blocks(folder, (*doubles, *singles), tuple(prefixes), stored)


@pytest.fixture(scope="module")
def blocks(tiny_klein: Path) -> Blocks:
    return open_blocks(tiny_klein / "transformer")


@pytest.fixture(scope="module")
def files(tiny_klein: Path) -> Iterator[TensorFile]:
    with TensorFile(tiny_klein / "transformer") as opened:
        yield opened


def prefetched(streamer: BlockStreamer) -> None:
    """Wait until every copy that has been issued is done: what is in use now must survive it."""
    streamer._worker.submit(lambda: None).result(timeout=20)


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("block-reader")]


def check_rounds(blocks: Blocks, streamer: BlockStreamer, rounds: int, dtype: torch.dtype = torch.float32) -> set[int]:
    """Run whole rounds; return the addresses at which streamed blocks were found."""
    seen = set()
    for _ in range(rounds):
        handed = 0
        for index, block in enumerate(streamer.round()):
            prefetched(streamer)
            blocks.check(index, block, dtype)
            if streamer._placements[index] is not Placement.GPU:
                seen.add(next(block.parameters()).data_ptr())
            handed += 1
        assert handed == COUNT
    return seen


@pytest.mark.parametrize("slots", [1, 2, 3, COUNT + 2])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_each_round_hands_out_each_block_with_its_weights(
    mixture: str, slots: int, blocks: Blocks, files: TensorFile
) -> None:
    streamer = blocks.streamer(MIXTURES[mixture], slots, files)
    try:
        addresses = [slot.span.data_ptr() for slot in streamer._slots]
        streamed = COUNT - MIXTURES[mixture].count(Placement.GPU)
        assert len(addresses) == min(slots, streamed)
        seen = check_rounds(blocks, streamer, rounds=3)
        assert seen <= set(addresses)  # every streamed block lay in a slot, and no slot was made anew
        assert [slot.span.data_ptr() for slot in streamer._slots] == addresses
    finally:
        streamer.close()


@settings(max_examples=40, deadline=None)
@given(
    placements=st.tuples(*[st.sampled_from(Placement)] * COUNT),
    slots=st.integers(1, COUNT + 1),
    rounds=st.integers(1, 4),
)
def test_any_mixture_of_placements_and_slots_is_right(
    blocks: Blocks, files: TensorFile, placements: tuple[Placement, ...], slots: int, rounds: int
) -> None:
    streamer = blocks.streamer(placements, slots, files)
    try:
        assert len(check_rounds(blocks, streamer, rounds)) <= slots
    finally:
        streamer.close()


@pytest.mark.parametrize("mixture", ["mixed", "disk"])
def test_weights_are_converted_on_their_way(mixture: str, blocks: Blocks, files: TensorFile) -> None:
    streamer = blocks.streamer(MIXTURES[mixture], 2, files, torch.bfloat16)
    try:
        check_rounds(blocks, streamer, 2, torch.bfloat16)
    finally:
        streamer.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_nothing_is_read_beyond_the_announced_rounds(
    slots: int, blocks: Blocks, files: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    bring = BlockStreamer._bring
    monkeypatch.setattr(
        BlockStreamer, "_bring", lambda self, index, slot: (reads.append(index), bring(self, index, slot))
    )
    streamer = blocks.streamer(MIXTURES["disk"], slots, files, rounds=2)
    check_rounds(blocks, streamer, 2)
    assert len(reads) == 2 * COUNT
    check_rounds(blocks, streamer, 1)  # one more than announced still works
    assert len(reads) == 3 * COUNT
    streamer.close()


def test_streams_from_shards(tmp_path: Path) -> None:
    folder = tiny.write_klein(tmp_path / "sharded", shard_bytes=300_000) / "transformer"
    sharded = open_blocks(folder)
    with TensorFile(folder) as files:
        streamer = sharded.streamer(MIXTURES["mixed"], 2, files)
        try:
            check_rounds(sharded, streamer, 2)
        finally:
            streamer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_streamed_forward_equals_resident_forward(
    mixture: str, dtype: torch.dtype, blocks: Blocks, files: TensorFile
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 24, 64, generator=generator).to(dtype)
    modulation = torch.randn(1, 1, 3 * 64, generator=generator).to(dtype)

    def forward(placements: tuple[Placement, ...], slots: int) -> list[torch.Tensor]:
        streamer = blocks.streamer(placements, slots, files, dtype)
        hidden, results = tokens, []
        try:
            for _ in range(2):
                for index, block in enumerate(streamer.round()):
                    if index >= 2:  # single-stream blocks
                        hidden = block(hidden, None, temb_mod=modulation, image_rotary_emb=None)
                        results.append(hidden)
        finally:
            streamer.close()
        return results

    with torch.no_grad():
        resident = forward(MIXTURES["gpu"], 0)
        streamed = forward(MIXTURES[mixture], 2)
    assert len(resident) == len(streamed) == 6
    assert all(torch.equal(one, other) for one, other in zip(streamed, resident, strict=True))
    assert not torch.equal(resident[0], resident[3])


def test_slots_are_as_large_as_the_largest_streamed_block(blocks: Blocks, files: TensorFile) -> None:
    """Of a mixture, not of all blocks: resident double-stream blocks let the slots shrink to single-stream ones."""
    sizes = [layout_of(module, "", torch.float32).total_bytes for module in blocks.modules]
    assert sizes[0] > sizes[-1]
    for resident, largest in ((2, sizes[-1]), (1, sizes[0])):
        placements = (Placement.GPU,) * resident + (Placement.DISK,) * (COUNT - resident)
        streamer = blocks.streamer(placements, 2, files)
        assert [slot.span.numel() for slot in streamer._slots] == [largest] * 2
        streamer.close()


def test_close_returns_modules_to_meta_and_frees_slots(blocks: Blocks, files: TensorFile) -> None:
    streamer = blocks.streamer(MIXTURES["mixed"], 2, files)
    check_rounds(blocks, streamer, 1)
    streamer.close()
    for block in blocks.modules:
        assert all(tensor.is_meta for tensor in block.state_dict().values())
    assert not streamer._slots and not streamer._spans
    assert not reader_threads()
    streamer.close()  # twice is harmless


def test_close_in_the_middle_of_a_round(blocks: Blocks, files: TensorFile) -> None:
    streamer = blocks.streamer(MIXTURES["disk"], 2, files)
    handing_out = streamer.round()
    blocks.check(0, next(handing_out))
    streamer.close()
    handing_out.close()
    assert not reader_threads()


@pytest.mark.parametrize("slots", [1, 2])
def test_a_file_cut_under_the_reader_ends_the_round(slots: int, tmp_path: Path, tiny_klein: Path) -> None:
    folder = tmp_path / "transformer"
    shutil.copytree(tiny_klein / "transformer", folder)
    cut = open_blocks(folder)
    with TensorFile(folder) as files:
        streamer = cut.streamer(MIXTURES["disk"], slots, files)
        try:
            check_rounds(cut, streamer, 1)
            os.truncate(folder / "diffusion_pytorch_model.safetensors", 4096)
            with pytest.raises(CheckpointBroken, match="ended early"):
                check_rounds(cut, streamer, 2)
        finally:
            streamer.close()
    assert not reader_threads()


@pytest.mark.parametrize("placement", [Placement.GPU, Placement.PAGEABLE])
def test_a_file_cut_while_loading_leaves_nothing_behind(placement: Placement, tmp_path: Path, tiny_klein: Path) -> None:
    folder = tmp_path / "transformer"
    shutil.copytree(tiny_klein / "transformer", folder)
    cut = open_blocks(folder)
    with TensorFile(folder) as files:
        path = folder / "diffusion_pytorch_model.safetensors"
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointBroken, match="ended early"):
            cut.streamer((placement,) * COUNT, 2, files)
    assert all(tensor.is_meta for block in cut.modules for tensor in block.state_dict().values())
    assert not reader_threads()


def test_refuses_lengths_that_differ_and_no_slots(blocks: Blocks, files: TensorFile) -> None:
    with pytest.raises(ValueError, match="5 blocks, 5 sources, 1 placements"):
        blocks.streamer((Placement.GPU,), 1, files)
    with pytest.raises(ValueError, match="at least one slot"):
        blocks.streamer(MIXTURES["mixed"], 0, files)


def test_layout_is_aligned_contiguous_and_complete(blocks: Blocks) -> None:
    for block, prefix in zip(blocks.modules, blocks.prefixes, strict=True):
        layout = layout_of(block, prefix, torch.bfloat16)
        assert [place.name for place in layout.places] == list(block.state_dict())
        end = 0
        for place in layout.places:
            assert place.offset % 256 == 0
            assert 0 <= place.offset - end < 256  # no overlap, and no gap but the padding
            end = place.offset + 2 * torch.Size(place.shape).numel()
        assert end <= layout.total_bytes < end + 4096 and layout.total_bytes % 4096 == 0


@given(st.integers(0, 5000))
def test_allocations_are_aligned(size_bytes: int) -> None:
    span = allocate(size_bytes, CPU)
    assert span.numel() == size_bytes
    assert span.data_ptr() % 256 == 0


def test_load_module_keeps_integer_buffers(tiny_klein: Path) -> None:
    norm = nn.BatchNorm2d(4 * tiny.LATENT_CHANNELS, affine=False, device="meta")
    with TensorFile(tiny_klein / "vae") as files:
        load_module(norm, "bn.", files, torch.bfloat16, CPU)
    assert norm.running_mean is not None and norm.running_mean.dtype is torch.bfloat16
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.dtype is torch.int64
