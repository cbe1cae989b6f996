"""The closed forms against measured figures, the time line against an independent simulation, and both sides' bytes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DEV, KLEIN_4B, KLEIN_9B, KLEIN_BASE, MODELS, machine, plan_for, spec, work

from lowmem_flux2.planning import cost
from lowmem_flux2.planning.activations import (
    decode_activation_bytes,
    denoise_activation_bytes,
    encode_activation_bytes,
)
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.units import GIB, MIB

BF16 = 2

# --------------------------------------------------- activations: library-facts' figures, FakeTensorMode and MemTracker


@pytest.mark.parametrize(
    ("px", "chunk", "measured_mib"), [(512, 0, 402), (1024, 0, 1165), (1024, 512, 691), (1024, 1024, 691)]
)
def test_dev_activations_are_within_3_per_cent_of_the_measured_peak(px: int, chunk: int, measured_mib: int) -> None:
    predicted = denoise_activation_bytes(spec(DEV), work(DEV, px), 1, BF16, chunk)
    assert predicted / MIB == pytest.approx(measured_mib, rel=0.03)


@pytest.mark.parametrize(("tile_px", "measured_mib"), [(0, 1538), (512, 390)])
def test_vae_activations_are_within_3_per_cent_of_the_measured_peak(tile_px: int, measured_mib: int) -> None:
    predicted = decode_activation_bytes(spec(DEV).vae, 1024, 1024, tile_px, BF16)
    assert predicted / MIB == pytest.approx(measured_mib, rel=0.03)


def test_mistral_activations_are_within_3_per_cent_of_the_measured_peak() -> None:
    assert encode_activation_bytes(spec(DEV), work(DEV), 1, BF16) / MIB == pytest.approx(127, rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_activations_grow_with_batch_and_size_and_fall_with_chunks(name: str) -> None:
    def peak(px: int = 1024, batch: int = 1, chunk: int = 0) -> int:
        return denoise_activation_bytes(spec(name), work(name, px), batch, BF16, chunk)

    assert peak(512) < peak(768) < peak(1024) < peak(2048)
    assert peak() < peak(batch=2) < 2 * peak()
    assert peak(chunk=512) < peak(chunk=2048) < peak()
    assert peak(chunk=8192) == peak()


def test_a_second_guidance_pass_costs_memory() -> None:
    one, two = replace(work(KLEIN_BASE), guidance_passes=1), replace(work(KLEIN_BASE), guidance_passes=2)
    model = spec(KLEIN_BASE)
    assert denoise_activation_bytes(model, one, 1, BF16, 0) < denoise_activation_bytes(model, two, 1, BF16, 0)
    assert encode_activation_bytes(model, one, 1, BF16) < encode_activation_bytes(model, two, 1, BF16)


def test_a_small_decoder_is_counted_by_its_own_channels() -> None:
    vae = spec(DEV).vae
    small = replace(vae, decoder_block_out_channels=(96, 192, 384, 384))
    assert decode_activation_bytes(small, 1024, 1024, 0, BF16) < decode_activation_bytes(vae, 1024, 1024, 0, BF16)
    assert cost.decode_flops(small, 1024, 1024) < cost.decode_flops(vae, 1024, 1024)


# -------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("name", "tera"), [(DEV, 282), (KLEIN_9B, 75.5), (KLEIN_4B, 34.8)])
def test_a_step_at_1024_px_has_the_flops_of_the_design_within_2_per_cent(name: str, tera: float) -> None:
    dims = spec(name).transformer
    double, single, attention = cost.block_flops(spec(name), work(name), 1)
    total = dims.num_double * double + dims.num_single * single + len(dims.blocks) * attention
    assert total == pytest.approx(tera * 1e12, rel=0.02)
    if name == DEV:
        assert total - len(dims.blocks) * attention == pytest.approx(253e12, rel=0.02)
        assert len(dims.blocks) * attention == pytest.approx(29e12, rel=0.02)


def test_decoder_flops_are_within_2_per_cent_of_torchs_count() -> None:
    """torch.utils.flop_counter on AutoencoderKLFlux2().decode at 1024 px on the meta device: 10.475 TFLOP."""
    assert cost.decode_flops(spec(DEV).vae, 1024, 1024) == pytest.approx(10.475e12, rel=0.02)


# ---------------------------------------------------------------------------------------------------- time line

SECONDS = st.integers(1, 60).map(lambda tenths: tenths / 10)
COPIES = st.one_of(st.just(0.0), SECONDS)
BLOCKS = st.lists(st.tuples(SECONDS, COPIES), min_size=1, max_size=12)
SLOTS = st.integers(1, 4)


def simulated(compute_s: Sequence[float], copy_s: Sequence[float], slots: int, rounds: int) -> list[float]:
    """Length of each round, by discrete events: an engine that copies, a stream that computes, free slots counted."""
    tasks = [(compute, copy) for _ in range(rounds) for compute, copy in zip(compute_s, copy_s, strict=True)]
    to_copy = [number for number, (_, copy) in enumerate(tasks) if copy > 0]
    events: list[tuple[float, int, str, int]] = []
    arrived: set[int] = set()
    free, now, engine_busy, stream_busy, next_task = slots, 0.0, False, False, 0
    finished = [0.0] * len(tasks)
    while next_task < len(tasks) or stream_busy:
        if not engine_busy and to_copy and free:
            number = to_copy.pop(0)
            free, engine_busy = free - 1, True
            heapq.heappush(events, (now + tasks[number][1], 0, "copied", number))
        if not stream_busy and next_task < len(tasks) and (tasks[next_task][1] == 0 or next_task in arrived):
            stream_busy = True
            heapq.heappush(events, (now + tasks[next_task][0], 1, "computed", next_task))
            next_task += 1
            continue
        now, _, kind, number = heapq.heappop(events)
        if kind == "copied":
            engine_busy = False
            arrived.add(number)
        else:
            stream_busy = False
            finished[number] = now
            free += tasks[number][1] > 0
    ends = [0.0, *finished[len(compute_s) - 1 :: len(compute_s)]]
    return [end - start for start, end in pairwise(ends)]


@settings(deadline=None, max_examples=300)
@given(BLOCKS, SLOTS)
def test_the_time_line_agrees_with_an_event_simulation(blocks: list[tuple[float, float]], slots: int) -> None:
    compute, copies = zip(*blocks, strict=True)
    line = cost.timeline(compute, copies, slots)
    assert line.step_s == pytest.approx(simulated(compute, copies, slots, cost.ROUNDS_SIMULATED)[-1])


@settings(deadline=None, max_examples=300)
@given(BLOCKS, SLOTS)
def test_the_reported_round_is_the_steady_one(blocks: list[tuple[float, float]], slots: int) -> None:
    compute, copies = zip(*blocks, strict=True)
    rounds = simulated(compute, copies, slots, 40)
    assert cost.timeline(compute, copies, slots).step_s == pytest.approx(sum(rounds[-10:]) / 10, rel=1e-6)


@given(BLOCKS, SLOTS)
def test_a_step_takes_its_compute_and_its_waiting(blocks: list[tuple[float, float]], slots: int) -> None:
    compute, copies = zip(*blocks, strict=True)
    line = cost.timeline(compute, copies, slots)
    assert line.step_s == pytest.approx(sum(compute) + line.waiting_s)
    assert line.waiting_s >= 0
    assert line.step_s >= sum(copies) - 1e-9
    assert line.step_s <= sum(compute) + sum(copies) + 1e-9


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=12))
def test_one_slot_hides_nothing(blocks: list[tuple[float, float]]) -> None:
    """The next copy waits until the slot's block is computed; only resident blocks in between would give it cover."""
    compute, copies = zip(*blocks, strict=True)
    assert cost.timeline(compute, copies, 1).step_s == pytest.approx(sum(compute) + sum(copies))


