"""What quantizing first takes, and that it is said only where it is to be done."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from machines import DEV, machine, plan_for, spec, work

from lowmem_flux2.planning.file_sizes import DECODED_WEIGHTS_PER_S
from lowmem_flux2.planning.plan import Preparation
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.preparation import preparations
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.stored import Encoding

INT8 = Selection(weight_format="int8", text_weight_format="nf4")


def made(disk_bytes_per_s: float = 3.5e9, prepared: tuple[tuple[str, str, str], ...] = ()) -> dict[str, Preparation]:
    hardware = replace(machine("rtx-3060-12gb", 64), disk_read_bytes_per_s=disk_bytes_per_s)
    plan = make_plan(spec(DEV), work(DEV), hardware, INT8, profile="x", prepared=prepared)  # type: ignore[arg-type]
    return {each.component: each for each in plan.preparations}


def test_each_quantized_component_is_read_whole_and_written_once() -> None:
    found = made()
    assert found.keys() == {"text_encoder", "transformer"}
    transformer = found["transformer"]
    assert transformer.weight_format == "int8"
    blocks = sum(block.total_weights for block in spec(DEV).transformer.blocks)
    assert transformer.read_bytes == 2 * blocks
    assert transformer.write_bytes == pytest.approx(blocks, rel=0.01)


def test_it_takes_the_disk_and_the_processor() -> None:
    slow, quick = made(1e9)["transformer"], made(1e12)["transformer"]
    assert slow.time_s - quick.time_s == pytest.approx((slow.read_bytes + slow.write_bytes) / 1e9, rel=0.01)
    assert quick.time_s > 60  # 32 billion weights on one thread


def test_what_the_store_holds_is_not_prepared_again() -> None:
    found = made(prepared=(("transformer", "int8", "bf16"), ("text_encoder", "int8", "bf16")))
    assert found.keys() == {"text_encoder"}


def test_unquantized_weights_are_read_as_they_are() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", 64, selection=Selection(weight_format="bf16", text_weight_format="bf16"))
    assert plan.preparations == preparations(plan.stages, spec(DEV), plan.hardware, ()) == ()
    assert plan.prepare_s == 0


def test_every_encoding_has_its_rate_of_decoding() -> None:
    assert set(DECODED_WEIGHTS_PER_S) == set(get_args(Encoding)) - {"plain"}
