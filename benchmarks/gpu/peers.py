"""Part (d): the same work through diffusers' offloading, each way in a process of its own, and ours under its peak.

klein-9b, unquantized, whole runs; and dev's denoising at int8, because dev in bf16 exceeds the RAM of most machines
once group offload has pinned it. A peer that is ended for RAM or time is a result. The VAE (0.17 GB) stays on the card
under group offload, whose hooks do not see ``vae.decode``; dev's int8 Linears are ours in both, so that only the
offloading differs.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from gpu.case import Case
from gpu.running import PROMPT, SEED, Bench, carry_out, case_on_record, digest
from gpu.stock import dev_pipeline, klein_pipeline
from lowmem_flux2.planning.selection import Selection, compute_dtype
from lowmem_flux2.runtime.device import DTYPES, measure
from lowmem_flux2.runtime.inputs import Wanted

STEPS = 6
"""The first step of group offload with streams is synchronous and the second the first that prefetches."""
UNSTEADY_STEPS = 2
DEV_FORMAT = "int8"
PLANNED_STEPS = 28
"""Ours is planned for a long generation: peers pin everything whatever that takes, and steps are what is compared."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to offload. ``level`` is a group offload's, or names the pipeline's own way."""

    level: str
    use_stream: bool = False
    record_stream: bool = False
    low_cpu_mem_usage: bool = False

    @property
    def name(self) -> str:
        flags = [word for word, on in (("stream", self.use_stream), ("record", self.record_stream)) if on]
        return "-".join([self.level, *flags, *(["lowcpu"] if self.low_cpu_mem_usage else [])])


BLOCK, LEAF, MODEL, SEQUENTIAL = "block", "leaf", "model", "sequential"
KLEIN_PEERS = (
    Peer(BLOCK, use_stream=True, record_stream=True),
    Peer(MODEL),
    Peer(SEQUENTIAL),
    Peer(LEAF, use_stream=True, record_stream=True),
    Peer(BLOCK, use_stream=True, record_stream=True, low_cpu_mem_usage=True),
    Peer(BLOCK, use_stream=True),
    Peer(LEAF, use_stream=True, record_stream=True, low_cpu_mem_usage=True),
    Peer(LEAF, use_stream=True),
    Peer(BLOCK),
    Peer(BLOCK, use_stream=True, low_cpu_mem_usage=True),
    Peer(LEAF, use_stream=True, low_cpu_mem_usage=True),
    Peer(LEAF),
)
DEV_PEERS = (Peer(BLOCK, use_stream=True, record_stream=True), Peer(MODEL), Peer(BLOCK))


def cases(bench: Bench) -> list[Case]:
    """The four main ways, each followed by ours under its peak; dev; then the other flags."""
    guess_s = {"klein-9b": 5.0, "dev": 5.0} if bench.tiny else {"klein-9b": 75.0, "dev": 120.0}
    klein = [Case(f"klein-9b-{p.name}", partial(_klein, p), guess_s["klein-9b"], 150, alone=True) for p in KLEIN_PEERS]
    dev = [Case(f"dev-{p.name}", partial(_dev, p), guess_s["dev"], 240, alone=True) for p in DEV_PEERS]
    made: list[Case] = []
    for name, compared in (("klein-9b", klein[:4]), ("dev", dev[:1])):
        for case in compared:
            made += [case, Case(f"ours-at-{case.name}", partial(_ours, name, case.name), guess_s[name] / 2)]
    made += [*klein[4:], *dev[1:]]
    # accelerate's sequential hooks fail on a CPU: they move to "cpu:0", which is another device to torch than "cpu".
    return [case for case in made if SEQUENTIAL not in case.name or bench.device != "cpu"]


def offload(pipeline: Any, peer: Peer, device: torch.device) -> None:
    """Set the offloading up. A CPU has no streams: there the same is done without."""
    streams = peer.use_stream and device.type == "cuda"
    if peer.level == MODEL:
        pipeline.enable_model_cpu_offload(device=device)
    elif peer.level == SEQUENTIAL:
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        options: dict[str, Any] = {
            "onload_device": device,
            "offload_type": f"{peer.level}_level",
            "num_blocks_per_group": 1 if peer.level == BLOCK else None,
            "use_stream": streams,
            "record_stream": streams and peer.record_stream,
            "low_cpu_mem_usage": peer.low_cpu_mem_usage,
        }
        apply_group_offloading(pipeline.transformer, **options)
        if getattr(pipeline, "text_encoder", None) is not None:
            blocks = {"block_modules": ["model"]} if peer.level == BLOCK else {}
            apply_group_offloading(pipeline.text_encoder, **options, **blocks)
            pipeline.vae.to(device)


