"""TensorFile reads what safetensors reads, and says what is wrong where it cannot."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.runtime import checkpoint
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.decoding import TORCH_DTYPES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EMBEDDING = "model.embed_tokens.weight"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def component(tmp_path: Path) -> Path:
    """A component folder with one tensor of each kind, for tests that write into it."""
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    tensors = {f"{dtype}": values.to(dtype) for dtype in DTYPES}
    tensors |= {"count": torch.tensor(5), "flags": torch.tensor([True, False]), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_reads_every_tensor_of_a_component(part: str, tiny_klein: Path) -> None:
    expected = stored(tiny_klein / part)
    with TensorFile(tiny_klein / part) as files:
        assert set(files.names()) == set(expected)
        for name, tensor in expected.items():
            destination = torch.empty_like(tensor)
            files.read_into(name, destination)
            assert files.shape(name) == tuple(tensor.shape)
            assert torch.equal(destination, tensor)


@pytest.mark.parametrize("asked", DTYPES, ids=str)
@pytest.mark.parametrize("held", DTYPES, ids=str)
def test_converts_as_torch_does_in_small_pieces(
    held: torch.dtype, asked: torch.dtype, component: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CONVERT_BYTES", 64)  # pieces that end inside rows
    destination = torch.empty(7, 33, dtype=asked)
    with TensorFile(component) as files:
        files.read_into(str(held), destination)
    assert torch.equal(destination, stored(component)[str(held)].to(asked))


@pytest.mark.parametrize("name", ["count", "flags", "empty"])
def test_reads_scalars_flags_and_empty_tensors(name: str, component: Path) -> None:
    expected = stored(component)[name]
    destination = torch.empty_like(expected)
    with TensorFile(component) as files:
        files.read_into(name, destination)
    assert torch.equal(destination, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_rows_like_an_embedding(dtype: torch.dtype, tiny_klein: Path) -> None:
    table = stored(tiny_klein / "text_encoder")[EMBEDDING]
    rows = torch.tensor([3, 0, len(table) - 1, 3])
    with TensorFile(tiny_klein / "text_encoder") as files:
        assert torch.equal(files.read_rows(EMBEDDING, rows, dtype), table[rows].to(dtype))
        assert files.read_rows(EMBEDDING, rows[:0], dtype).shape == (0, table.shape[1])


@pytest.mark.parametrize("row", [-1, tiny.VOCAB])
def test_refuses_a_row_outside_the_table(row: int, tiny_klein: Path) -> None:
    with (
        TensorFile(tiny_klein / "text_encoder") as files,
        pytest.raises(CheckpointBroken, match="of different models"),
    ):
        files.read_rows(EMBEDDING, torch.tensor([1, row]), torch.float32)


def test_reads_shards_through_the_index(tmp_path: Path) -> None:
    folder = tiny.write_klein(tmp_path / "sharded", shard_bytes=300_000) / "transformer"
    expected = stored(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    with TensorFile(folder) as files:
        assert set(files.names()) == set(expected)
        for name, tensor in expected.items():
            destination = torch.empty_like(tensor)
            files.read_into(name, destination)
            assert torch.equal(destination, tensor)


def test_threads_read_side_by_side(tiny_klein: Path) -> None:
    expected = stored(tiny_klein / "transformer")

    def right(name: str) -> bool:
        destination = torch.empty_like(expected[name])
        files.read_into(name, destination)
        return torch.equal(destination, expected[name])

    with TensorFile(tiny_klein / "transformer") as files, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, list(expected) * 5))


def test_reads_without_preadv(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(checkpoint, "CONVERT_BYTES", 1000)  # several reads a tensor
    test_threads_read_side_by_side(tiny_klein)


def test_names_the_missing_tensor(component: Path) -> None:
    with TensorFile(component) as files, pytest.raises(CheckpointBroken, match=r"lack the tensor 'proj\.weight'"):
        files.read_into("proj.weight", torch.empty(1))


def test_refuses_another_shape(component: Path) -> None:
    message = r"shape \[7, 33\], the config implies \[33, 7\]"
    with TensorFile(component) as files, pytest.raises(CheckpointBroken, match=message):
        files.read_into("torch.float32", torch.empty(33, 7))


def test_refuses_a_dtype_it_does_not_read(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4).to(torch.uint16)}, tmp_path / "model.safetensors")
    with TensorFile(tmp_path) as files, pytest.raises(CheckpointBroken, match="U16, which is not read here"):
        files.read_into("weight", torch.empty(4))


def test_a_file_cut_while_it_is_read_is_broken(component: Path) -> None:
    path = component / "model.safetensors"
    with TensorFile(component) as files:
        os.truncate(path, path.stat().st_size - 8)
        last = max(files.names(), key=lambda name: files._tensors[name].place.info.end)
        with pytest.raises(CheckpointBroken, match=r"model.safetensors ended early"):
            files.read_into(last, torch.empty(files.shape(last), dtype=stored_dtype(files, last)))


def stored_dtype(files: TensorFile, name: str) -> torch.dtype:
    return TORCH_DTYPES[files._tensors[name].place.info.dtype]


def test_closes_what_it_opened(tmp_path: Path, tiny_klein: Path) -> None:
    before = open_descriptors()
    with TensorFile(tiny_klein / "transformer"):
        assert open_descriptors() - before in (1, 2)  # through the page cache, and past it where that is possible
    assert open_descriptors() == before
    folder = tmp_path / "transformer"
    shutil.copytree(tiny.write_klein(tmp_path / "sharded", shard_bytes=300_000) / "transformer", folder)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(CheckpointBroken):
        TensorFile(folder)
    assert open_descriptors() == before
