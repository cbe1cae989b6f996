"""Bytes that planning counts, beside those of real stores, checkpoints and reads: equal, not about equal."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import single_files as forms
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem_flux2 import Engine
from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS, MIXED, MIXED_PIECE_WEIGHTS, mixed_storage
from lowmem_flux2.planning.models import BlockSpec, ModelSpec
from lowmem_flux2.planning.plan import Plan, StagePlan
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.runtime.blockfile import block_path
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.live import ALLOCATION_BYTES, LiveBytes
from lowmem_flux2.runtime.observer import Silent
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.quantize import MIXED_LINEARS, STORED
from lowmem_flux2.runtime.rawfile import RawFile

FORMS = ("dev", "klein")
EXPANDED = [name for name, fmt in FORMATS.items() if name in STORED and not fmt.compute_class and name != MIXED]
SEVERAL = {"transformer": torch.float32, "text_encoder": torch.bfloat16, "vae": torch.float16}


@pytest.fixture(scope="module")
def checkpoints(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By form: the tiny checkpoint, which is of fp32, and copies in bf16 and in another dtype for each component."""
    made = {(form, "fp32"): folders[form] for form in FORMS}
    for form in FORMS:
        for stored in ("bf16", "mixed"):
            copy = shutil.copytree(folders[form], tmp_path_factory.mktemp(stored) / form)
            for component, dtype in SEVERAL.items():
                for path in (copy / component).glob("*.safetensors"):
                    kind = dtype if stored == "mixed" else torch.bfloat16
                    tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in load_file(path).items()}
                    save_file(tensors, path, metadata={"format": "pt"})
            made[form, stored] = copy
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("form", FORMS)
def test_files_of_the_store_have_the_bytes_that_planning_counts_on(
    form: str, name: str, dtype: str, checkpoints: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = checkpoints[form, "mixed"]
    spec = resolve_model(str(folder), offline=True).spec
    for stage in ("encode", "denoise"):
        planned = StagePlan.bare(stage, name, dtype)
        store = prepare(folder, spec, planned.component, name, dtype, tmp_path)
        sizes = block_sizes(planned, spec)
        assert list(store.manifest.block_bytes) == sizes
        assert [block_path(store.folder, index).stat().st_size for index in range(len(sizes))] == sizes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(512, 512), (384, 640), (768, 96)], ids=str)
@pytest.mark.parametrize("name", EXPANDED)
def test_a_linear_takes_the_stored_and_the_transient_bytes_of_its_format(
    name: str, shape: tuple[int, int], dtype: str
) -> None:
    """All that a Linear's weight needs while it runs, but for what kernels take and give back inside an operator.

    Of those that are expanded: test_int8_matmul.py and test_forms.py have the others.
    """
    fmt, (rows, columns), kind = FORMATS[name], shape, DTYPES[dtype]
    block = BlockSpec("single", (shape,), ())
    assert fmt.storage is not None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind) * 0.02
    linear = STORED[name](nn.Linear(columns, rows, bias=False, device="meta"), kind)
    linear._buffers.update(STORED[name].quantize(weight, kind))
    assert tuple(tensor.nbytes for tensor in linear._buffers.values() if tensor is not None) == fmt.storage(
        rows, columns, kind.itemsize
    )
    linear.dequantize()  # tables that are made once
    with LiveBytes() as live:
        linear.dequantize()
    allocations = 12 * ALLOCATION_BYTES
    transient = fmt.transient_bytes(block, kind.itemsize)
    unseen = (
        4 * rows * columns // 64 if name == "nf4" else 0
    )  # planning counts absmax in fp32 twice, operators hold one
    assert transient - unseen - allocations <= live.peak_bytes["cpu"] <= transient + allocations


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(640, 2048), (768, 96), (7, 33)], ids=str)  # two pieces, one, one not of whole bytes
@pytest.mark.parametrize("bits", MIXED_LINEARS)
def test_a_mixed_linear_takes_the_stored_and_at_most_the_transient_bytes_that_planning_counts_on(
    bits: int, shape: tuple[int, int], dtype: str
) -> None:
    (rows, columns), kind = shape, DTYPES[dtype]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind) * 0.02
    linear = MIXED_LINEARS[bits](nn.Linear(columns, rows, bias=False, device="meta"), kind)
    linear._buffers.update(MIXED_LINEARS[bits].quantize(weight, kind))
    held = tuple(tensor.nbytes for tensor in linear._buffers.values() if tensor is not None)
    assert held == mixed_storage(rows, columns, bits)
    linear.dequantize()  # tables that are made once
    with LiveBytes() as live:
        linear.dequantize()
    planned = FORMATS[MIXED].transient_bytes(BlockSpec("single", (shape,), ()), kind.itemsize)
    assert live.peak_bytes["cpu"] <= planned + 12 * ALLOCATION_BYTES
    if bits != 4 and rows * columns > MIXED_PIECE_WEIGHTS:
        assert live.peak_bytes["cpu"] > 0.97 * planned


