"""Closed-form cost of a stage: (StagePlan, ModelSpec, Workload, Hardware) -> bytes and seconds. No torch, no policy.

Bytes are sums over placements; activations come from ``activations``, FLOPs from ``flops``, and what a round over the
blocks takes from the ``timeline``. The planner's search prices parts of it by the same functions, so that both agree
to the byte and the nanosecond.
"""

from __future__ import annotations

from typing import NamedTuple

from lowmem_flux2.planning.fidelity import fidelity_of
from lowmem_flux2.planning.file_bytes import (
    disk_bytes,
)
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.passages import Tiers, passages, tiers_of
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.stage_cost import StageCost
from lowmem_flux2.planning.stage_work import StageWork, before_weights, stage_work
from lowmem_flux2.planning.timeline import ROUNDS_SIMULATED, Timeline, nanoseconds, simulate
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import MIB

READ_BUFFER_BYTES = 16 * MIB
"""Values are converted from the stored dtype in pieces of this size (``runtime.checkpoint.CONVERT_BYTES``)."""


def margin_bytes(overhead_bytes: int, activation_bytes: int, resident_bytes: int) -> int:
    """Library workspaces and allocator fragmentation: the hardware's overhead, 5 % of activations and 1 % of weights.

    A stated margin, not a derived one: the caching allocator rounds blocks above 1 MiB up to 2 MiB.
    """
    return overhead_bytes + activation_bytes // 20 + resident_bytes // 100


class DeviceBytes(NamedTuple):
    """Memory of the compute device by kind, the context apart."""

    resident: int
    slots: int
    activation: int
    workspace: int
    margin: int


def device_bytes(work: StageWork, gpu: int, slots: int) -> DeviceBytes:
    """Given the bytes of resident blocks and of all slots. The sum never shrinks when either grows."""
    # The once-per-generation weights come before any block: they count where they need more than what follows.
    resident = gpu + work.kept_bytes
    activation = max(work.activation_bytes, work.once_bytes - resident - slots)
    weights = resident + slots + activation - work.activation_bytes
    margin = margin_bytes(work.overhead_bytes, work.activation_bytes, weights)
    return DeviceBytes(resident, slots, activation, work.workspace_bytes, margin)


def device_total_bytes(work: StageWork, weights: int) -> int:
    """``sum(device_bytes)`` of resident blocks and slots of so many bytes together: which of both does not matter."""
    weights = max(weights + work.kept_bytes, work.once_bytes - work.activation_bytes)
    live = work.activation_bytes + work.workspace_bytes
    return weights + live + margin_bytes(work.overhead_bytes, work.activation_bytes, weights)


def device_room_bytes(work: StageWork, most_bytes: int) -> int:
    """The most bytes of resident blocks and slots whose ``device_total_bytes`` is no more; negative where none are."""
    live = work.activation_bytes + work.workspace_bytes
    left = most_bytes - live - margin_bytes(work.overhead_bytes, work.activation_bytes, 0)
    weights = left * 100 // 101
    while weights + 1 + (weights + 1) // 100 <= left:
        weights += 1
    return weights - work.kept_bytes if weights >= work.once_bytes - work.activation_bytes else -1


def host_bytes(work: StageWork, tiers: Tiers, on_host: bool) -> int:
    """RAM that is not pinned, in bytes."""
    host = work.process_bytes + READ_BUFFER_BYTES + work.host_bytes
    beside = tiers.pageable + work.result_bytes
    if on_host:
        return host + max(beside + sum(device_bytes(work, tiers.gpu, tiers.slots)), work.passing_bytes)
    # Before the arenas exist, resident blocks pass through two host buffers, and embedders tensor by tensor.
    passing = max(tiers.ring + 2 * tiers.largest_resident, work.passing_bytes)
    return host + max(beside, passing - (tiers.pinned + tiers.ring))


def room_bytes(work: StageWork, ram_bytes: int) -> int:
    """What so much RAM beside a GPU has room for, of pinned and pageable blocks and the ring (see ``host_bytes``)."""
    return ram_bytes - work.process_bytes - READ_BUFFER_BYTES - work.host_bytes - work.result_bytes


def loaded_bytes(work: StageWork, tiers: Tiers) -> int:
    """What is read before the first block is computed, paddings included."""
    return work.file_form.in_file(tiers.gpu + tiers.pinned + tiers.pageable) + work.other_file_bytes


