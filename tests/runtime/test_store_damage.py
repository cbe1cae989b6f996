"""Damage in the prepared store: found, named, and mended by the run that comes upon it."""

from __future__ import annotations

import itertools
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stores import Told, contents, entries, flip, found, latents, prepared

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.runtime import blockfile
from lowmem_flux2.runtime.blockfile import BlockDamaged, StoredBlock, block_path
from lowmem_flux2.runtime.cache import MANIFEST, EntryDamaged
from lowmem_flux2.runtime.layout import Layout, allocate
from lowmem_flux2.runtime.store import Manifest, PreparedStore

HOST = torch.device("cpu")


@pytest.mark.parametrize("placement", ["resident", "pageable", "disk"])
def test_a_flipped_bit_is_named_when_a_run_loads_it(tiny_klein: Path, tmp_path: Path, placement: str) -> None:
    made = latents(tiny_klein, tmp_path, "int8")
    entry = found(tiny_klein, tmp_path)
    assert entry is not None
    draw = random.Random(placement)
    for index, size in enumerate(entry.manifest.block_bytes):
        bit = {0: 0, 1: 8 * size - 1}.get(index, draw.randrange(8 * size))  # the first, the last, and any
        path = block_path(entry.folder, index)
        flip(path, bit)
        message = rf"block-{index:03d}\.bin is damaged: bytes 0 to {size} "
        with pytest.raises(CheckpointBroken, match=f"{message}.*prepare --remove {entry.folder.name} "):
            latents(tiny_klein, tmp_path, "int8", placement, may_prepare=False)
        told = Told()
        assert torch.equal(latents(tiny_klein, tmp_path, "int8", placement, observer=told), made)
        assert len(told.events) == 1 and told.events[0].endswith(": prepared anew") and "\n" not in told.events[0]
        assert list(entry.verify()) == []


@pytest.mark.parametrize("fault", ["manifest", "gone", "cut"])
def test_a_damaged_entry_is_made_whole_again(tiny_klein: Path, tmp_path: Path, fault: str) -> None:
    made = latents(tiny_klein, tmp_path, "int8")
    entry = found(tiny_klein, tmp_path)
    assert entry is not None
    first, last = (block_path(entry.folder, index) for index in (0, len(entry.manifest.block_bytes) - 1))
    kept = first.stat().st_ino
    if fault == "manifest":
        flip(entry.folder / "manifest.json", 800)
    elif fault == "gone":
        last.unlink()
    else:
        os.truncate(last, 4096)
    with pytest.raises(CheckpointBroken, match=f"prepare --remove {entry.folder.name} "):
        latents(tiny_klein, tmp_path, "int8", may_prepare=False)
    events: list[str] = []
    assert prepared(tiny_klein, tmp_path, on_event=events.append) == entry
    assert len(events) == 1 and events[0].endswith(": prepared anew")
    assert first.stat().st_ino == kept  # what is whole is not made again
    assert torch.equal(latents(tiny_klein, tmp_path, "int8", may_prepare=False), made)


def test_damage_in_every_block_of_every_store_is_mended_in_one_run(tiny_klein: Path, tmp_path: Path) -> None:
    whole = latents(tiny_klein, tmp_path, "int8", "disk")
    before = {name: contents(tmp_path / "prepared" / name) for name in entries(tmp_path)}
    for name, blocks in before.items():
        for block in blocks:
            flip(tmp_path / "prepared" / name / block, 77)
    told = Told()
    assert torch.equal(latents(tiny_klein, tmp_path, "int8", "disk", observer=told), whole)
    assert len(told.events) == sum(map(len, before.values()))
    assert {name: contents(tmp_path / "prepared" / name) for name in entries(tmp_path)} == before


def test_an_entry_of_another_release_is_made_anew(tiny_klein: Path, tmp_path: Path) -> None:
    """Equal sizes, another order: only the names tell."""
    whole = latents(tiny_klein, tmp_path, "int8")
    made = found(tiny_klein, tmp_path)
    assert made is not None
    (made.folder / MANIFEST).write_text(replace(made.manifest, layout="other").text())
    told = Told()
    assert torch.equal(latents(tiny_klein, tmp_path, "int8", observer=told), whole)
    assert len(told.events) == 1 and "another release of diffusers" in told.events[0]
    assert found(tiny_klein, tmp_path) == made


