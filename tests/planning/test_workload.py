"""Requests: defaults from the model, and every bad input refused with what to do instead."""

from __future__ import annotations

import math
from typing import Any

import pytest
from machines import DEV, KLEIN_4B, KLEIN_BASE, spec

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.workload import guidance_passes, make_request, workload_of


def test_defaults_come_from_the_model() -> None:
    dev, klein = (make_request(spec(name), ("x",)) for name in (DEV, KLEIN_4B))
    assert (dev.width, dev.height, dev.num_inference_steps, dev.guidance_scale) == (1024, 1024, 28, 4.0)
    assert (klein.num_inference_steps, klein.guidance_scale, klein.max_sequence_length) == (4, 1.0, 512)


def test_a_workload_counts_tokens_images_and_passes() -> None:
    request = make_request(spec(DEV), ("a", "b"), width=768, height=512, num_images_per_prompt=3, num_inference_steps=7)
    work = workload_of(request, spec(DEV))
    assert (work.image_tokens, work.text_tokens, work.sequence_tokens) == (48 * 32, 512, 48 * 32 + 512)
    assert (work.num_prompts, work.num_images, work.steps, work.guidance_passes) == (2, 6, 7, 1)


@pytest.mark.parametrize(
    ("model", "guidance", "passes"), [(DEV, 4.0, 1), (KLEIN_4B, 4.0, 1), (KLEIN_BASE, 4.0, 2), (KLEIN_BASE, 1.0, 1)]
)
def test_only_undistilled_klein_above_guidance_one_takes_two_passes(model: str, guidance: float, passes: int) -> None:
    assert guidance_passes(spec(model), guidance) == passes


@pytest.mark.parametrize("prompts", [(), ("",), ("  \n",), ("fine", "")])
def test_an_empty_prompt_is_refused(prompts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        make_request(spec(DEV), prompts)


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "at least 16 px, not 0"),
        (-1, "at least 16 px, not -1"),
        (1080, "not a multiple of 16: the nearest valid ones are 1072 or 1088"),
        (8, "the nearest valid ones are 16"),
        (4095, "4080 or 4096"),
        (4112, "too large: at most 4096"),
        (100000, "too large: at most 4096"),
    ],
)
def test_an_impossible_size_is_refused(side: str, value: int, message: str) -> None:
    sizes: dict[str, Any] = {side: value}
    with pytest.raises(UsageError, match=f"{side}.* {message}"):
        make_request(spec(DEV), ("x",), **sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "steps must be 1 to 1000, not 0"),
        ({"num_inference_steps": -3}, "steps must be"),
        ({"num_inference_steps": 1001}, "steps must be"),
        ({"guidance_scale": -0.1}, "guidance must be 0 to 100"),
        ({"guidance_scale": 101.0}, "guidance must be"),
        ({"guidance_scale": math.nan}, "guidance must be"),
        ({"guidance_scale": math.inf}, "guidance must be"),
        ({"num_images_per_prompt": 0}, "number of images"),
        ({"num_images_per_prompt": 1025}, "number of images"),
        ({"max_sequence_length": 0}, "1 to 2048 tokens, not 0"),
        ({"max_sequence_length": 2049}, "1 to 2048 tokens"),
    ],
)
def test_an_impossible_number_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_request(spec(DEV), ("x",), **options)


@pytest.mark.parametrize(
    ("model", "guidance", "why"),
    [(DEV, 4.0, "guidance is embedded"), (KLEIN_4B, 4.0, "distilled"), (KLEIN_BASE, 1.0, "guidance 1 is not above 1")],
)
def test_a_negative_prompt_without_effect_is_refused(model: str, guidance: float, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make_request(spec(model), ("x",), negative_prompt="blur", guidance_scale=guidance)


def test_a_negative_prompt_is_kept_where_it_counts() -> None:
    assert make_request(spec(KLEIN_BASE), ("x",), negative_prompt="blur", guidance_scale=3).negative_prompt == "blur"