def load_ns(work: StageWork, tiers: Tiers, hardware: Hardware) -> int:
    """Until the first block is computed: reading, beside it the copies to the device, and pinning.

    One block is copied to the device while the next is read, so the slower of the two counts. The page cache is cold.
    """
    busy = nanoseconds(loaded_bytes(work, tiers), hardware.load_bytes_per_s)
    busy += work.file_form.decode_ns(tiers.gpu + tiers.pinned + tiers.pageable)
    if hardware.device == "cuda":
        to_device = tiers.gpu + work.kept_bytes + work.once_bytes
        busy = max(busy, nanoseconds(to_device, hardware.h2d_pageable_bytes_per_s))
        busy += nanoseconds(tiers.pinned + tiers.ring, hardware.pin_bytes_per_s)
    return busy + nanoseconds(hardware.stage_setup_s, 1)


def stage_timeline(stage: StagePlan, work: StageWork, hardware: Hardware) -> Timeline:
    """The rounds of a stage, as its placements and slots have them."""
    ways = passages(stage, work.block_bytes, hardware, work.file_form)
    return simulate(ways, work.compute_ns, work.between_ns, stage.slots, min(work.rounds, ROUNDS_SIMULATED))


def stage_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    """Price one stage. Deterministic; reads nothing but its arguments."""
    on_host = hardware.device == "cpu"
    work = stage_work(stage, model, workload, hardware)
    if not work.rounds:
        return _cached_cost(stage, work.host_bytes, hardware)
    error, provenance = fidelity_of(stage, workload.steps)
    tiers = tiers_of(stage, work.block_bytes, on_host)
    device = device_bytes(work, tiers.gpu, tiers.slots)
    load = load_ns(work, tiers, hardware)
    run = work.first_ns + stage_timeline(stage, work, hardware).total_ns(work.rounds)
    # A ring that may not be pinned works from pageable memory; the reads before it, not its copies, set its pace.
    pinned_ring = tiers.ring if tiers.pinned + tiers.ring <= hardware.pinnable_bytes else 0
    compute = work.first_ns + work.rounds * (sum(work.compute_ns) + work.between_ns)
    from_disk = [placement is Placement.DISK for placement in stage.block_placements]
    ways = passages(stage, work.block_bytes, hardware, work.file_form)
    reads = sum(way.copy_ns if on_host else way.read_ns for way, disk in zip(ways, from_disk, strict=True) if disk)
    copies = sum(way.copy_ns for way, disk in zip(ways, from_disk, strict=True) if not (disk and on_host))
    return StageCost(
        resident_bytes=device.resident,
        slot_bytes=device.slots,
        activation_bytes=device.activation,
        workspace_bytes=device.workspace,
        margin_bytes=device.margin,
        context_bytes=0 if on_host else hardware.context_bytes,
        host_pinned_bytes=tiers.pinned + pinned_ring,
        host_bytes=host_bytes(work, tiers, on_host) + tiers.ring - pinned_ring,
        host_pageable_bytes=tiers.pageable,
        process_bytes=work.process_bytes,
        disk_bytes=disk_bytes(stage, work.block_file_bytes, work.other_file_bytes, work.rounds),
        h2d_bytes=0
        if on_host
        else tiers.gpu + work.kept_bytes + work.rounds * (tiers.pinned + tiers.pageable + tiers.disk),
        load_s=load / 1e9,
        run_s=run / 1e9,
        time_s=(load + run) / 1e9,
        compute_s=compute / 1e9,
        expand_s=work.rounds * work.expand_ns / 1e9,
        copy_s=work.rounds * copies / 1e9,
        read_s=work.rounds * reads / 1e9,
        waiting_s=(run - compute) / 1e9,
        rounds=work.rounds,
        fidelity_error=error,
        fidelity_provenance=provenance,
        on_host=on_host,
    )


def _cached_cost(stage: StagePlan, embeddings_bytes: int, hardware: Hardware) -> StageCost:
    """All embeddings come from the prompt cache: no weights, no time worth predicting, the format's fidelity."""
    on_host, process = hardware.device == "cpu", before_weights(hardware)["process_bytes"]
    error, provenance = fidelity_of(stage, steps=0)
    return StageCost(
        context_bytes=0 if on_host else hardware.context_bytes,
        host_bytes=process + embeddings_bytes,
        process_bytes=process,
        fidelity_error=error,
        fidelity_provenance=provenance,
        on_host=on_host,
    )