@given(st.lists(SECONDS, min_size=1, max_size=12), SLOTS)
def test_without_copies_a_step_is_its_compute(compute: list[float], slots: int) -> None:
    assert cost.timeline(compute, [0.0] * len(compute), slots) == cost.Timeline(sum(compute), 0.0)


@given(BLOCKS, SLOTS, st.floats(1, 5))
def test_slower_copies_and_fewer_slots_never_shorten_a_step(
    blocks: list[tuple[float, float]], slots: int, factor: float
) -> None:
    compute, copies = zip(*blocks, strict=True)
    step = cost.timeline(compute, copies, slots).step_s
    assert cost.timeline(compute, [factor * copy for copy in copies], slots).step_s >= step - 1e-9
    assert cost.timeline(compute, copies, slots + 1).step_s <= step + 1e-9


@given(BLOCKS, SLOTS, st.data())
def test_a_block_that_stays_never_lengthens_a_step(
    blocks: list[tuple[float, float]], slots: int, data: st.DataObject
) -> None:
    compute, copies = zip(*blocks, strict=True)
    index = data.draw(st.integers(0, len(blocks) - 1))
    fewer = [0.0 if at == index else copy for at, copy in enumerate(copies)]
    assert cost.timeline(compute, fewer, slots).step_s <= cost.timeline(compute, copies, slots).step_s + 1e-9


def streaming(hardware: Hardware, name: str = "bf16") -> StagePlan:
    """Dev, every block streamed from pinned memory."""
    stage = plan_for(DEV, "rtx-3090-24gb", 128).stage("denoise")
    bare = replace(stage, weight_format=name, block_placements=(Placement.PINNED,) * 56, slots=2, prefetch_depth=1)
    return replace(bare, cost=cost.stage_cost(bare, spec(DEV), work(DEV), hardware))