def test_what_another_process_has_mended_is_left_alone(tiny_klein: Path, tmp_path: Path) -> None:
    made = prepared(tiny_klein, tmp_path)
    layout = Layout((), made.manifest.block_bytes[1])
    block = StoredBlock(layout, block_path(made.folder, 1), made.manifest.checksums[1])
    assert prepared(tiny_klein, tmp_path, damage=BlockDamaged(block, "seen before"), on_block=pytest.fail) == made


def test_a_disk_that_damages_what_is_made_anew_ends_the_run(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents(tiny_klein, tmp_path, "int8")
    numbers = itertools.count()
    monkeypatch.setattr(blockfile, "zlib", SimpleNamespace(crc32=lambda piece: next(numbers)))
    told = Told()
    with pytest.raises(EntryDamaged, match=r"block-000\.bin is damaged"):
        latents(tiny_klein, tmp_path, "int8", observer=told)
    assert len(told.events) == 1


def test_damage_is_narrowed_down_to_a_piece_and_its_tensors(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rawfile", "blockfile"):
        monkeypatch.setattr(f"lowmem_flux2.runtime.{module}.PIECE_BYTES", 4096)
    made = prepared(tiny_klein, tmp_path)
    from lowmem_flux2.planning.sources import resolve_model
    from lowmem_flux2.runtime.checkpoint import TensorFile
    from lowmem_flux2.runtime.conversion import Conversion

    with TensorFile(tiny_klein / "transformer") as files:
        spec = resolve_model(str(tiny_klein), offline=True).spec
        job = Conversion.of(tiny_klein, spec, "transformer", "int8", torch.float32, files)
        source = StoredBlock(job.layouts[1], block_path(made.folder, 1), made.manifest.checksums[1])
    span = allocate(job.layouts[1].total_bytes, HOST)
    for place in job.layouts[1].places:
        flip(source.path, 8 * place.offset + 3)
        with pytest.raises(CheckpointBroken) as caught:
            source.read_into(span)
        start, stop = (int(word) for word in str(caught.value).split(": bytes ")[1].split(" are ")[0].split(" to "))
        assert start <= place.offset < stop == start + 4096
        flip(source.path, 8 * place.offset + 3)
        first = max((other for other in job.layouts[1].places if other.offset <= start), key=lambda at: at.offset)
        assert f", in {first.name}" in str(caught.value)


def test_a_block_is_checked_when_it_is_first_read_and_not_again(tiny_klein: Path, tmp_path: Path) -> None:
    made = prepared(tiny_klein, tmp_path)
    source = StoredBlock(None, block_path(made.folder, 0), made.manifest.checksums[0])  # type: ignore[arg-type]
    span = allocate(made.manifest.block_bytes[0], HOST)
    source.read_into(span)
    flip(source.path, 5)
    source.read_into(span, direct=True)
    assert source.path.read_bytes() != contents(prepared(tiny_klein, tmp_path / "whole").folder)["block-000.bin"]
    assert len(list(made.verify())) == 1


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(tiny_klein: Path, tmp_path: Path) -> None:
    made = prepared(tiny_klein, tmp_path)
    path = made.folder / MANIFEST
    draw = random.Random(0)
    for bit in draw.sample(range(8 * path.stat().st_size), 300):
        flip(path, bit)
        with pytest.raises(CheckpointBroken, match=r"manifest\.json is damaged .*prepare --remove"):
            PreparedStore.open(made.folder)
        flip(path, bit)
    assert PreparedStore.open(made.folder) == made


def test_a_manifest_comes_back_as_it_was_written(tiny_klein: Path, tmp_path: Path) -> None:
    made = prepared(tiny_klein, tmp_path)
    assert made.manifest.text() == (made.folder / MANIFEST).read_text()
    assert Manifest.read(made.folder) == made.manifest
    assert json.loads(made.manifest.text())["source"] == str(tiny_klein.resolve())