def _klein(peer: Peer, bench: Bench) -> dict[str, Any]:
    model = bench.subject("klein-9b")
    dtype = DTYPES[compute_dtype(Selection(), bench.machine.hardware)]
    start = time.perf_counter()
    pipeline = klein_pipeline(model, bench.pieces, dtype)
    asked = {"prompt": PROMPT, "guidance_scale": 1.0, "max_sequence_length": bench.text_tokens, "output_type": "pt"}
    return _timed(bench, pipeline, peer, asked, time.perf_counter() - start)


def _dev(peer: Peer, bench: Bench) -> dict[str, Any]:
    model = bench.subject("dev")
    plan = bench.plan(model, bench.request(model, STEPS), weight_format=DEV_FORMAT)
    start = time.perf_counter()
    dtype = DTYPES[plan.stage("denoise").compute_dtype]
    pipeline = dev_pipeline(model, bench.pieces, dtype, DEV_FORMAT)
    scale = model.source.spec.defaults.guidance_scale
    asked = {"prompt_embeds": bench.embeds(model, plan), "guidance_scale": scale, "output_type": "latent"}
    return _timed(bench, pipeline, peer, asked, time.perf_counter() - start)


def _timed(bench: Bench, pipeline: Any, peer: Peer, asked: dict[str, Any], made_s: float) -> dict[str, Any]:
    device = torch.device(bench.device)
    moments: list[float] = []
    kept: dict[str, torch.Tensor] = {}

    def note(_: Any, __: int, ___: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept["latents"] = values["latents"].to("cpu")  # waits for the step
        moments.append(time.perf_counter())
        return values

    with measure(device, 0) as taken:
        start = time.perf_counter()
        offload(pipeline, peer, device)
        set_up_s = time.perf_counter() - start
        begun = time.perf_counter()
        pipeline(
            **asked,
            height=bench.side_px,
            width=bench.side_px,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=note,
        )
        run_s = time.perf_counter() - begun
    steps = [after - before for before, after in pairwise(moments)]
    steady = statistics.median(steps[UNSTEADY_STEPS - 1 :])
    return {
        "made_s": made_s,
        "set_up_s": set_up_s,
        "run_s": run_s,
        "later_step_s": steps,
        "step_median_s": steady,
        "peak_allocated_bytes": taken.peak_allocated_bytes,
        "peak_reserved_bytes": taken.peak_vram_bytes,
        "peak_ram_bytes": taken.peak_ram_bytes,
        "latents": digest(kept["latents"]),
        "line": f"step {steady:.3f} s, set-up {set_up_s:.1f} s, "
        f"peak reserved {taken.peak_vram_bytes / (1 << 30):.2f} GiB, RSS {taken.peak_ram_bytes / (1 << 30):.1f} GiB",
    }


def _ours(name: str, peer: str, bench: Bench) -> dict[str, Any]:
    """The same work by the engine, allowed what the peer took of the card.

    Raises:
        DoesNotFit: which is a result.
    """
    theirs = case_on_record(bench, "peers", peer)
    if theirs is None:
        raise RuntimeError(f"{peer} is not on record: nothing to compare with")
    plain = compute_dtype(Selection(), bench.machine.hardware)
    model = bench.subject(name)
    request = bench.request(model, STEPS)
    selected: dict[str, Any] = {"weight_format": plain if name != "dev" else DEV_FORMAT}
    if name != "dev":
        selected["text_weight_format"] = plain
    cap = theirs.get("card_taken_peak_bytes")
    if bench.machine.hardware.device == "cuda":
        cap = cap or theirs["peak_reserved_bytes"] + bench.machine.hardware.context_bytes
        selected["max_vram_bytes"] = cap
    plan = bench.plan(model, bench.request(model, PLANNED_STEPS), **selected)
    embeds = bench.embeds(model, plan) if name == "dev" else None
    result: Wanted = "pictures" if embeds is None else "packed_latents"
    run = carry_out(bench, model, plan, request, embeds=embeds, result=result)
    gain = theirs["step_median_s"] / run.step_s
    same = theirs["latents"] == run.figures["latents"]
    return run.figures | {
        "met": cap is None or run.figures["peak_vram_bytes"] <= cap,
        "peer": peer,
        "cap_bytes": cap,
        "peer_step_over_ours": gain,
        "latents_equal_peers": same,
        "line": f"step {run.step_s:.3f} s, the peer's is {gain:.2f} times that; peak "
        f"{run.figures['peak_vram_bytes'] / (1 << 30):.2f} GiB; latents {'equal' if same else 'NOT EQUAL to'} its",
    }
