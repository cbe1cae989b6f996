"""What the engine refuses, records and reports."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from lowmem_flux2 import Engine, Generation
from lowmem_flux2.errors import CheckpointBroken, PlanMismatch, UsageError
from lowmem_flux2.planning.plan import Plan, Stage

ASKED: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
PROMPT = "a red circle"
WIDTH = 3 * tiny.HIDDEN
CHANNELS = 4 * tiny.LATENT_CHANNELS


@pytest.fixture(scope="module")
def engine(tiny_klein: Path) -> Engine:
    return Engine(str(tiny_klein), dtype="fp32")


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded before the arguments were checked")

    for name in ("TextEncoder", "Denoiser", "Decoder"):
        monkeypatch.setattr(f"lowmem_flux2.runtime.executor.{name}", loaded)


# --- arguments ------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "either prompt or prompt_embeds"),
    "prompt twice": ({"prompt": PROMPT, "prompt_embeds": torch.zeros(1, 64, WIDTH)}, "either prompt or prompt_embeds"),
    "empty prompt": ({"prompt": ["a dog", " "]}, "prompt is empty"),
    "no prompts": ({"prompt": []}, "prompt is empty"),
    "two sources of noise": ({"prompt": PROMPT, "seed": 1, "generator": torch.Generator()}, "either seed or generator"),
    "seed and latents": (
        {"prompt": PROMPT, "seed": 1, "latents": torch.zeros(1, CHANNELS, 4, 4)},
        "either seed or latents",
    ),
    "negative seed": ({"prompt": PROMPT, "seed": -1}, "the seed must be 0 to"),
    "seed too large": ({"prompt": PROMPT, "seed": 2**63 - 1}, "the seed must be 0 to"),
    "too few generators": (
        {"prompt": PROMPT, "num_images_per_prompt": 2, "generator": [torch.Generator()]},
        "1 generators for 2 images",
    ),
    "output type": ({"prompt": PROMPT, "output_type": "jpeg"}, "output_type 'jpeg': one of pil, np, pt, latent"),
    "latents of one image": (
        {"prompt": PROMPT, "num_images_per_prompt": 2, "latents": torch.zeros(1, CHANNELS, 4, 4)},
        r"latents have the shape \(1, 32, 4, 4\), this request needs \(2, 32, 4, 4\)",
    ),
    "latents turned": (
        {"prompt": PROMPT, "width": 96, "latents": torch.zeros(1, CHANNELS, 6, 4)},
        r"needs \(1, 32, 4, 6\)",
    ),
    "embeddings without batch": ({"prompt_embeds": torch.zeros(64, WIDTH)}, "prompt_embeds have the shape"),
    "embeddings too narrow": (
        {"prompt_embeds": torch.zeros(1, 64, WIDTH - 1)},
        r"prompt_embeds have the shape \(1, 64, 95\), this request needs \(1, tokens, 96\)",
    ),
    "negative embeddings of another batch": (
        {"prompt_embeds": torch.zeros(2, 64, WIDTH), "negative_prompt_embeds": torch.zeros(1, 64, WIDTH)},
        "negative_prompt_embeds have the shape",
    ),
    "sigmas and steps": ({"prompt": PROMPT, "sigmas": [1.0, 0.5, 0.1]}, "3 sigmas for 2 steps"),
    "no steps": ({"prompt": PROMPT, "num_inference_steps": 0}, "steps must be 1 to"),
    "too small": ({"prompt": PROMPT, "width": 8}, "width 8 px"),
    "guidance": ({"prompt": PROMPT, "guidance_scale": float("nan")}, "guidance must be"),
    "useless negative prompt": (
        {"prompt": PROMPT, "negative_prompt": "a cat", "guidance_scale": 1.0},
        "a negative prompt has no effect",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_wrong_arguments_before_loading(case: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    arguments, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        engine.generate(**{**ASKED, **arguments})


def test_refuses_a_plan_of_another_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    plan = engine.plan(engine.request(PROMPT, **ASKED, guidance_scale=1.0))
    with pytest.raises(PlanMismatch, match="guidance_passes: plan 1, here 2"):
        engine.generate(PROMPT, **ASKED, guidance_scale=4.0, plan=plan)


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_refuses_a_device_that_is_not_there(device: str, tiny_klein: Path) -> None:
    with pytest.raises(UsageError, match=device):
        Engine(str(tiny_klein), device=device).generate(PROMPT, **ASKED)


def test_rounds_sizes_down_with_a_warning(engine: Engine) -> None:
    with pytest.warns(UserWarning, match="width 79 is not a multiple of 16: using 64"):
        made = engine.generate(PROMPT, **{**ASKED, "width": 79}, seed=1, output_type="pt")
    assert made.images.shape == (1, 3, 64, 64)
    assert torch.equal(made.images, engine.generate(PROMPT, **ASKED, seed=1, output_type="pt").images)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_image_i_uses_seed_plus_i_and_says_so(engine: Engine) -> None:
    made = engine.generate([PROMPT, "a dog"], **ASKED, num_images_per_prompt=2, seed=40, output_type="latent")
    assert made.seeds == (40, 41, 42, 43)
    assert [(image.seed, image.prompt) for image in made.report.images] == [
        (40, PROMPT),
        (41, PROMPT),
        (42, "a dog"),
        (43, "a dog"),
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in made.seeds if seed is not None]
    again = engine.generate(
        [PROMPT, "a dog"], **ASKED, num_images_per_prompt=2, generator=generators, output_type="latent"
    )
    assert torch.equal(made.images, again.images)
    assert again.seeds == (None,) * 4


def test_a_drawn_seed_repeats_the_picture(engine: Engine) -> None:
    one, other = (engine.generate(PROMPT, **ASKED, output_type="np") for _ in range(2))
    assert one.seeds != other.seeds
    assert not np.array_equal(one.images, other.images)
    assert one.seeds[0] is not None
    assert np.array_equal(one.images, engine.generate(PROMPT, **ASKED, seed=one.seeds[0], output_type="np").images)


def test_given_latents_have_no_seed(engine: Engine) -> None:
    made = engine.generate(PROMPT, **ASKED, latents=torch.randn(1, CHANNELS, 4, 4), output_type="latent")
    assert made.seeds == (None,)


# --- callback -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_the_callback_sees_and_may_change_latents_as_in_the_stock_pipelines(
    form: str, folders: dict[str, Path], stock: Callable[[str, str], Any]
) -> None:
    def run(generate: Callable[..., Any]) -> tuple[torch.Tensor, list[tuple[int, float, torch.Tensor]]]:
        calls: list[tuple[int, float, torch.Tensor]] = []

        def halve(_: object, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            calls.append((step, float(timestep), tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

        asked = {**ASKED, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
        made = generate(prompt=PROMPT, **asked, generator=torch.Generator().manual_seed(1), callback_on_step_end=halve)
        return made.images, calls

    made, calls = run(Engine(str(folders[form]), dtype="fp32").generate)
    expected, stock_calls = run(stock(form, "fp32"))
    assert torch.equal(made, expected)
    assert [call[:2] for call in calls] == [call[:2] for call in stock_calls]
    assert all(torch.equal(call[2], other[2]) for call, other in zip(calls, stock_calls, strict=True))


def test_a_callback_may_return_nothing(engine: Engine) -> None:
    steps: list[int] = []
    made = engine.generate(
        PROMPT, **ASKED, seed=1, output_type="latent", callback_on_step_end=lambda _, step, *__: steps.append(step)
    )
    assert steps == [0, 1]
    assert torch.equal(made.images, engine.generate(PROMPT, **ASKED, seed=1, output_type="latent").images)


def test_a_callback_may_change_latents_only(engine: Engine) -> None:
    for changed, message in (
        ({"prompt_embeds": torch.zeros(1)}, r"prompt_embeds of the shape \(1,\), not \(1, 64, 96\)"),
        ({"noise_pred": torch.zeros(1)}, "only latents and prompt_embeds, not noise_pred"),
    ):
        with pytest.raises(UsageError, match=message):
            engine.generate(PROMPT, **ASKED, seed=1, callback_on_step_end=lambda *_, changed=changed: changed)


# --- report ---------------------------------------------------------------------------------------------------------


def test_the_report_has_the_contract_keys(engine: Engine) -> None:
    made = engine.generate(PROMPT, **ASKED, num_images_per_prompt=2, seed=3)
    assert isinstance(made, Generation)
    assert [type(image) for image in made.images] == [Image.Image] * 2
    report = json.loads(json.dumps(made.report.to_json()))
    keys = {"plan", "measured", "events", "cached_prompts", "images", "references", "versions", "machine", "model"}
    assert set(report) == keys
    measured = report["measured"]
    assert set(measured) == {"peak_vram_bytes", "peak_ram_bytes", "peak_rss_bytes", "time_s", "stages"}
    assert [stage["stage"] for stage in measured["stages"]] == ["encode", "denoise", "decode"]
    for stage in measured["stages"]:
        assert stage["peak_vram_bytes"] == 0
        assert 0 < stage["peak_ram_bytes"] <= stage["peak_rss_bytes"]
        assert 0 < stage["load_s"] < stage["time_s"]
    for key in ("peak_ram_bytes", "peak_rss_bytes"):
        assert measured[key] == max(stage[key] for stage in measured["stages"])
    assert measured["time_s"] == pytest.approx(sum(stage["time_s"] for stage in measured["stages"]))
    assert report["events"] == []
    assert report["images"] == [
        {"path": None, "seed": 3, "prompt": PROMPT},
        {"path": None, "seed": 4, "prompt": PROMPT},
    ]
    assert {"lowmem_flux2", "python", "torch", "diffusers", "transformers"} <= set(report["versions"])
    assert set(report["plan"]) >= {"schema_version", "profile", "model", "workload", "stages", "predicted"}
    assert Plan.from_json(report["plan"], "report").digest == made.report.plan.digest


class Recorder:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def stage_started(self, stage: Stage, total: int) -> None:
        self.log.append((stage, total))

    def advanced(self) -> None:
        name, left = self.log[-1]
        self.log[-1] = (name, left - 1)

    def stage_finished(self, stage: Stage) -> None:
        assert self.log[-1] == (stage, 0), "the announced total was not reached"

    def event(self, text: str) -> None:
        pytest.fail(text)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_observer_hears_every_layer_step_and_image(batch_size: int, tiny_klein: Path) -> None:
    recorder = Recorder()
    engine = Engine(str(tiny_klein), dtype="fp32", batch_size=batch_size, observer=recorder)
    engine.generate([PROMPT] * 3, **ASKED, guidance_scale=4.0, seed=0)
    assert recorder.log == [("encode", 0), ("denoise", 0), ("decode", 0)]


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("placement", ["resident", "disk"])
def test_a_component_cut_after_planning_is_reported_and_nothing_is_left_open(
    placement: Any, component: str, tiny_klein: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_klein, folder)
    engine = Engine(str(folder), dtype="fp32", placement=placement)
    path = next((folder / component).glob("*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointBroken, match="truncated"):
        engine.generate(PROMPT, **ASKED)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("block-reader")]


def test_a_missing_tensor_is_named_and_nothing_is_left_open(tiny_klein: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_klein, folder)
    engine = Engine(str(folder), dtype="fp32")
    path = next((folder / "text_encoder").glob("*.safetensors"))
    weights = {name: value.clone() for name, value in load_file(path).items()}
    del weights["model.layers.26.mlp.up_proj.weight"]
    save_file(weights, path)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointBroken, match=r"lack the tensor 'model.layers.26.mlp.up_proj.weight'"):
        engine.generate(PROMPT, **ASKED)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_an_interrupt_in_a_step_gives_everything_back(tiny_klein: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    engine = Engine(str(tiny_klein), dtype="fp32", placement="disk")
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, **ASKED, callback_on_step_end=interrupt)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("block-reader")]
    assert engine.generate(PROMPT, **ASKED, seed=1).seeds == (1,)