class Reads(Silent):
    """Counts what is read through RawFile in each stage."""

    def __init__(self) -> None:
        self.stage = ""
        self.read_bytes: Counter[str] = Counter()

    def stage_started(self, stage: str, total: int) -> None:
        self.stage = stage

    def note(self, size_bytes: int) -> None:
        self.read_bytes[self.stage] += size_bytes


ASKED: dict[str, Any] = {
    **{"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 32, "seed": 0},
    "prompt": ["a red circle", "a blue square"],
}


def run_counted(
    model: str, options: dict[str, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[ModelSpec, Plan, dict[str, int]]:
    """The model, the plan of a run with everything prepared, and what it read in each stage."""
    told = Reads()
    engine = Engine(model, device="cpu", observer=told, **options)
    engine.generate(**asked)  # prepares
    told.read_bytes.clear()
    whole = RawFile.read_into

    def counted(self: RawFile, destination: torch.Tensor, *arguments: Any, **named: Any) -> None:
        told.note(destination.nbytes)
        whole(self, destination, *arguments, **named)

    monkeypatch.setattr(RawFile, "read_into", counted)
    plan = engine.generate(**asked).report.plan
    return engine.source.spec, plan, dict(told.read_bytes)


@pytest.mark.parametrize(
    ("form", "stored", "weight_format", "dtype", "placement"),
    [
        ("klein", "fp32", "fp32", "fp32", "resident"),
        ("klein", "fp32", "bf16", "bf16", "disk"),
        ("klein", "mixed", "bf16", "bf16", "pageable"),
        ("klein", "mixed", "int8", "bf16", "disk"),
        ("klein", "bf16", "fp32", "fp32", "disk"),
        ("dev", "bf16", "int4", "fp32", "resident"),
        ("dev", "mixed", "nf4", "fp32", "disk"),
        ("dev", "mixed", "fp32", "fp32", "disk"),
        ("dev", "fp32", "fp8", "bf16", "pageable"),
    ],
)
def test_a_run_reads_the_bytes_that_its_plan_says(
    form: str,
    stored: str,
    weight_format: str,
    dtype: str,
    placement: str,
    checkpoints: dict[tuple[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the store or from the checkpoint, whatever dtypes that holds, to the byte, in every stage."""
    asked: dict[str, Any] = {**ASKED, **({"guidance_scale": 4.0} if form == "klein" else {})}  # two passes, two prompts
    options = {"dtype": dtype, "weight_format": weight_format, "text_weight_format": weight_format}
    options |= {"placement": placement, "cache_dir": tmp_path}
    spec, plan, read = run_counted(str(checkpoints[form, stored]), options, asked, monkeypatch)
    assert plan.stage("denoise").cost.rounds > 1
    planned = {stage.stage: stage.cost.disk_bytes for stage in plan.stages}
    # A row of the embedding is read once a batch, however often its token comes: planning counts each.
    rows = planned.pop("encode") - read.pop("encode")
    assert read == planned
    row_bytes = spec.text_encoder.hidden_size * DTYPE_BYTES[spec.stored_dtype_of("text_encoder")]
    assert rows % row_bytes == 0
    assert 0 <= rows // row_bytes <= (4 if form == "klein" else 2) * asked["max_sequence_length"]


@pytest.mark.parametrize("placement", ["resident", "disk"])
@pytest.mark.parametrize("kind", ["fp8", "bnb4", "gguf"])
def test_a_run_reads_the_bytes_of_quantized_files_that_its_plan_says(
    kind: str, placement: str, tmp_path: Path, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are decoded as they are read, not prepared: the files' own bytes, scales included."""
    model, parts = tmp_path / "x", {"text_encoder": str(tiny_klein), "vae": str(tiny_klein)}
    bfl = forms.bfl_state(forms.transformer_state(tiny_klein))
    if kind == "bnb4":
        (tmp_path / "folders").mkdir()
        model, parts = forms.write_bnb(tmp_path / "folders", tiny_klein, "nf4", nested=True)[0], {}
    elif kind == "gguf":
        forms.write_gguf(model, bfl, "Q8_0", "Q4_0")
    else:
        stored, _ = forms.fp8_state(bfl, by_row=True, ending=".weight_scale", beside=None)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, model)
    options = {"dtype": "fp32", "weight_format": "fp32", "text_weight_format": "fp32", "placement": placement}
    spec, plan, read = run_counted(str(model), options | parts | {"cache_dir": tmp_path / "cache"}, ASKED, monkeypatch)
    assert spec.transformer_files is not None
    assert plan.stage("denoise").cost.disk_bytes == read["denoise"]
    if kind == "bnb4":
        rows = plan.stage("encode").cost.disk_bytes - read["encode"]  # of the embedding, for tokens that come again
        row_bytes = spec.text_encoder.hidden_size * DTYPE_BYTES["fp32"]
        assert rows % row_bytes == 0
        assert 0 <= rows // row_bytes <= 4 * ASKED["max_sequence_length"]
