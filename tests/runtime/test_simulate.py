"""Simulated bytes against the live bytes of real runs, byte by byte, and cut models against whole ones."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.formats import PLAIN_FORMATS
from lowmem_flux2.planning.job import plan_job, resolve_machine
from lowmem_flux2.planning.plan import Placement, Plan, StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import ModelSource, resolve_model
from lowmem_flux2.planning.workload import Request, make_request
from lowmem_flux2.runtime import int8_matmul
from lowmem_flux2.runtime.checkpoint import TensorFile, Tensors
from lowmem_flux2.runtime.executor import Executor
from lowmem_flux2.runtime.inputs import Inputs
from lowmem_flux2.runtime.live import LiveBytes, rounded
from lowmem_flux2.runtime.measurements import peak_bytes
from lowmem_flux2.runtime.observer import Silent
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.simulate import SimulatedStage, simulate_stage
from lowmem_flux2.runtime.store import PreparedStore
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.weights import CheckpointWeights

COMPONENTS = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}


# -------------------------------------------------------------------------------------------------- live bytes


def test_a_storage_counts_once_from_its_making_to_its_last_reference() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        before.add_(1)
        before[:10].view(-1)
        assert live.now_bytes["cpu"] == 0  # not made here
        made = torch.ones(1000)
        view = made[:10]
        made.mul_(2)
        assert live.now_bytes["cpu"] == rounded(4000) == 4096
        del made
        assert live.now_bytes["cpu"] == 4096
        del view
        assert live.now_bytes["cpu"] == 0
        assert live.peak_bytes["cpu"] == 4096


def test_only_raw_spans_count_as_weights_and_nothing_on_meta_counts() -> None:
    with LiveBytes() as live:
        span = torch.empty(600, dtype=torch.uint8)
        mask = torch.zeros(600, dtype=torch.uint8)
        nothing = torch.empty(600, device="meta")
        assert (live.span_bytes["cpu"], live.now_bytes["cpu"]) == (1024, 2048)
        del span, mask, nothing
        live.restart_peak()
        assert (live.span_bytes["cpu"], live.peak_bytes["cpu"]) == (0, 0)


# ------------------------------------------------------------------------------------------ against real runs


class Metered:
    """A checkpoint's weights, with live bytes counted from the moment a component is opened until it is closed."""

    def __init__(self, inner: CheckpointWeights) -> None:
        self._inner = inner
        self._counting = ExitStack()
        self.live: dict[str, LiveBytes] = {}
        self.once_bytes: dict[str, int] = {}

    def open(self, component: Any) -> TensorFile:
        self._counting.close()
        files = self._inner.open(component)
        self.live[component] = self._counting.enter_context(LiveBytes())
        if component != "vae":  # whose files are closed before it runs
            close = files.close

            def closed() -> None:
                close()
                self._counting.close()

            files.close = closed  # type: ignore[method-assign]
        return files

    def streamer(self, stage: StagePlan, blocks: Any, tensors: Tensors, *rest: Any) -> BlockStreamer:
        live = self.live[stage.component]
        self.once_bytes[stage.component] = live.peak_bytes["cpu"]
        live.restart_peak()
        return self._inner.streamer(stage, blocks, tensors, *rest)

    def close(self) -> None:
        self._counting.close()

    def peak_bytes(self, stage: str) -> int:
        component = COMPONENTS[stage]
        return max(self.live[component].peak_bytes["cpu"], self.once_bytes.get(component, 0))


def planned(
    source: ModelSource, selection: Selection, prompts: int = 2, images: int = 2, length: int = 64
) -> tuple[Plan, Request]:
    request = make_request(
        source.spec,
        ("a red circle", "a dog at night")[:prompts],
        width=96,
        height=160,
        num_inference_steps=3,
        num_images_per_prompt=images,
        max_sequence_length=length,
        guidance_scale=4.0,
    )
    return plan_job(source, resolve_machine("cpu", "cpu"), request, selection), request


def measured(plan: Plan, request: Request, source: ModelSource, cache: Path) -> Metered:
    assert source.folder is not None
    stores: dict[str, PreparedStore] = {}
    for stage in plan.stages:
        if stage.weight_format not in PLAIN_FORMATS:
            stores[stage.component] = prepare(
                source.folder, source.spec, stage.component, stage.weight_format, stage.compute_dtype, cache
            )
    weights = Metered(CheckpointWeights(source.folder, stores))
    executor = Executor(plan, source.spec, source.folder, "cpu", Silent(), weights, lambda plan, stage: None)
    try:
        executor.run(request, Inputs())
    finally:
        weights.close()
    return weights