def linked(tera_flops: float, link_bytes_per_s: float) -> Hardware:
    hardware = machine("rtx-3090-24gb", 128)
    rates = dict.fromkeys(hardware.matmul_flops_per_s, tera_flops * 1e12)
    return replace(
        hardware,
        matmul_flops_per_s=rates,
        attention_flops_per_s=tera_flops * 1e12,
        h2d_pinned_bytes_per_s=link_bytes_per_s,
        block_overhead_s=1e-9,
    )


@pytest.mark.parametrize(("name", "double_limit"), [("bf16", 64), ("int8", 128), ("nf4", 228)])
def test_streaming_hides_up_to_the_designs_rates(name: str, double_limit: float) -> None:
    """Section 4 at 25 GB/s: double-stream blocks bind first; the average over a step is 110, 219, 390 TFLOP/s."""
    below = streaming(linked(0.95 * double_limit, 25e9), name).cost
    above = streaming(linked(1.4 * double_limit, 25e9), name).cost
    assert below.waiting_s < 0.01 * below.run_s
    assert above.waiting_s > 0.01 * above.run_s


@pytest.mark.parametrize(("name", "average"), [("bf16", 110), ("int8", 219), ("nf4", 390 * 4.5 / 4.127)])
def test_beyond_the_average_rate_the_link_sets_the_step(name: str, average: float) -> None:
    """At the average rate the copies of a whole step take as long as its compute; beyond it nothing gets faster.

    The design's 390 is for 4.5 bits a weight, nf4 here takes 4.127.
    """
    at, beyond = (streaming(linked(factor * average, 25e9), name).cost for factor in (1.0, 3.0))
    copies = sum(FORMATS[name].block_bytes(block) for block in spec(DEV).transformer.blocks) / 25e9
    compute = (at.run_s - at.waiting_s) / work(DEV).steps
    assert compute == pytest.approx(copies, rel=0.05)
    assert beyond.run_s / work(DEV).steps == pytest.approx(copies, rel=0.05)


# ------------------------------------------------------------------------------------------------------ memory


def priced(stage: StagePlan, hardware: Hardware, name: str = DEV) -> StagePlan:
    return replace(stage, cost=cost.stage_cost(stage, spec(name), work(name), hardware))


def placed(stage: StagePlan, hardware: Hardware, *counts: tuple[Placement, int]) -> StagePlan:
    placements = tuple(placement for placement, count in counts for _ in range(count))
    slots = 0 if all(placement is Placement.GPU for placement in placements) else 2
    return priced(replace(stage, block_placements=placements, slots=slots), hardware)


def test_on_cuda_the_host_holds_libraries_cuda_and_the_arenas() -> None:
    hardware = machine("rtx-3090-24gb", 128)
    stage = plan_for(DEV, "rtx-3090-24gb", 128).stage("denoise")
    single = FORMATS["bf16"].block_bytes(spec(DEV).transformer.single_block)
    double = FORMATS["bf16"].block_bytes(spec(DEV).transformer.double_block)
    pinned = placed(stage, hardware, (Placement.PINNED, 56)).cost
    pageable = placed(stage, hardware, (Placement.PAGEABLE, 56)).cost
    disk = placed(stage, hardware, (Placement.DISK, 56)).cost
    arena = 8 * double + 48 * single
    assert pinned.host_pinned_bytes == arena
    assert (pageable.host_pinned_bytes, disk.host_pinned_bytes) == (0, 2 * double)
    assert pageable.host_bytes - pinned.host_bytes == arena
    assert pinned.host_bytes >= cost.LIBRARIES_HOST_BYTES + cost.CUDA_HOST_BYTES
    assert pinned.host_bytes < cost.LIBRARIES_HOST_BYTES + cost.CUDA_HOST_BYTES + 64 * MIB
    for each in (pinned, pageable, disk):
        assert each.slot_bytes == 2 * double
        assert each.context_bytes == hardware.context_bytes
        assert each.peak_vram_bytes == (
            each.context_bytes + each.resident_bytes + each.slot_bytes + each.activation_bytes + each.margin_bytes
        )


def test_resident_blocks_pass_through_host_memory_and_shrink_the_slots() -> None:
    hardware = machine("a100-80gb", 128)
    stage = plan_for(DEV, "rtx-3090-24gb", 128).stage("denoise")
    doubles = placed(stage, hardware, (Placement.GPU, 8), (Placement.DISK, 48)).cost
    none = placed(stage, hardware, (Placement.DISK, 56)).cost
    assert doubles.slot_bytes == pytest.approx(none.slot_bytes / 2, rel=1e-3)
    assert doubles.resident_bytes - none.resident_bytes == pytest.approx(8 * 1.963e9, rel=1e-3)
    assert doubles.host_bytes - cost.LIBRARIES_HOST_BYTES - cost.CUDA_HOST_BYTES > 1.9e9


