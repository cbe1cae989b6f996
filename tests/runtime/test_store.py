"""The prepared store: the right bytes, made once, whole or not at all, and whatever is wrong with it is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from command_line import Run, runner
from safetensors.torch import load_file, save_file
from stores import contents, entries, latents, prepared, weights_of

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing, DoesNotFit, UsageError
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.preparing import prepared_of
from lowmem_flux2.runtime import prepare as preparation
from lowmem_flux2.runtime import store
from lowmem_flux2.runtime.cache import PARTIAL
from lowmem_flux2.runtime.components import transformer_blocks, transformer_on_meta
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.quantize import STORED
from lowmem_flux2.runtime.store import block_path, entry_of, find
from lowmem_flux2.runtime.stored_linear import StoredLinear

MIB = 1 << 20
FORMS = ("dev", "klein", "shapes")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes that share what is imported")


@pytest.fixture(scope="session")
def sources(folders: dict[str, Path]) -> dict[str, Path]:
    """Model folders by form."""
    shapes = resolve_model("shapes", offline=True).folder
    assert shapes is not None
    return {**folders, "shapes": shapes}


@pytest.fixture
def source(tiny_klein: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny_klein, tmp_path / "source"))


def dequantized(folder: Path, target: Path, weight_format: str) -> Path:
    """A plain fp32 checkpoint whose Linears hold what the stored format gives back."""
    shutil.copytree(folder, target)
    blocks = transformer_blocks(transformer_on_meta(folder / "transformer")).converted(weight_format, torch.float32)
    kinds = {
        f"{prefix}{name}.weight": type(linear)
        for module, prefix in zip(blocks.modules, blocks.prefixes, strict=True)
        for name, linear in module.named_modules()
        if isinstance(linear, StoredLinear)
    }
    for component in ("transformer", "text_encoder"):
        for path in (target / component).glob("*.safetensors"):
            tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
            for name, tensor in tensors.items():
                if tensor.ndim == 2 and ("blocks." in name or "layers." in name) and "vision" not in name:
                    rows, columns = tensor.shape
                    linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
                    kind = kinds.get(name, STORED[weight_format])
                    stored = kind(linear, torch.float32)
                    stored._buffers.update(kind.quantize(tensor, torch.float32))
                    tensors[name] = stored.dequantize().contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
    return target


# ------------------------------------------------------------------------------------------------- right bytes


@pytest.mark.parametrize("weight_format", [name for name in STORED if not FORMATS[name].compute_class])
@pytest.mark.parametrize("form", FORMS)
def test_placements_of_a_format_agree_with_weights_dequantized_in_memory(
    form: str, weight_format: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    reference = latents(dequantized(sources[form], tmp_path / "plain", weight_format), tmp_path / "unused", "fp32")
    assert not (tmp_path / "unused").exists()
    for placement in ("resident", "pageable", "disk"):
        assert torch.equal(latents(sources[form], tmp_path, weight_format, placement), reference), placement
    assert not torch.equal(latents(sources[form], tmp_path, "fp32"), reference)


@pytest.mark.parametrize("form", FORMS)
def test_w8a8_takes_the_store_of_int8_and_no_placement_changes_it(
    form: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    expanded = latents(sources[form], tmp_path, "int8")
    seen = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*")}
    found = [latents(sources[form], tmp_path, "w8a8", placement) for placement in ("resident", "pageable", "disk")]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*")} == seen
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], expanded)
    assert (found[0] - expanded).norm() < 0.5 * expanded.norm()


def test_an_entry_made_for_w8a8_is_that_of_int8(tiny_klein: Path, tmp_path: Path) -> None:
    made = prepared(tiny_klein, tmp_path, "w8a8")
    assert made.manifest.weight_format == "int8"
    assert prepared(tiny_klein, tmp_path, "int8", on_start=pytest.fail) == made
    source = resolve_model(str(tiny_klein), offline=True)
    assert prepared_of(source, tmp_path) == {("transformer", "int8", "fp32")}


def test_a_second_run_takes_the_store_as_it_is(tiny_klein: Path, tmp_path: Path) -> None:
    first = latents(tiny_klein, tmp_path, "int8", "disk")
    seen = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert sum(path.suffix == ".bin" for path in seen) == 5 + 27
    assert torch.equal(latents(tiny_klein, tmp_path, "int8", "disk"), first)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == seen


def test_formats_dtypes_and_components_have_entries_of_their_own(tiny_klein: Path, tmp_path: Path) -> None:
    spec = resolve_model(str(tiny_klein), offline=True).spec
    asked = [("transformer", "int8", "fp32"), ("transformer", "int8", "bf16"), ("text_encoder", "int4", "bf16")]
    made = [prepare(tiny_klein, spec, *each, tmp_path) for each in asked]
    assert len(entries(tmp_path)) == len(asked)
    for each, one in zip(asked, made, strict=True):
        assert find(tiny_klein, *each, tmp_path) == one
        assert list(one.verify()) == []
        assert one.total_bytes == sum(len(held) for held in contents(one.folder).values())


# --------------------------------------------------------------------------------------- processes and deaths


def forked(work: Callable[[], object]) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


@needs_fork
def test_two_processes_prepare_once(tiny_klein: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(2), context.Queue()

    def work() -> None:
        counted: list[None] = []
        told: list[str] = []
        barrier.wait(timeout=20)

        def slowly() -> None:
            counted.append(None)
            time.sleep(0.02)

        prepared(tiny_klein, tmp_path, on_block=slowly, on_event=told.append)
        made.put((len(counted), told))

    both = [forked(work) for _ in range(2)]
    waiting = "another process is preparing the transformer in int8: waiting for it to finish"
    assert sorted(made.get(timeout=30) for _ in both) == [(0, [waiting]), (5, [])]
    for process in both:
        process.join(20)
        assert process.exitcode == 0
    assert len(entries(tmp_path)) == 1


def test_a_torn_block_is_not_taken_over(tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has its final name is whole: the name comes last."""
    whole = contents(prepared(tiny_klein, tmp_path / "whole").folder)
    synced = os.fsync
    calls: list[int] = []

    def power_cut(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise KeyboardInterrupt
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        prepared(tiny_klein, tmp_path)
    monkeypatch.setattr(os, "fsync", synced)
    (unfinished,) = [name for name in entries(tmp_path) if name.startswith(".partial-")]
    assert 0 < len(contents(tmp_path / "prepared" / unfinished)) < 5
    assert find(tiny_klein, "transformer", "int8", "fp32", tmp_path) is None
    assert contents(prepared(tiny_klein, tmp_path).folder) == whole


# ---------------------------------------------------------------------------------------------- changed sources


def test_a_touched_source_is_prepared_again_and_the_stale_entry_goes(source: Path, tmp_path: Path) -> None:
    first = prepared(source, tmp_path)
    os.utime(weights_of(source), ns=(1, 1))
    assert find(source, "transformer", "int8", "fp32", tmp_path) is None
    second = prepared(source, tmp_path)
    assert entries(tmp_path) == [second.folder.name] != [first.folder.name]


def test_other_weights_in_the_source_reach_the_latents(source: Path, tmp_path: Path) -> None:
    before = latents(source, tmp_path, "int8")
    tensors = {name: 1.01 * tensor for name, tensor in load_file(weights_of(source)).items()}
    save_file(tensors, weights_of(source), metadata={"format": "pt"})
    after = latents(source, tmp_path, "int8")
    assert not torch.equal(before, after)
    assert torch.equal(after, latents(source, tmp_path / "fresh", "int8"))
    assert len(entries(tmp_path)) == 2


def test_an_unfinished_entry_of_a_changed_source_goes_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(source, tmp_path, on_block=stop)
    assert [name[:9] for name in entries(tmp_path)] == [".partial-"]
    os.utime(weights_of(source), ns=(1, 1))
    made = prepared(source, tmp_path)
    assert entries(tmp_path) == [made.folder.name]


def test_entries_of_other_folders_stay(source: Path, tiny_klein: Path, tmp_path: Path) -> None:
    first = prepared(tiny_klein, tmp_path)
    os.utime(weights_of(source), ns=(1, 1))
    second = prepared(source, tmp_path)
    assert entries(tmp_path) == sorted([first.folder.name, second.folder.name])


# ----------------------------------------------------------------------------------------------------- damage


def test_a_truncated_block_is_refused_by_name(tiny_klein: Path, tmp_path: Path) -> None:
    latents(tiny_klein, tmp_path, "int8")
    path = block_path(prepared(tiny_klein, tmp_path).folder, 3)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointBroken, match=r"block-003\.bin has \d+ bytes"):
        latents(tiny_klein, tmp_path, "int8", may_prepare=False)


