"""Every way of reading gives the file's bytes, whatever the offset, the length and where they go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.formats import SECTOR_BYTES
from lowmem_flux2.runtime import rawfile
from lowmem_flux2.runtime.layout import allocate
from lowmem_flux2.runtime.rawfile import RawFile

SIZE = 3 * 64 * 1024 + 777
HOST = torch.device("cpu")


@pytest.fixture(scope="module", params=["past the cache", "through the cache", "cached"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawFile]:
    """A file of ``SIZE`` bytes; small pieces, so that both readers have work."""
    path = tmp_path_factory.mktemp("raw") / "file"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if request.param != "cached" and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rawfile, "PIECE_BYTES", 16 * SECTOR_BYTES)
        patch.setattr(rawfile, "BOUNCE_BYTES", 2 * SECTOR_BYTES)
        patch.setattr(rawfile, "LEAST_DIRECT_BYTES", 1000)
        if request.param == "through the cache":
            patch.delattr(os, "O_DIRECT")
        with closing(RawFile(path)) as opened:
            yield opened


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    offset=st.one_of(st.integers(0, SIZE), st.integers(0, SIZE // SECTOR_BYTES).map(lambda n: n * SECTOR_BYTES)),
    length=st.integers(0, SIZE),
    shift=st.sampled_from([0, 1, 24, 256]),
    direct=st.booleans(),
)
def test_any_part_of_a_file_comes_as_it_is(file: RawFile, offset: int, length: int, shift: int, direct: bool) -> None:
    length = min(length, SIZE - offset)
    destination = allocate(length + shift, HOST)[shift:]
    seen: dict[int, bytes] = {}
    file.read_into(destination, offset, direct, lambda start, piece: seen.update({start: bytes(piece)}))
    wanted = file.path.read_bytes()[offset : offset + length]
    assert bytes(destination.numpy()) == wanted
    assert b"".join(seen[start] for start in sorted(seen)) == wanted
    assert all(start % rawfile.PIECE_BYTES == 0 for start in seen)


def test_many_threads_share_a_file(file: RawFile) -> None:
    wanted = file.path.read_bytes()

    def read(offset: int) -> bool:
        destination = torch.empty(SIZE - offset, dtype=torch.uint8)
        file.read_into(destination, offset, direct=bool(offset % 2))
        return bytes(destination.numpy()) == wanted[offset:]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 8000, 250)))


def test_values_may_be_of_any_dtype_and_alignment(file: RawFile) -> None:
    destination = torch.empty(1001, dtype=torch.int16)
    file.read_into(destination, 24)
    assert bytes(destination.numpy()) == file.path.read_bytes()[24 : 24 + 2002]


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_ends_early_is_named(file: RawFile, direct: bool) -> None:
    with pytest.raises(CheckpointBroken, match=r"raw0.*/file ended early|/file ended early"):
        file.read_into(torch.empty(SIZE, dtype=torch.uint8), 1, direct)


@pytest.mark.parametrize("direct", [False, True])
def test_a_disk_that_fails_is_named(file: RawFile, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointBroken, match=r"/file cannot be read: .*Input/output error"):
        file.read_into(torch.empty(SIZE, dtype=torch.uint8), 0, direct)


def test_what_refuses_a_piece_stops_both_readers(file: RawFile) -> None:
    seen: list[int] = []

    def refuse(start: int, piece: memoryview) -> None:
        seen.append(start)
        raise CheckpointBroken("no")

    with pytest.raises(CheckpointBroken, match="no"):
        file.read_into(torch.empty(SIZE, dtype=torch.uint8), 0, on_piece=refuse)
    assert len(seen) <= rawfile.READERS


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointBroken, match="gone cannot be opened"):
        RawFile(tmp_path / "gone")
