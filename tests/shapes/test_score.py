"""The scorer of the `shapes` checkpoint: right drawings pass, everything else fails, on the right checks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from draw import COLOURS, PICTURE, POSITIONS, SHAPES, SIZES, Spec, draw, sample_specs
from score import ATTRIBUTES, CHECKS, Reading, check, contact_sheet, pass_rates, psnr, read_picture
from torch import Tensor
from torch.nn import functional

SPEC = Spec("", "red", "circle", "in the center", "blue")


def drawn(specs: list[Spec], seed: int = 0) -> Tensor:
    """Drawings as the engines return pictures: (n, height, width, 3) in [0, 1]."""
    return (draw(specs, torch.Generator().manual_seed(seed)).permute(0, 2, 3, 1) + 1) / 2


def test_all_of_200_drawings_pass() -> None:
    specs = sample_specs(200, seed=3)
    for spec, picture in zip(specs, drawn(specs), strict=True):
        result = check(read_picture(picture), spec)
        assert list(result) == list(CHECKS)
        assert all(result.values()), (spec, read_picture(picture))


def test_every_word_is_read() -> None:
    specs = [
        Spec(size, colour, shape, position, "white" if colour != "white" else "black")
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for position in POSITIONS
    ]
    for spec, picture in zip(specs, drawn(specs, seed=1), strict=True):
        reading = read_picture(picture)
        assert {name: getattr(reading, name) for name in ATTRIBUTES} == {
            name: getattr(spec, name) for name in ATTRIBUTES
        }


def test_bytes_and_floats_read_alike() -> None:
    for picture in drawn(sample_specs(20, seed=4)):
        as_bytes = (picture.numpy() * 255).round().astype(np.uint8)
        a, b = read_picture(picture.numpy()), read_picture(as_bytes)
        assert [getattr(a, name) for name in ATTRIBUTES] == [getattr(b, name) for name in ATTRIBUTES]


WORDS = {
    "size": list(SIZES),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "position": list(POSITIONS),
    "background": list(COLOURS),
}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_word_fails_its_check_and_no_other(attribute: str) -> None:
    specs = sample_specs(60, seed=5)
    for number, (spec, picture) in enumerate(zip(specs, drawn(specs, seed=2), strict=True)):
        taken = {getattr(spec, attribute)}
        if attribute in ("colour", "background"):
            taken = {spec.colour, spec.background}
        others = [word for word in WORDS[attribute] if word not in taken]
        wrong = replace(spec, **{attribute: others[number % len(others)]})
        result = check(read_picture(picture), wrong)
        assert [name for name in ATTRIBUTES if not result[name]] == [attribute]
        assert not result["all"]


@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_picture_shows_only_its_background(colour: str) -> None:
    picture = (torch.tensor(COLOURS[colour]) / 255).expand(PICTURE, PICTURE, 3)
    assert read_picture(picture) == Reading(background=colour)


def test_noise_shows_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        reading = read_picture(torch.rand(PICTURE, PICTURE, 3, generator=generator))
        assert (reading.colour, reading.shape, reading.background) == (None, None, None)


def test_soft_noise_shows_no_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    for cells in (4, 8, 16):
        noise = torch.rand(20, 3, cells, cells, generator=generator)
        for picture in functional.interpolate(noise, size=(PICTURE, PICTURE), mode="bicubic").clamp(0, 1):
            reading = read_picture(picture.permute(1, 2, 0))
            assert reading.shape is None or reading.background is None or reading.colour is None


def test_blurred_blobs_and_ovals_show_no_shape() -> None:
    axis = torch.arange(PICTURE) + 0.5 - PICTURE / 2
    red, blue = (torch.tensor(COLOURS[name]) / 255 for name in ("red", "blue"))
    for radius in (6.0, 9.0, 12.0):
        blob = torch.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * radius**2))[..., None]
        oval = ((axis[:, None] / 0.55) ** 2 + axis[None, :] ** 2 < (1.4 * radius) ** 2).float()[..., None]
        for cover in (blob, oval):
            assert read_picture(cover * red + (1 - cover) * blue).shape is None


@pytest.mark.parametrize("shape", SHAPES)
def test_two_shapes_are_not_one(shape: str) -> None:
    specs = [Spec("small", "red", shape, place, "blue") for place in ("at the left", "at the right")]
    left, right = drawn(specs)
    both = torch.where((torch.arange(PICTURE) < PICTURE / 2)[None, :, None], left, right)
    assert read_picture(both).shape is None


def test_a_shape_cut_off_or_off_the_middle_fails() -> None:
    picture = drawn([SPEC])[0]
    assert check(read_picture(picture), SPEC)["all"]
    cut = picture.clone()
    cut[: PICTURE // 2] = picture[0, 0]
    assert not check(read_picture(cut), SPEC)["all"]
    high = torch.cat([picture[12:], picture[:12]])
    assert not check(read_picture(high), SPEC)["position"]


def test_dirt_fails() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = drawn([SPEC])[0]
    dirty = (picture + 0.15 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)
    assert not check(read_picture(dirty), SPEC)["all"]
    stained = picture.clone()
    stained[4:14, 4:14] = torch.tensor([1.0, 1.0, 0.0])
    assert not check(read_picture(stained), SPEC)["all"]


def test_slight_blur_passes() -> None:
    specs = sample_specs(60, seed=6)
    pictures = drawn(specs).permute(0, 3, 1, 2)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    blurred = functional.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3).permute(0, 2, 3, 1)
    for spec, picture in zip(specs, blurred, strict=True):
        assert check(read_picture(picture), spec)["all"], spec


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="64x64x3"):
        read_picture(np.zeros((32, 32, 3)))


def test_rates_sheet_and_psnr() -> None:
    specs = sample_specs(4, seed=0)
    pictures = drawn(specs).numpy()
    results = [check(read_picture(picture), spec) for picture, spec in zip(pictures, specs, strict=True)]
    results[0] = dict.fromkeys(CHECKS, False)
    assert pass_rates(results).split() == ["75.0"] * len(CHECKS)
    assert contact_sheet(pictures, specs, results, columns=2).size == (2 * 132, 2 * 165)
    assert psnr(pictures, pictures).min() >= 100
    assert psnr(pictures, 1 - pictures).max() < 20
