"""Batches of prompts: their composition, and what one pass over the encoder takes and costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import DEV, KLEIN_4B, KLEIN_BASE, machine, plan_for, spec, work

from lowmem_flux2.planning.batches import (
    WAITING_MOST_BYTES,
    batch_sizes,
    batches_a_pass,
    negatives_of,
    prompt_batches,
    waiting_bytes,
)
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.units import GIB

BF16 = 2


@given(prompts=st.integers(1, 40), size=st.integers(1, 40), two_passes=st.booleans())
def test_the_sizes_that_are_priced_are_those_of_the_batches(prompts: int, size: int, two_passes: bool) -> None:
    texts = tuple(f"prompt {index}" for index in range(prompts))
    batches = prompt_batches(texts, size)
    assert tuple(prompt for batch in batches for prompt in batch) == texts
    encoded = batches + (list(dict.fromkeys(negatives_of(batches, None))) if two_passes else [])
    workload = replace(work(KLEIN_BASE, prompts=prompts), guidance_passes=1 + two_passes)
    assert sorted(batch_sizes(workload, size)) == sorted(len(batch) for batch in encoded)


@pytest.mark.parametrize(("name", "px", "vram_gib"), [(DEV, 512, 12), (DEV, 1024, 12), (KLEIN_4B, 512, 6)])
def test_where_speed_is_preferred_no_other_batch_size_is_faster(name: str, px: int, vram_gib: int) -> None:
    """Larger batches share the weights' way to the card, and leave less room for resident blocks."""
    fixed = Selection(prefer="speed", max_vram_bytes=vram_gib * GIB)
    times = {
        size: plan_for(name, "rtx-3060-12gb", 32, px=px, images=8, selection=replace(fixed, batch_size=size))
        .stage("denoise")
        .cost.time_s
        for size in (0, 1, 2, 4, 8)
    }
    assert times[0] <= min(times[1], times[2], times[4], times[8]) + 1e-6
    assert times[1] > times[0]


@given(size=st.integers(1, 64), tokens=st.integers(1, 2048))
def test_one_batch_passes_and_the_others_wait_within_the_bound(size: int, tokens: int) -> None:
    encoder = spec(DEV).text_encoder
    together = batches_a_pass(encoder, size, tokens, BF16)
    each = waiting_bytes(encoder, size, tokens, BF16)
    assert (together - 1) * each <= WAITING_MOST_BYTES < together * each


def one_by_one(name: str, prompts: int, cached: int = 0) -> StagePlan:
    """The encode stage of a plan from disk, a prompt a batch, priced."""
    stage = plan_for(name, "rtx-3060-12gb", 64, selection=Selection(text_weight_format="bf16")).stage("encode")
    placements = (Placement.DISK,) * len(stage.block_placements)
    stage = replace(stage, batch_size=1, block_placements=placements, slots=2, cached_batches=cached)
    workload = work(name, prompts=prompts)
    return replace(stage, cost=stage_cost(stage, spec(name), workload, machine("rtx-3060-12gb", 64)))


def read_once(name: str, prompts: int) -> int:
    """Bytes of the weights that are read, without the embedding's rows, of which each prompt has its own."""
    rows = prompts * work(name).text_tokens * spec(name).text_encoder.hidden_size * BF16
    return one_by_one(name, prompts).cost.disk_bytes - rows


@pytest.mark.parametrize("name", [DEV, KLEIN_4B])
def test_a_dozen_prompts_read_the_encoder_once(name: str) -> None:
    one, dozen = one_by_one(name, 1).cost, one_by_one(name, 12).cost
    assert read_once(name, 12) == read_once(name, 1)
    assert dozen.h2d_bytes == one.h2d_bytes
    assert dozen.time_s < 3 * one.time_s  # compute, which the reads hide
    waiting = 11 * waiting_bytes(spec(name).text_encoder, 1, 512, BF16)
    assert one.activation_bytes < dozen.activation_bytes <= one.activation_bytes + waiting


def test_more_prompts_than_may_wait_take_another_pass() -> None:
    together = batches_a_pass(spec(DEV).text_encoder, 1, 512, BF16)
    assert read_once(DEV, together) == read_once(DEV, 1)
    assert read_once(DEV, together + 1) == 2 * read_once(DEV, 1)


def test_cached_batches_cost_less_and_all_of_them_next_to_nothing() -> None:
    costs = [one_by_one(DEV, 12, cached).cost for cached in range(13)]
    for more, less in pairwise(costs):
        assert more.run_s * (1 + 1e-9) >= less.run_s
        assert more.peak_vram_bytes >= less.peak_vram_bytes
    assert costs[12].time_s == costs[12].disk_bytes == costs[12].resident_bytes == costs[12].slot_bytes == 0
    assert costs[12].peak_vram_bytes == costs[12].context_bytes
    assert costs[12].fidelity_error == costs[0].fidelity_error  # embeddings are as good as when they were made