def test_on_a_cpu_everything_counts_in_ram() -> None:
    hardware = machine("cpu", 128)
    stage = plan_for(KLEIN_4B, "cpu", 64).stage("denoise")
    streamed = priced(replace(stage, block_placements=(Placement.DISK,) * 25, slots=2), hardware, KLEIN_4B).cost
    whole = priced(replace(stage, block_placements=(Placement.GPU,) * 25, slots=0), hardware, KLEIN_4B).cost
    for each in (streamed, whole):
        assert (each.peak_vram_bytes, each.context_bytes, each.host_pinned_bytes, each.h2d_bytes) == (0, 0, 0, 0)
        assert each.peak_ram_bytes >= (
            cost.LIBRARIES_HOST_BYTES + each.resident_bytes + each.slot_bytes + each.activation_bytes
        )
    assert whole.resident_bytes > 6 * GIB > streamed.peak_ram_bytes


def test_conditioning_weights_count_where_they_need_more_than_the_blocks() -> None:
    """Dev's embedders and modulation are 1.38 GiB: more than one slot and activations of a tiny nf4 plan."""
    hardware = machine("rtx-3060-12gb", 64)
    stage = plan_for(DEV, "rtx-3060-12gb", 64).stage("denoise")
    small = replace(stage, weight_format="nf4", block_placements=(Placement.DISK,) * 56, slots=1)
    priced_small = cost.stage_cost(small, spec(DEV), work(DEV, 256), hardware)
    once = FORMATS["nf4"].plain_bytes(spec(DEV).transformer.conditioning_weights)
    assert once > 1.3 * GIB
    assert priced_small.slot_bytes + priced_small.activation_bytes >= once


def test_traffic_is_counted_per_round() -> None:
    hardware = machine("rtx-3090-24gb", 128)
    stage = plan_for(DEV, "rtx-3090-24gb", 128).stage("denoise")
    disk = placed(stage, hardware, (Placement.DISK, 56)).cost
    arena = sum(FORMATS["bf16"].block_bytes(block) for block in spec(DEV).transformer.blocks)
    assert disk.h2d_bytes == disk.resident_bytes + 28 * arena
    assert disk.disk_bytes > 28 * arena
    pinned = placed(stage, hardware, (Placement.PINNED, 56)).cost
    assert arena < pinned.disk_bytes < 1.1 * arena
    assert pinned.time_s == pinned.load_s + pinned.run_s


@pytest.mark.parametrize("profile", ["rtx-3060-12gb", "cpu"])
def test_pictures_of_a_large_run_count_in_ram(profile: str) -> None:
    one, many = (plan_for(KLEIN_4B, profile, 64, images=images).stage("decode").cost for images in (1, 200))
    assert many.host_bytes - one.host_bytes == pytest.approx(2 * 199 * 3 * 1024**2 * BF16, rel=0.01)


def test_a_class_that_the_device_lacks_runs_at_the_fp32_rate() -> None:
    turing = machine("rtx-2060-6gb")
    assert cost.compute_rate(turing, "bf16") == turing.matmul_flops_per_s["fp32"]
    assert cost.compute_rate(turing, "fp16") == turing.matmul_flops_per_s["fp16"]


def test_disk_blocks_come_at_the_slower_of_disk_and_link() -> None:
    hardware = machine("rtx-3060-12gb")
    assert cost.copy_seconds(Placement.GPU, 10**9, hardware) == 0
    assert cost.copy_seconds(Placement.PINNED, 10**9, hardware) == 1e9 / hardware.h2d_pinned_bytes_per_s
    assert cost.copy_seconds(Placement.PAGEABLE, 10**9, hardware) == 1e9 / hardware.h2d_pageable_bytes_per_s
    quick = replace(hardware, disk_read_bytes_per_s=1e12)
    assert cost.copy_seconds(Placement.DISK, 10**9, quick) == 1e9 / quick.h2d_pinned_bytes_per_s
    assert cost.copy_seconds(Placement.DISK, 10**9, hardware) == 1e9 / hardware.disk_read_bytes_per_s


def test_weight_formats_carry_their_error_and_its_provenance() -> None:
    stage = plan_for(DEV, "rtx-3060-12gb", 64, selection=Selection(weight_format="int8")).stage("denoise")
    assert stage.cost.fidelity_error == FORMATS["int8"].weight_error
    assert stage.cost.fidelity_provenance == FORMATS["int8"].provenance
