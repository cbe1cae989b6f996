"""nf4-mixed: which Linears have how many bits, and that it never takes more bytes than nf4."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from machines import DEV, KLEIN_4B, KLEIN_9B, plan_for, spec

from lowmem_flux2.planning.formats import FORMATS, MIXED
from lowmem_flux2.planning.mixed import mixed_bits, mixed_blocks
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.support import EVERYTHING

MODELS = {name: spec(name) for name in (DEV, KLEIN_9B, KLEIN_4B)}
MODELS["shapes"] = resolve_model("shapes", offline=True).spec


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_takes_no_more_bytes_than_nf4_and_nearly_as_many(model: str, dtype: str) -> None:
    mixed, nf4 = (sum(block_sizes(StagePlan.bare("denoise", name, dtype), MODELS[model])) for name in (MIXED, "nf4"))
    assert 0.996 * nf4 < mixed <= nf4


def test_a_text_encoder_rests_as_in_nf4() -> None:
    mixed, nf4 = (block_sizes(StagePlan.bare("encode", name, "bf16"), MODELS[DEV]) for name in (MIXED, "nf4"))
    assert mixed == nf4


def test_bits_saved_in_double_blocks_are_spent_on_single_ones() -> None:
    blocks = mixed_blocks(MODELS[DEV].transformer)
    stream = (4, 4, 4, 4, 3, 3)
    assert {block.bits for block in blocks[:8]} == {(4, 4, 4, 5, 3, 3, *stream)}
    assert [block.bits for block in blocks[8:]] == [(4, 5)] * 34 + [(4, 4)] * 14
    nine = Counter(block.bits for block in mixed_blocks(MODELS[KLEIN_9B].transformer)[8:])
    assert nine == {(4, 5): 20, (5, 5): 4}
    assert mixed_blocks(MODELS[KLEIN_9B].transformer)[-1].bits == (5, 5)  # the last blocks' first


def test_blocks_that_are_not_known_have_four_bits_everywhere() -> None:
    assert mixed_bits([{"self_attn.q_proj": 64, "mlp.up_proj": 128}] * 2) == [{}, {}]


def test_auto_never_takes_it_but_who_asks_gets_it() -> None:
    """Its weight error is larger than nf4's: what makes it better was measured on a tiny model alone."""
    assert FORMATS[MIXED].weight_error > FORMATS["nf4"].weight_error
    support = replace(EVERYTHING, weight_formats=frozenset({"nf4", MIXED}))
    for prefer in ("quality", "balanced", "speed", "memory"):
        plan = plan_for(DEV, "rtx-3060-12gb", 32, selection=Selection(prefer=prefer), support=support)
        assert plan.stage("denoise").weight_format == "nf4"
    asked = plan_for(DEV, "rtx-3060-12gb", 32, selection=Selection(weight_format=MIXED))
    assert asked.stage("denoise").weight_format == MIXED
