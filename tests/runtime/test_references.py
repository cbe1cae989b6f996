"""Reference images: the engine's latents are the stock pipelines', whatever file the picture comes in."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageCms

from lowmem_flux2 import Engine
from lowmem_flux2.errors import Interrupted, NonFiniteLatents, RunError, UsageError
from lowmem_flux2.planning.references import picture_size, reduced, reference_of, references_of
from lowmem_flux2.runtime.inputs import Inputs, check_inputs
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.reference_encoder import ReferenceEncoder, normalised
from lowmem_flux2.runtime.reference_images import as_rgb, load_references, open_picture, pictures_of, prepared

Stock = Callable[[str, str], Any]
Array = npt.NDArray[np.generic]
FORMS = ["dev", "klein", "distilled"]
ASKED: dict[str, Any] = {
    "prompt": "a red circle on a white background",
    "height": 64,
    "width": 96,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
    "output_type": "latent",
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: resizing and convolutions have something to see."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------------------------ as the stock ones

IMAGES: dict[str, Any] = {
    "one": picture(80, 64),
    "one with a ragged edge": picture(101, 75, 1),
    "several of different sizes": [picture(96, 64), picture(64, 112, 1), picture(65, 64, 2)],
}


@pytest.mark.parametrize(("images", "dtype"), [(images, "fp32") for images in IMAGES] + [("one", "bf16")])
@pytest.mark.parametrize("form", FORMS)
def test_latents_equal_the_stock_pipelines(
    form: str, images: str, dtype: str, folders: dict[str, Path], stock: Stock
) -> None:
    made = Engine(str(folders[form]), dtype=dtype).generate(image=IMAGES[images], **ASKED, generator=seeded(3)[0])
    expected = stock(form, dtype)(image=IMAGES[images], **ASKED, generator=seeded(3)[0]).images
    assert torch.equal(made.images, expected)
    assert [stage.stage for stage in made.report.stages][:3] == ["encode", "reference", "denoise"]


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_all_images_of_a_batch_share_the_references_and_the_size_is_the_first_ones(
    form: str, folders: dict[str, Path], stock: Stock
) -> None:
    asked = {**ASKED, "image": IMAGES["several of different sizes"], "num_images_per_prompt": 2}
    del asked["height"], asked["width"]
    made = Engine(str(folders[form]), dtype="fp32", batch_size=2).generate(**asked, generator=seeded(1, 2))
    assert made.report.plan.workload.reference_tokens == 6 * 4 + 4 * 7 + 4 * 4
    expected = stock(form, "fp32")(**asked, generator=seeded(1, 2)).images
    assert torch.equal(made.images, expected)


def test_a_picture_of_more_than_a_megapixel_is_reduced_as_the_stock_processor_does(stock: Stock) -> None:
    large = picture(1500, 1100)
    pipeline = stock("dev", "fp32")
    reference = reference_of("a", *large.size, 16)
    stock_made = pipeline.image_processor._resize_to_target_area(large, 1024 * 1024)
    size = {side: getattr(stock_made, side) // 16 * 16 for side in ("width", "height")}
    assert (reference.width, reference.height) == tuple(size.values())
    expected = pipeline.image_processor.preprocess(stock_made, **size, resize_mode="crop")
    made = normalised(prepared(large, reference))
    assert torch.equal(made, expected)
    assert made.stride() == expected.stride()  # which kernel convolves depends on it


def test_every_value_of_eight_bits_is_normalised_as_the_stock_processor_does(stock: Stock) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = stock("dev", "fp32").image_processor.preprocess(Image.fromarray(values))
    assert torch.equal(normalised(torch.from_numpy(values)), expected)


def test_streamed_and_cut_short_of_memory_it_is_the_same_to_the_bit(
    tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**ASKED, "image": IMAGES["several of different sizes"], "seed": 4}
    whole = Engine(str(tiny_klein), dtype="fp32").generate(**asked)
    streamed = Engine(str(tiny_klein), dtype="fp32", placement="disk").generate(**asked)
    assert torch.equal(streamed.images, whole.images)
    encode, calls = ReferenceEncoder.encode, []

    def fails_at_the_second(self: ReferenceEncoder, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return encode(self, *arguments)

    monkeypatch.setattr(ReferenceEncoder, "encode", fails_at_the_second)
    with pytest.raises(RunError, match=r"reference: out of RAM.*--image-size"):
        Engine(str(tiny_klein), dtype="fp32").generate(**asked)  # so small that no tile needs less


def test_it_goes_on_in_tiles_where_memory_runs_out(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**ASKED, "image": [picture(384, 384), picture(256, 256, 1)], "seed": 4}
    encode, tiles = ReferenceEncoder.encode, []

    def fails_untiled(self: ReferenceEncoder, *arguments: Any) -> torch.Tensor:
        tiles.append(self._vae.tile_sample_min_size if self._vae.use_tiling else 0)
        if not tiles[-1]:
            raise MemoryError
        return encode(self, *arguments)

    monkeypatch.setattr(ReferenceEncoder, "encode", fails_untiled)
    made = Engine(str(tiny_klein), dtype="fp32").generate(**asked)
    assert tiles[0] == 0 and len(tiles) == 3 and tiles[1] == tiles[2] > 0
    assert made.report.plan.stage("reference").tile_px == tiles[1]
    assert any("going on with tiles of" in event for event in made.report.events)
    fixed = Engine(str(tiny_klein), dtype="fp32", vae_tile=tiles[1]).generate(**asked)
    assert torch.equal(fixed.images, made.images)


def test_an_interrupted_run_goes_on_with_its_references(tiny_klein: Path, tmp_path: Path) -> None:
    engine, interruption = Engine(str(tiny_klein), dtype="fp32"), Interruption()
    asked = {**ASKED, "image": IMAGES["one"], "seed": 4}
    with pytest.raises(Interrupted) as stopped:
        engine.generate(**asked, interruption=interruption, callback_on_step_end=lambda *_: interruption.ask())
    file = stopped.value.run.save(tmp_path / "a.interrupted.safetensors")
    again = engine.generate(from_latents=file, output_type="latent")
    assert [stage.stage for stage in again.report.stages] == ["denoise", "decode"]
    assert torch.equal(again.images, engine.generate(**asked).images)


def test_latents_of_an_edit_are_saved_and_decoded_like_any_other(tiny_dev: Path, tmp_path: Path) -> None:
    engine = Engine(str(tiny_dev), dtype="fp32")
    asked = {**ASKED, "image": IMAGES["one"], "seed": 4, "output_type": "np"}
    made = engine.generate(**asked, save_latents=tmp_path / "a.safetensors")
    assert np.array_equal(engine.generate(from_latents=made.latents_file, output_type="np").images, made.images)
    digest = hashlib.sha256(np.asarray(IMAGES["one"]).tobytes()).hexdigest()[:12]
    assert made.report.to_json()["references"] == [
        {"name": "reference image 1", "width": 80, "height": 64, "bound_px": 1024, "digest": digest}
    ]


def test_latents_that_are_not_finite_name_the_reference(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(picture: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3, *picture.shape[:2]), torch.nan)

    monkeypatch.setattr("lowmem_flux2.runtime.reference_encoder.normalised", broken)
    with pytest.raises(NonFiniteLatents, match="latents of reference image 1"):
        Engine(str(tiny_klein), dtype="fp32").generate(**ASKED, image=IMAGES["one"], seed=1)


# ---------------------------------------------------------------------------------------------------- what is given


def test_arrays_tensors_and_batches_are_taken_like_pictures() -> None:
    eight = np.array(picture(80, 64))
    floats = eight.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).movedim(-1, 0)
    given: list[object] = [
        eight, floats, tensor, tensor.unsqueeze(0), eight[None], [eight], torch.from_numpy(eight).movedim(-1, 0),
    ]  # fmt: skip
    for one in given:
        ((_, made),) = pictures_of(one)
        assert np.array_equal(np.asarray(made), eight)
    assert len(pictures_of([tensor.expand(2, -1, -1, -1), picture(64, 64), floats])) == 4
    (_, grey) = pictures_of(floats[..., :1])[0]
    assert np.array_equal(np.asarray(grey), eight[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((64, 64, 3), np.float32) - 1, r"must be in \[0, 1\]"),
        (np.full((64, 64, 3), np.nan), r"must be in \[0, 1\]"),
        (torch.zeros(1, 32, 8, 8), "latents are not taken"),
        (np.zeros((64, 64, 3), np.int32), "is of int32"),
        (b"png", "is a bytes"),
        ([picture(64, 64)] * 11, "11 reference images: at most 10"),
        ([], "no reference image"),
        (picture(640, 64), "too long for a reference"),
        (picture(640, 60), "too small for a reference"),
        ("nowhere.png", "there is no such reference image"),
        (Image.new("F", (64, 64)), "floating-point values"),
        (Image.fromarray(np.full((64, 64), 70000, np.int32)), "values from 70000"),
    ],
)
def test_what_is_no_reference_is_refused_before_anything_is_loaded(tiny_klein: Path, image: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Engine(str(tiny_klein), dtype="fp32").generate(**ASKED, image=image, seed=1)


def test_other_pictures_than_those_planned_are_refused(tiny_klein: Path) -> None:
    engine = Engine(str(tiny_klein), dtype="fp32")
    with pytest.raises(UsageError, match="image_size bounds reference images"):
        engine.generate(**ASKED, image_size=512)
    with pytest.raises(UsageError, match="has changed since the plan was made"):
        prepared(picture(64, 64), reference_of("a.png", 80, 64, 16))
    made = engine.generate(**ASKED, image=picture(400, 400), image_size=128, seed=1)
    assert made.report.plan.workload.references == ((128, 128),)


# ---------------------------------------------------------------------------------------------------------- files


def values(seen: Image.Image) -> Array:
    assert seen.mode == "RGB"
    return np.asarray(seen).astype(np.int64)


def saved(path: Path, given: Image.Image, **options: Any) -> Path:
    given.save(path, **options)
    width, height = picture_size(path)
    assert open_picture(path).size == (width, height)  # what is planned is what is run
    return path


def test_a_photo_is_turned_as_its_exif_orientation_says(tmp_path: Path) -> None:
    upright = picture(96, 64)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        back = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(back[orientation]) if orientation > 1 else upright
        path = saved(tmp_path / f"{orientation}.png", stored, exif=exif)
        assert np.array_equal(values(open_picture(path)), values(upright))


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    whole = picture(96, 64)
    alpha = Image.new("L", whole.size, 255)
    alpha.paste(0, (0, 0, 48, 64))
    alpha.paste(128, (48, 0, 60, 64))
    clear = whole.copy()
    clear.putalpha(alpha)
    made = values(open_picture(saved(tmp_path / "a.png", clear)))
    assert (made[:, :48] == 255).all()
    assert np.array_equal(made[:, 60:], values(whole)[:, 60:])
    half = (values(whole)[:, 48:60] * 128 + 255 * 127) / 255
    assert np.abs(made[:, 48:60] - half).max() <= 1
    grey = clear.convert("LA")
    assert (values(open_picture(saved(tmp_path / "b.png", grey)))[:, :48] == 255).all()


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    indexed = picture(96, 64).quantize(16)
    expected = values(indexed.convert("RGB"))
    assert np.array_equal(values(open_picture(saved(tmp_path / "a.png", indexed))), expected)
    made = values(open_picture(saved(tmp_path / "b.png", indexed, transparency=3)))
    clear = np.asarray(indexed) == 3
    assert clear.any() and (made[clear] == 255).all()
    assert np.array_equal(made[~clear], expected[~clear])


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [picture(96, 64, seed).quantize(64) for seed in range(3)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.abs(values(open_picture(path)) - values(frames[0].convert("RGB"))).max() == 0
    movie = [frame.convert("RGB") for frame in frames]
    path = saved(tmp_path / "a.png", movie[0], save_all=True, append_images=movie[1:])
    assert np.array_equal(values(open_picture(path)), values(movie[0]))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 96 * 64).astype(np.uint16).reshape(64, 96)
    expected = np.round(ramp / 257).astype(np.int64)[..., None].repeat(3, axis=2)
    for name in ("a.png", "a.tiff"):
        assert np.array_equal(values(open_picture(saved(tmp_path / name, Image.fromarray(ramp)))), expected)
    wide = Image.fromarray(ramp.astype(np.int32))
    assert np.array_equal(values(as_rgb(wide, "wide")), expected)


def test_cmyk_with_and_without_a_profile(tmp_path: Path) -> None:
    printed = picture(96, 64).convert("CMYK")
    made = values(open_picture(saved(tmp_path / "a.jpg", printed, quality=100)))
    assert np.abs(made - values(printed.convert("RGB"))).max() <= 12
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of the wrong kind: counts as none
    again = values(open_picture(saved(tmp_path / "b.tiff", printed, icc_profile=profile)))
    assert np.array_equal(again, values(printed.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV"])
def test_other_modes_are_converted(mode: str) -> None:
    assert as_rgb(picture(64, 64).convert(mode), "a").mode == "RGB"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    picture(256, 256).save(file, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(UsageError, match=r"a\.png: cannot read the reference image"):
        picture_size(path)
    with pytest.raises(UsageError, match=r"a\.png: cannot read the reference image"):
        open_picture(path)


def test_a_picture_that_cannot_be_read_any_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    with Image.open(path) as closed:
        pass
    path.write_bytes(path.read_bytes()[:500])
    with Image.open(path) as truncated:
        for unread in (closed, truncated):
            with pytest.raises(UsageError, match="reference image 1: cannot read it"):
                pictures_of(unread)


def test_a_file_that_is_another_one_by_now_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", picture(96, 64))
    (planned,) = references_of([str(path)], 16)
    assert np.array_equal(load_references([planned])[0].numpy(), values(picture(96, 64)))
    saved(path, picture(96, 64, 1))
    with pytest.raises(UsageError, match="has changed since the plan was made"):
        load_references([planned])


def test_sizes_are_those_of_the_request(tiny_klein: Path) -> None:
    engine = Engine(str(tiny_klein), dtype="fp32")
    references = (reference_of("a", 300, 200, 16),)
    plan = engine.plan(engine.request("x", references=references, num_inference_steps=1))
    assert plan.workload.references == (reduced(300, 200, 16),) == ((288, 192),)
    request = engine.request("x", references=(replace(references[0], width=256),), num_inference_steps=1)
    with pytest.raises(UsageError, match="other shapes"):
        check_inputs(engine.source.spec, request, Inputs(references=(torch.zeros(192, 288, 3, dtype=torch.uint8),)))