def inputs_bytes(plan: Plan, source: ModelSource, stage: str) -> int:
    """Tensors that an executor holds before a stage begins, so that its real run does not count them."""
    work, dims = plan.workload, source.spec.transformer
    size = {"fp32": 4, "bf16": 2}[plan.stage("denoise").compute_dtype]
    latents = rounded(work.num_images * work.image_tokens * dims.in_channels * size)
    embeds = rounded(work.num_images * work.text_tokens * dims.joint_dim * size)
    return {"encode": 0, "denoise": latents + work.guidance_passes * embeds, "decode": latents}[stage]


@pytest.fixture(scope="module")
def sources(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Toys by form, the embedded model, and a toy with a transformer of 24 M weights in heads of FLUX.2's size."""
    middle = Path(shutil.copytree(folders["klein"], tmp_path_factory.mktemp("middle") / "klein"))
    shutil.rmtree(middle / "transformer")
    transformer = Flux2Transformer2DModel(
        in_channels=4 * tiny.LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=4,
        joint_attention_dim=3 * tiny.HIDDEN,
        guidance_embeds=False,
    )
    transformer.to(torch.bfloat16).save_pretrained(middle / "transformer")
    return {**{form: str(folder) for form, folder in folders.items()}, "middle": str(middle), "shapes": "shapes"}


@pytest.mark.parametrize(
    ("form", "placement", "weight_format", "dtype", "tile", "batch"),
    [
        ("dev", "disk", "nf4-mixed", "fp32", "64", 4),
        ("distilled", "resident", "fp32", "fp32", "128", 3),
        ("shapes", "pageable", "int4", "fp32", "off", 2),
        ("middle", "disk", "int8", "bf16", "64", 3),
    ],
)
def test_simulated_bytes_equal_those_of_a_real_run(
    form: str,
    placement: str,
    weight_format: str,
    dtype: str,
    tile: str,
    batch: int,
    sources: dict[str, str],
    cache: Path,
) -> None:
    """Every stage, to the byte, but for its inputs, which lie there before a real stage begins."""
    source = resolve_model(sources[form])
    selection = Selection(
        placement=placement,
        weight_format=weight_format,
        text_weight_format=weight_format,
        dtype=dtype,
        vae_tile=tile,
        batch_size=batch,
    )
    plan, request = planned(source, selection)
    real = measured(plan, request, source, cache)
    for planned_stage in plan.stages:
        workload = plan.workload
        if planned_stage.stage == "encode":  # rows are repeated for a prompt's images after the real meter has stopped
            workload = replace(workload, num_images=workload.num_prompts)
        stage = simulate_stage(planned_stage, workload, source.spec, source.configs, on_host=True)
        assert stage.device_bytes - inputs_bytes(plan, source, stage.stage) == real.peak_bytes(stage.stage), stage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_bytes_are_what_the_allocator_hands_out(dtype: torch.dtype) -> None:
    """torch's profiler sees every allocation on the CPU, kernels' own too: bf16 matmuls and attention take some.

    With AMX, a matmul of this size lays its weight out anew.
    """
    heads, tokens = 4, 512
    width = heads * 128
    block = Flux2SingleTransformerBlock(width, heads, 128, mlp_ratio=3.0).to(dtype).eval()
    arguments = {
        "hidden_states": torch.randn(1, tokens, width, dtype=dtype),
        "encoder_hidden_states": None,
        "temb_mod": torch.randn(1, 1, 3 * width, dtype=dtype),
        "image_rotary_emb": (torch.randn(tokens, 128), torch.randn(tokens, 128)),
    }
    with torch.no_grad():
        block(**arguments)
        with LiveBytes() as live:
            block(**arguments)
        most = peak_bytes(lambda: block(**arguments), torch.device("cpu"))
    weight = block.attn.to_out.weight.numel() * dtype.itemsize
    scratch = 0 if dtype is torch.float32 else 0.03 * live.peak_bytes["cpu"] + weight
    assert live.peak_bytes["cpu"] <= most <= live.peak_bytes["cpu"] + scratch
    # Input, norm, projection 9, query, key, result, gate and product 3, side by side 4; the input was there before.
    assert live.peak_bytes["cpu"] == 20 * tokens * width * dtype.itemsize


# ------------------------------------------------------------------------------------- against whole models


def mixed(stage: StagePlan, slots: int = 2) -> StagePlan:
    """All placements, unevenly often, in no order."""
    kinds = (Placement.GPU, Placement.PINNED, Placement.GPU, Placement.PAGEABLE, Placement.DISK, Placement.DISK)
    count = len(stage.block_placements)
    return replace(
        stage, block_placements=tuple(kinds[index * index % 6] for index in range(count)), slots=slots if count else 0
    )


@pytest.mark.parametrize(("form", "on_host"), [("dev", False), ("klein", True)])
def test_a_cut_model_has_the_peaks_of_the_whole_one(form: str, on_host: bool, folders: dict[str, Path]) -> None:
    source = resolve_model(str(folders[form]))
    plan, _ = planned(source, Selection(vae_tile="64", batch_size=3))
    chunked = replace(plan.stage("denoise"), chunk_tokens=64)
    workload = replace(plan.workload, reference_tokens=140)
    for stage in map(mixed, (*plan.stages, chunked)):
        cut, whole = (
            simulate_stage(stage, workload, source.spec, source.configs, on_host=on_host, every_block=every)
            for every in (False, True)
        )
        assert cut == whole


def test_pieces_of_an_integer_matmul_have_the_peaks_of_all(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_matmul, "INT8_TOKENS", 32)
    monkeypatch.setattr(int8_matmul, "INT8_ROWS", 64)
    source = resolve_model(str(folders["klein"]))
    plan, _ = planned(source, Selection(batch_size=3))
    stage, workload = (
        replace(mixed(plan.stage("denoise")), weight_format="w8a8"),
        replace(plan.workload, reference_tokens=150),
    )
    cut, whole = (
        simulate_stage(stage, workload, source.spec, source.configs, every_block=every) for every in (False, True)
    )
    assert cut == whole


def test_a_cut_reference_stage_has_the_peaks_of_the_whole_one(folders: dict[str, Path]) -> None:
    """Pictures of one size, of which two are run, and tiles of one size."""
    source = resolve_model(str(folders["klein"]))
    plan, _ = planned(source, Selection())
    workload = replace(plan.workload, references=((512, 384),) * 3 + ((256, 192),) + ((512, 384),))
    for tile, on_host in ((0, False), (128, False), (128, True)):
        stage = replace(StagePlan.bare("reference", "fp32", "fp32"), tile_px=tile)
        cut, whole = (
            simulate_stage(stage, workload, source.spec, source.configs, on_host=on_host, every_block=every)
            for every in (False, True)
        )
        assert cut == whole


def test_a_cut_model_of_full_size_has_the_peaks_of_the_whole_one() -> None:
    """klein-4b's 25 blocks and 27 layers, and what the plan says of them, to the byte."""
    source = resolve_model("flux2-klein-4b")
    plan = plan_job(source, resolve_machine("rtx-3060-12gb", "auto"), make_request(source.spec, ("x",)), Selection())
    cut, whole = (
        [
            simulate_stage(
                mixed(stage), replace(plan.workload, steps=2), source.spec, source.configs, every_block=every
            )
            for stage in plan.stages[:2]
        ]
        for every in (False, True)
    )
    assert cut == whole


def test_cuda_kernels_differ_from_the_cpus_only_where_no_peak_is() -> None:
    """Their attention and norms hold other tensors, which are gone when a stage peaks; inputs wait on the host.

    So do tapped states of the text encoder: two of three for each of two batches, when its last layers run.
    """
    source = resolve_model("flux2-klein-base-4b")
    request = make_request(source.spec, ("x",), width=512, height=768, num_inference_steps=2)
    plan = plan_job(source, resolve_machine("rtx-4090-24gb", "auto"), request, Selection(vae_tile="256"))
    tapped = 2 * 2 * rounded(plan.workload.text_tokens * source.spec.text_encoder.hidden_size * 2)
    for stage in plan.stages:
        cuda, cpu = (
            simulate_stage(stage, plan.workload, source.spec, source.configs, on_host=on_host)
            for on_host in (False, True)
        )
        inputs = tapped if stage.stage == "encode" else inputs_bytes(plan, source, stage.stage)
        small = 2 * 512 if stage.stage == "encode" else 0  # an allocation a batch
        assert cuda.device_bytes == pytest.approx(cpu.device_bytes - inputs, rel=0, abs=small)
        assert cuda.host_bytes >= inputs


def test_reference_tokens_and_guidance_take_memory(folders: dict[str, Path]) -> None:
    source = resolve_model(str(folders["klein"]))
    plan, _ = planned(source, Selection())

    def peak(**changes: int) -> SimulatedStage:
        workload = replace(plan.workload, **changes)
        return simulate_stage(plan.stage("denoise"), workload, source.spec, source.configs)

    assert peak(reference_tokens=0).activation_bytes < peak(reference_tokens=64).activation_bytes
    assert peak(guidance_passes=1).activation_bytes < peak(guidance_passes=2).activation_bytes


def test_what_is_not_simulated_is_refused(folders: dict[str, Path]) -> None:
    source = resolve_model(str(folders["dev"]))
    workload = planned(source, Selection())[0].workload
    for stage in (StagePlan.bare("upsample", "fp32", "fp32"), StagePlan.bare("denoise", "gguf", "fp32")):
        with pytest.raises(UsageError, match="not simulated"):
            simulate_stage(stage, workload, source.spec, source.configs)