def test_a_layout_of_another_release_is_refused(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal sizes, another order: only the names tell."""
    latents(tiny_klein, tmp_path, "int8")
    monkeypatch.setattr(store, "layout_digest", lambda layouts: "other")
    with pytest.raises(CheckpointBroken, match="another release of diffusers"):
        latents(tiny_klein, tmp_path, "int8", may_prepare=False)
    assert len(entries(tmp_path)) == 2


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, MIB))  # type: ignore[attr-defined]
    with pytest.raises(DoesNotFit, match="disk") as caught:
        prepared(tiny_klein, tmp_path, on_block=pytest.fail)
    assert caught.value.available_bytes == MIB
    assert f"another disk than that of {tmp_path}," in str(caught.value)
    assert list((tmp_path / "prepared").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(tiny_klein: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"file.* cannot be written.*--cache-dir"):
        prepared(tiny_klein, tmp_path / "file")
    assert find(tiny_klein, "transformer", "int8", "fp32", tmp_path) is None


def test_without_its_library_a_format_is_refused(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store.LIBRARIES, "nf4", "no-such-library")
    with pytest.raises(UsageError, match="no-such-library is not installed"):
        entry_of(tiny_klein, "transformer", "nf4", "fp32")


def test_not_preparing_is_refused_with_the_command(tiny_klein: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="lowmem-flux2 prepare -m"):
        latents(tiny_klein, tmp_path, "int8", may_prepare=False)
    assert not (tmp_path / "prepared").exists()


# --------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    return runner(monkeypatch, capsys)


def test_prepare_lists_verifies_and_removes(run: Run, tiny_klein: Path, cache: Path) -> None:
    assert run("prepare", "--list").code == 0
    ran = run("prepare", "-m", str(tiny_klein), "--device", "cpu", "--dtype", "fp32", "--weight-format", "int4")
    assert ran.code == 0, ran
    names = entries(cache)
    assert [name.split("-int4-fp32-")[0] for name in names] == ["text_encoder", "transformer"]
    assert run("prepare", "-m", str(tiny_klein), "--device", "cpu", "--dtype", "fp32", "--weight-format", "int4") == ran
    listed = run("prepare", "--list").out
    assert all(name in listed for name in names)
    assert str(tiny_klein) in listed.replace("\n", "")
    assert run("prepare", "--verify").out.count(": whole") == 2

    flipped, cut = (block_path(cache / "prepared" / name, 1) for name in names)
    raw = bytearray(flipped.read_bytes())
    raw[len(raw) // 2] ^= 1
    flipped.write_bytes(raw)
    os.truncate(cut, 100)
    ran = run("prepare", "--verify")
    assert ran.code == 4
    assert str(flipped) in ran.err and str(cut) in ran.err  # both, not only the first
    assert "block-000" not in ran.err

    (cache / "prepared" / names[0] / "manifest.json").write_text("{")
    assert "damaged" in run("prepare", "--list").out
    for name in names:
        assert run("prepare", "--remove", name).code == 0
    assert entries(cache) == []
    assert run("prepare", "--remove", names[0]).code == 2
    assert run("prepare", "--remove", "..").code == 2
    (cache / "prepared" / f"{PARTIAL}{names[0]}").mkdir()
    assert "unfinished" in run("prepare", "--list").out
    assert run("prepare", "--remove", names[0]).code == 0
    assert list((cache / "prepared").iterdir()) == []


def test_generate_without_preparing_exits_4_with_a_command_that_helps(run: Run, tiny_klein: Path) -> None:
    chosen = ("--device", "cpu", "--dtype", "fp32", "--weight-format", "int8", "--steps", "1", "-W", "64", "-H", "64")
    asked = ("generate", "-q", "-p", "x", "-m", str(tiny_klein), "--no-prepare", *chosen)
    for component in ("text_encoder", "transformer"):
        ran = run(*asked, "--text-weight-format", "int8")
        assert ran.code == 4
        command = ran.err.split("run: ")[1].split()
        assert command[:2] == ["lowmem-flux2", "prepare"] and component in command
        assert run(*command[1:]).code == 0
    assert run(*asked, "--text-weight-format", "int8").code == 0


def test_a_cache_that_cannot_be_written_exits_2(run: Run, tiny_klein: Path) -> None:
    Path("file").write_text("in the way")
    ran = run("prepare", "-m", str(tiny_klein), "--device", "cpu", "--cache-dir", "file/cache")
    assert ran.code == 2
    assert "cannot be written" in ran.err and "Traceback" not in ran.err


def test_prepare_refuses_what_is_not_quantized(run: Run, tiny_klein: Path) -> None:
    ran = run("prepare", "-m", str(tiny_klein), "--device", "cpu", "--weight-format", "bf16")
    assert ran.code == 2
    assert "read from the checkpoint as they are" in ran.err


# ----------------------------------------------------------------------------------------------------- memory

PREPARE = """
import gc, json, sys
from pathlib import Path
import torch
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.planning.sources import resolve_model
torch.set_num_threads(1)
tiny, large, cache = map(Path, sys.argv[1:])
spec = resolve_model(str(tiny), offline=True).spec
def status(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) << 10
grown = {}
for name in ("int8", "nf4"):
    prepare(tiny, spec, "transformer", name, "bf16", cache)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    prepare(large, spec, "transformer", name, "bf16", cache)
    grown[name] = status("VmHWM:") - before
print(json.dumps(grown))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_preparing_holds_a_block_and_not_the_model(tiny_klein: Path, tmp_path: Path) -> None:
    from accelerate import init_empty_weights
    from diffusers import Flux2Transformer2DModel

    shape = {"num_layers": 2, "num_single_layers": 5, "num_attention_heads": 8, "joint_attention_dim": 96}
    with init_empty_weights():
        net = Flux2Transformer2DModel(in_channels=32, attention_head_dim=128, guidance_embeds=False, **shape)
    folder = tmp_path / "large" / "transformer"
    folder.mkdir(parents=True)
    net.save_config(folder)
    noise = 0.02 * torch.randn(MIB, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {
        name: noise.repeat(-(-t.numel() // MIB))[: t.numel()].view(t.shape) for name, t in net.named_parameters()
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    largest = 2 * sum(tensor.numel() for tensor in net.transformer_blocks[0].parameters())
    total = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    assert total > 200 * MIB > 2 * largest + 64 * MIB
    command = [sys.executable, "-c", PREPARE, str(tiny_klein), str(tmp_path / "large"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, grown in json.loads(done.stdout).items():
        assert grown < 2 * largest + 64 * MIB, name
