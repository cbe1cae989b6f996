"""Chunks of tokens give the bits of whole sequences on a CPU, in every dtype, format and placement.

Not so in bf16 with AMX, whose matmuls round one element in some thousands otherwise with another number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock

from lowmem_flux2 import Engine
from lowmem_flux2.planning.chunks import chunk_bounds
from lowmem_flux2.planning.ladder import next_rung
from lowmem_flux2.planning.plan import Placement, Plan
from lowmem_flux2.runtime.chunking import double_block, single_block
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.live import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNKS = partial(chunk_bounds, chunk_tokens=64)
HEADS, HEAD_DIM = 2, 64
WIDTH = HEADS * HEAD_DIM


def drawn(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def are_same(expected: torch.Tensor, made: torch.Tensor) -> bool:
    """To the bit, or where AMX rounds, within the step from one bf16 number to the next in few of many elements."""
    if expected.dtype is torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16"):
        return bool((expected - made).norm() <= 1e-4 * expected.norm())
    return torch.equal(expected, made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "image", "text"), [(1, 256, 64), (1, 300, 77), (2, 192, 128), (3, 150, 16), (1, 40, 8)]
)
@torch.no_grad()
def test_a_blocks_chunks_are_bit_equal_to_diffusers_own_forward(dtype: str, batch: int, image: int, text: int) -> None:
    """Whole chunks and ragged ones, a text of less than one, and a batch, whose slices are not contiguous."""
    torch.manual_seed(1)
    draw = drawn(DTYPES[dtype])
    double = Flux2TransformerBlock(WIDTH, HEADS, HEAD_DIM).to(DTYPES[dtype])
    single = Flux2SingleTransformerBlock(WIDTH, HEADS, HEAD_DIM).to(DTYPES[dtype])
    hidden, encoded = draw(batch, image, WIDTH), draw(batch, text, WIDTH)
    modulations = [draw(batch, 6 * WIDTH), draw(batch, 6 * WIDTH), draw(batch, 3 * WIDTH)]
    rope = (draw(image + text, HEAD_DIM).float(), draw(image + text, HEAD_DIM).float())
    before = hidden.clone(), encoded.clone()
    expected = double(hidden, encoded, modulations[0], modulations[1], rope)
    made = double_block(double, hidden, encoded, modulations[0], modulations[1], rope, CHUNKS)
    assert [are_same(*pair) for pair in zip(expected, made, strict=True)] == [True, True]
    joint = torch.cat(expected, dim=1)
    assert are_same(
        single(joint, None, modulations[2], rope), single_block(single, joint, modulations[2], rope, CHUNKS)
    )
    assert torch.equal(hidden, before[0])  # what went in may be another pass's too
    assert torch.equal(encoded, before[1])


@torch.no_grad()
def test_fp16_is_clipped_where_diffusers_clips() -> None:
    draw = drawn(torch.float16)
    single = Flux2SingleTransformerBlock(WIDTH, HEADS, HEAD_DIM).to(torch.float16)
    hidden, modulation = 60000 * draw(1, 192, WIDTH).sign(), draw(1, 3 * WIDTH)
    modulation[:, 2 * WIDTH :] = 60000
    rope = (draw(192, HEAD_DIM).float(), draw(192, HEAD_DIM).float())
    expected = single(hidden, None, modulation, rope)
    assert expected.abs().max() == 65504
    assert torch.equal(expected, single_block(single, hidden, modulation, rope, CHUNKS))


@torch.no_grad()
def test_chunks_take_less_memory_than_whole_sequences() -> None:
    draw = drawn(torch.bfloat16)
    single = Flux2SingleTransformerBlock(WIDTH, HEADS, HEAD_DIM).to(torch.bfloat16)
    hidden, modulation = draw(1, 1024, WIDTH), draw(1, 3 * WIDTH)
    rope = (draw(1024, HEAD_DIM).float(), draw(1024, HEAD_DIM).float())
    with LiveBytes() as whole:
        single(hidden, None, modulation, rope)
    with LiveBytes() as chunked:
        single_block(single, hidden, modulation, rope, CHUNKS)
    assert chunked.peak_bytes["cpu"] < 0.45 * whole.peak_bytes["cpu"]


ASKED: dict[str, Any] = {
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "height": 192,
    "width": 208,
    "max_sequence_length": 64,
}
"""156 image tokens, two chunks, the second of 92; 220 in all, three chunks, the last of 92."""


def chunked(plan: Plan, placements: tuple[Placement, ...] | None = None) -> Plan:
    stage = replace(plan.stage("denoise"), chunk_tokens=64)
    if placements:
        count = len(stage.block_placements)
        stage = replace(stage, block_placements=(placements * count)[:count], slots=2, prefetch_depth=1)
    return replace(plan, stages=tuple(stage if one.stage == "denoise" else one for one in plan.stages))


@pytest.mark.parametrize(
    ("form", "dtype", "weight_format", "images"),
    [
        ("dev", "bf16", "bf16", 1),
        ("klein", "fp32", "fp32", 2),
        ("klein", "bf16", "int8", 2),
        ("dev", "fp32", "int4", 1),
    ],
)
def test_a_chunked_run_gives_the_same_latents(
    form: str, dtype: str, weight_format: str, images: int, folders: dict[str, Path]
) -> None:
    """Both forms, both guidance passes of klein, quantized weights, batches, and blocks from everywhere."""
    with Engine(str(folders[form]), dtype=dtype, weight_format=weight_format) as engine:
        request = engine.request("a red circle", num_images_per_prompt=images, **ASKED)
        plan = engine.plan(request)
        assert plan.stage("denoise").batch_size == images
        asked = {**ASKED, "num_images_per_prompt": images, "output_type": "latent", "seed": 3}
        expected, made, streamed = (
            engine.generate("a red circle", **asked, plan=each).images
            for each in (plan, chunked(plan), chunked(plan, tuple(Placement)))
        )
    assert are_same(expected, made)
    assert torch.equal(made, streamed)


def test_the_ladder_takes_chunks_when_no_block_is_left_to_stream(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that never has enough for whole sequences ends in chunks, with the same pixels and no other format."""
    asked = {**ASKED, "height": 512, "width": 512, "seed": 3, "output_type": "latent"}
    folder = str(folders["distilled"])
    expected = Engine(folder, dtype="fp32").generate("a red circle", **asked).images
    predict = Forward.predict

    def short(self: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.chunks is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Forward, "predict", short)
    made = Engine(folder, dtype="fp32").generate("a red circle", **asked)
    assert made.report.events[-1].endswith("chunks of 512 tokens")
    assert torch.equal(made.images, expected)


def test_chunks_are_the_last_rung(folders: dict[str, Path]) -> None:
    with Engine(str(folders["distilled"]), dtype="bf16") as engine:
        plan = engine.plan(engine.request("a red circle", **{**ASKED, "height": 512, "width": 512}))
        chunks = [plan.stage("denoise").chunk_tokens]
        while (lower := next_rung(plan, "denoise", engine.source.spec)) is not None:
            chunks.append(lower.stage("denoise").chunk_tokens)
            plan = lower
    assert chunks == sorted(chunks)
    assert set(chunks) == {0, 512}
