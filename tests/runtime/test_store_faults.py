"""What goes wrong around the prepared store: deaths, disks, permissions, and sources that change."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stores import contents, entries, found, latents, prepared, weights_of

from lowmem_flux2.errors import CheckpointBroken, DoesNotFit, LowMemFlux2Error, UsageError
from lowmem_flux2.runtime import prepare as preparation
from lowmem_flux2.runtime.cache import PARTIAL, locked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits, mounts and signals as Linux has them")


@pytest.fixture
def source(tiny_klein: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny_klein, tmp_path / "source"))


def leavings(cache: Path) -> list[str]:
    """Files that are no part of any entry, finished or not."""
    kept = (".bin", ".json", ".lock", ".txt")
    return [path.name for path in cache.rglob("*") if path.is_file() and path.suffix not in kept]


# ------------------------------------------------------------------------------------------------------- deaths


def prepare_slowly(source: Path, cache: Path, began: Connection) -> None:
    """Prepare in this process, with a pause at every sync: a file's, its checksums', the manifest's, the folder's."""
    synced = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.004)
        synced(descriptor)

    os.fsync = slow
    prepared(source, cache, on_start=began.send)
    began.send("done")


def test_killed_at_ten_random_points_the_next_run_makes_the_same_bytes(tiny_klein: Path, tmp_path: Path) -> None:
    """Each victim is a process of a server that never ran anything else: it shares nothing with this one."""
    whole = contents(prepared(tiny_klein, tmp_path / "whole").folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowmem_flux2.runtime.prepare", "stores", "test_store_faults"])
    draw = random.Random(0)

    def victim(cache: Path, lives_s: float | None) -> float:
        ours, theirs = context.Pipe()
        process = context.Process(target=prepare_slowly, args=(tiny_klein, cache, theirs), daemon=True)
        process.start()
        assert ours.recv() == 5
        start = time.perf_counter()
        if lives_s is None:
            assert ours.recv() == "done"
        else:
            time.sleep(lives_s)
            process.kill()  # SIGKILL
        process.join(20)
        return time.perf_counter() - start

    takes_s = victim(tmp_path / "undisturbed", None)
    done = set()
    for attempt in range(10):
        cache = tmp_path / str(attempt)
        victim(cache, draw.uniform(0, takes_s))
        done.add(len(list(cache.rglob("*.bin"))))
        made = prepared(tiny_klein, cache)
        assert contents(made.folder) == whole
        assert list(made.verify()) == []
        assert entries(cache) == [made.folder.name]
        assert leavings(cache) == []
    assert len(done) > 2, f"killed too often at the same point: with {done} blocks done"


def test_a_killed_command_is_taken_up_by_the_next(tiny_klein: Path, cache: Path) -> None:
    """The command line itself, killed when its first block is there."""
    whole = latents(tiny_klein, cache / "whole", "int8")
    command = [sys.executable, "-m", "lowmem_flux2", "prepare", "-m", str(tiny_klein), "--device", "cpu"]
    command += ["--dtype", "fp32", "--weight-format", "int8", "--cache-dir", str(cache), "--component", "text_encoder"]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not list(cache.glob("prepared/.partial-*/*.bin")) and time.monotonic() < until and victim.poll() is None:
            time.sleep(0.001)
    finally:
        victim.kill()
        victim.wait(20)
    assert list(cache.glob("prepared/*text_encoder*/*.bin"))
    assert torch.equal(latents(tiny_klein, cache, "int8"), whole)
    assert leavings(cache) == []


def test_a_lock_whose_file_goes_with_it_still_keeps_others_out(tmp_path: Path) -> None:
    """Who waits on a file that its holder removes must not hold it beside one who has made it anew."""
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            with locked(tmp_path / "entry", on_wait=lambda: None):
                inside.append(number)
                time.sleep(0)  # lets another in, if it can come in
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert max(most) == 1 and len(most) == 600
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- disks


class SmallDisk:
    """A file system of its own that can be filled up; where none may be mounted, a limit on what a file may have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "lowmem-flux2-test", str(folder)]
        self.is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left_bytes: int) -> None:
        if self.is_mounted:
            with (self.folder / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.folder).free - left_bytes)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (left_bytes, self._limits[1]))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        self.empty()
        if self.is_mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    yield made
    made.close()


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tiny_klein: Path, tmp_path: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "SPARE_BYTES", 0)
    whole = prepared(tiny_klein, tmp_path / "whole")
    sizes = whole.manifest.block_bytes
    blocks: list[None] = []

    def fill() -> None:
        blocks.append(None)
        if len(blocks) == 2:
            disk.fill(left_bytes=sizes[2] // 2 // 4096 * 4096)

    with pytest.raises(LowMemFlux2Error) as caught:
        prepared(tiny_klein, disk.folder, on_block=fill)
    (partial,) = entries(disk.folder)
    kept = contents(disk.folder / "prepared" / partial)
    assert kept.keys() == {"block-000.bin", "block-001.bin"}
    assert kept.items() <= contents(whole.folder).items()
    assert leavings(disk.folder) == (["filler"] if disk.is_mounted else [])
    if disk.is_mounted:
        assert isinstance(caught.value, DoesNotFit)
        assert caught.value.needed_bytes == sum(sizes[2:])
        assert caught.value.available_bytes == shutil.disk_usage(disk.folder).free
    assert "disk" in str(caught.value).lower() or "limit on file sizes" in str(caught.value)
    assert "2 finished blocks are kept, and taken over by the next run" in str(caught.value)
    assert str(disk.folder) in str(caught.value) and PARTIAL not in str(caught.value)
    disk.empty()
    assert contents(prepared(tiny_klein, disk.folder).folder) == contents(whole.folder)


def test_a_limit_on_file_sizes_is_told_apart_from_a_full_disk(tiny_klein: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(UsageError, match=r"a limit on file sizes.*were still to be written, .* are free"):
            prepared(tiny_klein, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "prepared").iterdir()) == []


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take the right to write to a folder and all in it away, from root too: this thread lays down what lets root pass
    over modes (capset, CAP_DAC_OVERRIDE), and threads that it starts have no more than it has."""
    libc, header = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # two of effective, permitted, inheritable
    assert libc.capget(ctypes.byref(header), data) == 0
    effective = data[0]
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    data[0] = effective & ~0b110
    try:
        for each in folders:
            each.chmod(0o555)
        assert libc.capset(ctypes.byref(header), data) == 0
        assert not os.access(folder, os.W_OK, effective_ids=True)
        yield
    finally:
        data[0] = effective
        assert libc.capset(ctypes.byref(header), data) == 0
        for each in folders:
            each.chmod(0o755)


def test_a_read_only_cache_serves_what_it_has(tiny_klein: Path, tmp_path: Path) -> None:
    made = latents(tiny_klein, tmp_path, "int8")
    with read_only(tmp_path):
        assert torch.equal(latents(tiny_klein, tmp_path, "int8"), made)
        assert prepared(tiny_klein, tmp_path) == found(tiny_klein, tmp_path)
        with pytest.raises(UsageError, match=rf"{tmp_path} cannot be written: .*--cache-dir"):
            latents(tiny_klein, tmp_path, "int4")


# ------------------------------------------------------------------------------------------------------- sources


def after(blocks: int, work: Callable[[], object]) -> Callable[[], None]:
    """An ``on_block`` that does something once."""
    seen: list[None] = []

    def told() -> None:
        seen.append(None)
        if len(seen) == blocks:
            work()

    return told


def test_a_source_that_changes_while_it_is_prepared_is_prepared_again(source: Path, tmp_path: Path) -> None:
    changed = {name: 1.01 * tensor for name, tensor in load_file(weights_of(source)).items()}

    def replaced() -> None:
        seen = weights_of(source).stat()
        save_file(changed, tmp_path / "other", metadata={"format": "pt"})
        os.utime(tmp_path / "other", ns=(seen.st_atime_ns, seen.st_mtime_ns))
        (tmp_path / "other").replace(weights_of(source))

    for change in (lambda: os.utime(weights_of(source)), replaced, lambda: (source / "transformer/x.json").touch()):
        with pytest.raises(CheckpointBroken, match="changed while it was prepared"):
            prepared(source, tmp_path / "cache", on_block=after(2, change))
        assert entries(tmp_path / "cache") == []
    made = contents(prepared(source, tmp_path / "cache").folder)
    assert made == contents(prepared(source, tmp_path / "fresh").folder)


def test_other_weights_under_the_old_time_are_noticed(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path)
    seen = weights_of(source).stat()
    changed = {name: 1.01 * tensor for name, tensor in load_file(weights_of(source)).items()}
    save_file(changed, weights_of(source), metadata={"format": "pt"})
    os.utime(weights_of(source), ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert weights_of(source).stat().st_size == seen.st_size
    assert found(source, tmp_path) is None


def test_copies_links_and_modes_leave_an_entry_valid(source: Path, tmp_path: Path) -> None:
    """The hub's cache holds links; containers change owners and modes; people copy and move models."""
    made = prepared(source, tmp_path)
    path = weights_of(source)
    path.chmod(0o640)
    os.link(path, tmp_path / "backup")
    assert found(source, tmp_path) == made
    blob = tmp_path / "blob"
    path.rename(blob)
    path.symlink_to(blob)
    assert found(source, tmp_path) == made
    os.utime(blob, ns=(1, 1))
    assert found(source, tmp_path) is None


@pytest.mark.parametrize("fault", ["unreadable", "cut", "gone", "config"])
def test_a_source_that_cannot_be_read_is_not_taken_for_the_cache(
    source: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = tmp_path / "cache", weights_of(source)

    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    hooks: dict[str, Callable[..., object]] = {}
    if fault == "unreadable":
        hooks["on_start"] = lambda blocks: monkeypatch.setattr(os, "preadv", fail)
    elif fault == "cut":
        hooks["on_start"] = lambda blocks: os.truncate(path, path.stat().st_size // 2)
    elif fault == "gone":
        hooks["on_block"] = path.unlink
    else:
        (source / "transformer" / "config.json").unlink()
        monkeypatch.setattr("stores.resolve_model", lambda *_, **__: None)
        with pytest.raises(CheckpointBroken, match=r"transformer cannot be read: .*config\.json"):
            preparation.prepare(source, None, "transformer", "int8", "fp32", cache)  # type: ignore[arg-type]
        return
    with pytest.raises(CheckpointBroken) as caught:
        prepared(source, cache, **hooks)
    assert str(source) in str(caught.value)
    assert "cannot be written" not in str(caught.value)
    assert leavings(cache) == []


def test_weights_that_are_not_finite_are_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(weights_of(source))
    name = next(name for name in tensors if name.endswith("single_transformer_blocks.1.attn.to_out.weight"))
    for value in (torch.nan, torch.inf):
        tensors[name][3, 5] = value
        save_file(tensors, weights_of(source), metadata={"format": "pt"})
        for weight_format in ("int8", "nf4"):
            with pytest.raises(CheckpointBroken, match=f"{name}.* holds NaN or infinity"):
                prepared(source, tmp_path / "cache", weight_format)


def test_preparing_works_in_inference_mode(tiny_klein: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        inside = {name: contents(prepared(tiny_klein, tmp_path / "in", name).folder) for name in ("int8", "nf4")}
    for name, made in inside.items():
        assert made == contents(prepared(tiny_klein, tmp_path / "out", name).folder)


def test_threads_are_as_many_afterwards_as_before(tiny_klein: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with suppress(KeyboardInterrupt):
        prepared(tiny_klein, tmp_path, on_block=after(1, lambda: (_ for _ in ()).throw(KeyboardInterrupt)))
    assert torch.get_num_threads() == before
