"""The engine's latents, embeddings and pictures are the stock pipelines' own, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Modulation,
    Flux2PosEmbed,
    Flux2TimestepGuidanceEmbeddings,
)
from PIL import Image
from test_recovery import Failing
from typer.testing import CliRunner

from lowmem_flux2 import Engine
from lowmem_flux2.cli import app
from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.plan import Placement, Plan, StagePlan
from lowmem_flux2.runtime.encode import TextEncoder
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.weights import CheckpointWeights

Stock = Callable[[str, str], Any]
FORMS = ["dev", "klein", "distilled"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "a red circle on a white background"
OTHER = "a dog at night"
SIZE = {"height": 64, "width": 96}  # 4 x 6 tokens
TEXT_TOKENS = 64


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def arguments(**changes: Any) -> dict[str, Any]:
    """One prompt, two steps, latents out; `changes` on top, None to leave one out."""
    base = {
        **SIZE,
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT_TOKENS,
        "output_type": "latent",
    }
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def embeddings(dtype: str, prompts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, TEXT_TOKENS, 3 * tiny.HIDDEN, generator=generator).to(DTYPES[dtype])


def noise(dtype: str, images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(images, 4 * tiny.LATENT_CHANNELS, 4, 6, generator=generator).to(DTYPES[dtype])


def one_batch(engine: Engine, **changes: Any) -> Plan:
    """The engine's plan, which must take all images and prompts at once, as the stock pipelines do."""
    kept = {"prompt", "height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length"}
    asked = {name: value for name, value in arguments(**changes).items() if name in {*kept, "num_images_per_prompt"}}
    request = engine.request(**asked)
    plan = engine.plan(request)
    assert plan.stage("denoise").batch_size == request.num_images
    assert plan.stage("encode").batch_size == len(request.prompts)
    return plan


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "one generator": lambda _: {"generator": seeded(3)[0]},
    "guidance 1": lambda _: {"guidance_scale": 1.0, "generator": seeded(3)[0]},
    "two prompts, a generator each": lambda _: {"prompt": [PROMPT, OTHER], "generator": seeded(5, 1)},
    "two prompts of two images, one generator": lambda _: {
        "prompt": [PROMPT, OTHER],
        "num_images_per_prompt": 2,
        "generator": seeded(3)[0],
    },
    "two images of a prompt, a generator each": lambda _: {"num_images_per_prompt": 2, "generator": seeded(5, 1)},
    "custom sigmas": lambda _: {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": 3, "generator": seeded(3)[0]},
    "given latents": lambda dtype: {"num_images_per_prompt": 2, "latents": noise(dtype, 2)},
    "a list of one prompt": lambda _: {"prompt": [PROMPT], "generator": seeded(3)},
    "less text": lambda _: {"max_sequence_length": 48, "generator": seeded(3)[0]},
    "portrait": lambda _: {"height": 112, "width": 48, "num_inference_steps": 3, "generator": seeded(3)[0]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_latents_equal_the_stock_pipelines(
    form: str, case: str, dtype: str, folders: dict[str, Path], stock: Stock
) -> None:
    engine = Engine(str(folders[form]), dtype=dtype)
    plan = one_batch(engine, **CASES[case](dtype))
    made = engine.generate(**arguments(**CASES[case](dtype)), plan=plan).images
    expected = stock(form, dtype)(**arguments(**CASES[case](dtype))).images
    assert made.dtype == expected.dtype == DTYPES[dtype]
    assert torch.equal(made, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_given_embeddings_equal_the_stock_pipelines(
    form: str, dtype: str, folders: dict[str, Path], stock: Stock
) -> None:
    given = {"prompt_embeds": embeddings(dtype, 2, 0), "num_images_per_prompt": 2}
    if form == "klein":
        given["negative_prompt_embeds"] = embeddings(dtype, 2, 1)
    asked = arguments(prompt=None, **given)
    engine = Engine(str(folders[form]), dtype=dtype, batch_size=4)
    made = engine.generate(**asked, generator=seeded(1, 2, 3, 4))
    assert torch.equal(made.images, stock(form, dtype)(**asked, generator=seeded(1, 2, 3, 4)).images)
    assert [stage.stage for stage in made.report.stages if stage.stage == "encode"] == []


def test_missing_negative_embeddings_are_those_of_the_empty_prompt(folders: dict[str, Path], stock: Stock) -> None:
    asked = arguments(prompt=None, prompt_embeds=embeddings("fp32", 1, 0))
    made = Engine(str(folders["klein"]), dtype="fp32").generate(**asked, generator=seeded(1)[0])
    assert torch.equal(made.images, stock("klein", "fp32")(**asked, generator=seeded(1)[0]).images)


@pytest.mark.parametrize(("tokens", "negative_tokens"), [(48, 64), (64, 48), (48, None)])
def test_embeddings_of_unequal_length_equal_the_stock_pipelines(
    tokens: int, negative_tokens: int | None, folders: dict[str, Path], stock: Stock
) -> None:
    """A negative prompt without embeddings is of ``max_sequence_length``, by default 512, whatever the others are."""
    asked = arguments(prompt=None, prompt_embeds=embeddings("fp32", 1, 0)[:, :tokens], max_sequence_length=None)
    if negative_tokens is not None:
        asked["negative_prompt_embeds"] = embeddings("fp32", 1, 1)[:, :negative_tokens]
    made = Engine(str(folders["klein"]), dtype="fp32").generate(**asked, generator=seeded(1)[0])
    assert torch.equal(made.images, stock("klein", "fp32")(**asked, generator=seeded(1)[0]).images)
    assert made.report.plan.workload.text_tokens == (512 if negative_tokens is None else 64)


def test_negative_prompt_is_what_its_embeddings_say(folders: dict[str, Path], stock: Stock) -> None:
    negative, _ = stock("klein", "fp32").encode_prompt(OTHER, max_sequence_length=TEXT_TOKENS)
    positive, _ = stock("klein", "fp32").encode_prompt(PROMPT, max_sequence_length=TEXT_TOKENS)
    engine = Engine(str(folders["klein"]), dtype="fp32")
    made = engine.generate(**arguments(negative_prompt=OTHER), seed=4)
    asked = arguments(prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert torch.equal(made.images, stock("klein", "fp32")(**asked, generator=seeded(4)).images)


PLACEMENTS = {**{placement.value: (placement,) for placement in Placement}, "mixed": tuple(Placement)}


def placed(stage: StagePlan, name: str) -> StagePlan:
    """The stage with its blocks placed in turn as `PLACEMENTS` says, and two slots."""
    blocks = len(stage.block_placements)
    return replace(stage, block_placements=(PLACEMENTS[name] * blocks)[:blocks], slots=2, prefetch_depth=1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("form", ["dev", "klein"])
def test_every_placement_gives_the_same_latents(
    form: str, placement: str, folders: dict[str, Path], stock: Stock
) -> None:
    asked = arguments(prompt=[PROMPT, OTHER], num_inference_steps=3)
    engine = Engine(str(folders[form]), dtype="fp32")
    plan = one_batch(engine, prompt=[PROMPT, OTHER], num_inference_steps=3)
    plan = replace(plan, stages=tuple(placed(stage, placement) for stage in plan.stages))
    made = engine.generate(**asked, generator=seeded(1, 2), plan=plan)
    assert torch.equal(made.images, stock(form, "fp32")(**asked, generator=seeded(1, 2)).images)


@pytest.mark.parametrize("placement", ["resident", "pinned", "pageable", "disk"])
def test_plans_that_force_a_placement_give_the_same_latents(
    placement: Any, folders: dict[str, Path], stock: Stock
) -> None:
    made = Engine(str(folders["klein"]), dtype="bf16", placement=placement).generate(**arguments(), seed=1)
    assert torch.equal(made.images, stock("klein", "bf16")(**arguments(), generator=seeded(1)).images)


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_batches_of_one_equal_runs_of_one(form: str, folders: dict[str, Path], stock: Stock) -> None:
    engine = Engine(str(folders[form]), dtype="bf16", batch_size=1)
    made = engine.generate(**arguments(num_images_per_prompt=3, seed=20)).images
    assert len(made) == 3
    for index, one in enumerate(made):
        alone = stock(form, "bf16")(**arguments(), generator=seeded(20 + index)).images
        assert torch.equal(one, alone[0])


def test_ragged_last_batch_equals_a_run_of_its_size(folders: dict[str, Path], stock: Stock) -> None:
    made = Engine(str(folders["klein"]), dtype="fp32", batch_size=2).generate(
        **arguments(num_images_per_prompt=3), generator=seeded(1, 2, 3)
    )
    pipeline = stock("klein", "fp32")
    pair = pipeline(**arguments(num_images_per_prompt=2), generator=seeded(1, 2)).images
    last = pipeline(**arguments(), generator=seeded(3)).images
    assert torch.equal(made.images, torch.cat([pair, last]))


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_what_is_the_same_for_all_steps_and_batches_is_computed_once(
    form: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five images of one prompt in batches of two, two and one, three steps, and on klein two guidance passes."""
    calls: Counter[str] = Counter()
    owners = {
        "rope": (Flux2PosEmbed, "forward"),
        "modulation": (Flux2Modulation, "forward"),
        "timestep": (Flux2TimestepGuidanceEmbeddings, "forward"),
    }
    for name, (owner, method) in owners.items():
        before: Any = getattr(owner, method)

        def counted(self: Any, *given: Any, name: str = name, before: Any = before, **named: Any) -> Any:
            calls[name] += 1
            return before(self, *given, **named)

        monkeypatch.setattr(owner, method, counted)
    linear = torch.nn.Linear.forward

    def projected(self: torch.nn.Linear, given: torch.Tensor) -> torch.Tensor:
        calls["text"] += self.in_features == 3 * tiny.HIDDEN
        return linear(self, given)

    monkeypatch.setattr(torch.nn.Linear, "forward", projected)
    engine = Engine(str(folders[form]), dtype="fp32", batch_size=2)
    asked = arguments(num_images_per_prompt=5, num_inference_steps=3, seed=1)
    made = engine.generate(**asked).images
    sizes, passes = 2, 1 if form == "dev" else 2
    assert calls == {"rope": 2, "modulation": 3 * 3 * sizes, "timestep": 3 * sizes, "text": sizes * passes}
    alone = (
        Engine(str(folders[form]), dtype="fp32", batch_size=1)
        .generate(**{**asked, "seed": 5, "num_images_per_prompt": 1})
        .images
    )
    assert torch.equal(made[4:], alone)


# --- callbacks, and what has no effect -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_callback_is_given_the_stock_ones_tensors_and_may_change_latents(
    form: str, folders: dict[str, Path], stock: Stock
) -> None:
    def run(generate: Callable[..., Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen: list[torch.Tensor] = []

        def halve(_: object, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            seen.extend((torch.tensor(step), timestep, tensors["latents"].clone(), tensors["prompt_embeds"].clone()))
            return {**tensors, "latents": tensors["latents"] / 2}

        asked = arguments(callback_on_step_end=halve, prompt=[PROMPT, OTHER], generator=seeded(1, 2))
        wanted = ["latents", "prompt_embeds"]
        return generate(**asked, callback_on_step_end_tensor_inputs=wanted).images, seen

    made, seen = run(Engine(str(folders[form]), dtype="fp32", batch_size=2).generate)
    expected, stock_seen = run(stock(form, "fp32"))
    assert torch.equal(made, expected)
    assert len(seen) == len(stock_seen) == 8
    assert all(torch.equal(one, other) for one, other in zip(seen, stock_seen, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_callback_may_change_the_text(
    form: str, in_place: bool, folders: dict[str, Path], stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all steps that follow, also those after one that runs out of memory; and of its own batch alone."""

    def weaken(_: object, step: int, __: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 1 and in_place:
            tensors["prompt_embeds"].mul_(0.5)
        elif step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.5
        return tensors

    asked = arguments(prompt=PROMPT, num_inference_steps=4, callback_on_step_end=weaken)
    asked |= {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = stock(form, "fp32")(**asked, generator=seeded(1)[0]).images
    engine = Engine(str(folders[form]), dtype="fp32", batch_size=1)
    assert torch.equal(engine.generate(**asked, generator=seeded(1)[0]).images, expected)
    failing = Failing(Forward.predict, 3)
    monkeypatch.setattr(Forward, "predict", failing.patched())
    made = engine.generate(**asked, generator=seeded(1)[0])
    assert torch.equal(made.images, expected) and failing.calls == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_callback_may_interrupt(form: str, folders: dict[str, Path], stock: Stock) -> None:
    steps: list[int] = []

    def stop(run: Any, step: int, _: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(step)
        run._interrupt = step == 1
        return tensors

    asked = arguments(num_inference_steps=4, callback_on_step_end=stop)
    made = Engine(str(folders[form]), dtype="fp32", placement="disk").generate(**asked, generator=seeded(1)[0]).images
    assert torch.equal(made, stock(form, "fp32")(**asked, generator=seeded(1)[0]).images)
    assert steps == [0, 1] * 2


def test_an_interruption_ends_the_batch_under_way_alone(folders: dict[str, Path]) -> None:
    steps: list[int] = []

    def stop(run: Any, step: int, *_: object) -> None:
        steps.append(step)
        run.interrupt = len(steps) == 1

    engine = Engine(str(folders["klein"]), dtype="fp32", batch_size=1)
    made = engine.generate(**arguments(num_images_per_prompt=2, callback_on_step_end=stop), seed=1).images
    assert steps == [0, 0, 1]
    assert torch.equal(made[1:], engine.generate(**arguments(), seed=2).images)


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_arguments_at_the_value_that_they_have_anyway_change_nothing(
    form: str, folders: dict[str, Path], stock: Stock
) -> None:
    layers = (10, 20, 30) if form == "dev" else (9, 18, 27)
    asked = arguments(attention_kwargs={"scale": 1.0}, text_encoder_out_layers=layers, return_dict=True)
    made = Engine(str(folders[form]), dtype="fp32").generate(**asked, generator=seeded(1)[0]).images
    assert torch.equal(made, stock(form, "fp32")(**asked, generator=seeded(1)[0]).images)


@pytest.mark.parametrize("layers", [(3, 1, 2), (0, 5, 5), (10, -1, 20)])
@pytest.mark.parametrize("form", ["dev", "klein"])
def test_other_layers_of_the_text_encoder_equal_the_stock_ones(
    form: str, layers: tuple[int, ...], folders: dict[str, Path], stock: Stock
) -> None:
    """In any order, the embedding, one twice, and the last: which transformers norms. -1 stands for it here."""
    last = tiny.MISTRAL_LAYERS if form == "dev" else tiny.QWEN_LAYERS
    wanted = tuple(last if layer == -1 else layer for layer in layers)
    asked = arguments(text_encoder_out_layers=wanted, return_dict=False)
    (made,) = Engine(str(folders[form]), dtype="fp32").generate(**asked, generator=seeded(1)[0])
    (expected,) = stock(form, "fp32")(**asked, generator=seeded(1)[0])
    assert torch.equal(made, expected)


def test_other_layers_run_quantized_and_are_cached_apart(tiny_klein: Path, tmp_path: Path) -> None:
    """The cut store has too few layers, so the whole encoder is prepared; the prompt cache tells them apart."""
    engine = Engine(str(tiny_klein), text_weight_format="int8", cache_dir=tmp_path)
    asked = arguments(seed=1)
    plain = engine.generate(**asked).images
    other = engine.generate(**asked, text_encoder_out_layers=(1, 2, tiny.QWEN_LAYERS)).images
    assert not torch.equal(plain, other)
    assert torch.equal(other, engine.generate(**asked, text_encoder_out_layers=(1, 2, tiny.QWEN_LAYERS)).images)
    assert torch.equal(plain, engine.generate(**asked).images)


def test_other_layers_on_the_command_line(tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["-W", "96", "-H", "64", "--steps", "2", "--guidance", "4", "--max-sequence-length", "64", "--dtype", "fp32"]
    command = ["generate", "-q", "-m", str(tiny_klein), "-p", PROMPT, "-s", "1", *size, "-o", "x.png"]
    layers = ["--text-encoder-out-layers", "3,1,2"]
    ran = CliRunner().invoke(app, [*command, *layers, "--save-latents", "l"])
    assert ran.exit_code == 0, ran.output
    decoded = CliRunner().invoke(app, ["generate", "-q", "--from-latents", "l", "-o", "y.png"])
    assert decoded.exit_code == 0, decoded.output
    asked = arguments(text_encoder_out_layers=(3, 1, 2), output_type="pil", seed=1)
    (made,) = Engine(str(tiny_klein), dtype="fp32").generate(**asked).images
    for name in ("x.png", "y.png"):
        picture = Image.open(name)
        assert np.array_equal(np.asarray(picture), np.asarray(made))
        assert picture.text["text_encoder_out_layers"] == "3,1,2"
    refused = CliRunner().invoke(app, [*command, "--text-encoder-out-layers", "3,x"])
    assert "numbers with commas between them" in str(refused.exception)


def test_the_scale_of_attention_kwargs_is_that_of_all_loras(tiny_klein: Path, tmp_path: Path) -> None:
    engine = Engine(str(tiny_klein))
    keys = loras.diffusers_keys(loras.factors(engine.source.spec.transformer))
    file = loras.write(tmp_path / "a.safetensors", keys)
    asked = arguments(seed=1)
    half = engine.generate(**asked, loras=[(file, 0.8)], attention_kwargs={"scale": 0.5}).images
    assert torch.equal(half, engine.generate(**asked, loras=[(file, 0.4)]).images)
    assert not torch.equal(half, engine.generate(**asked, loras=[(file, 0.8)]).images)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ({"attention_kwargs": {"scale": 0.5}}, "'scale' multiplies the scales of LoRAs, and there is none"),
        ({"attention_kwargs": {"scale": None}}, "scale None is no finite number"),
        ({"attention_kwargs": {"attention_mask": torch.ones(1)}}, "attention_mask: FLUX.2 was trained without one"),
        ({"attention_kwargs": {"ip_adapter_masks": []}}, "ip_adapter_masks: FLUX.2's attention has no such option"),
        ({"text_encoder_out_layers": (9, 18)}, r"takes 3 hidden states side by side"),
        ({"text_encoder_out_layers": (9, 18, 99)}, r"has the states 0 \(the token embedding\) to 29"),
        ({"text_encoder_out_layers": (0, 0, 0)}, r"one layer at least must run"),
        (
            {"callback_on_step_end": lambda *_: None, "callback_on_step_end_tensor_inputs": ["noise_pred"]},
            "callback_on_step_end_tensor_inputs: noise_pred: none of latents, prompt_embeds",
        ),
    ],
)
def test_what_is_refused_says_why(refused: dict[str, Any], said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=said):
        Engine(str(folders["klein"])).generate(**arguments(**refused), seed=1)


# --- pictures -------------------------------------------------------------------------------------------------------


def pictures_one_by_one(pipeline: Any, latents: torch.Tensor, output_type: str) -> Any:
    """The stock VAE's pictures of the stock latents, decoded one image a call, as the engine decodes."""
    if latents.ndim == 3:  # dev returns them packed
        ids = pipeline._prepare_latent_ids(torch.empty(len(latents), 1, SIZE["height"] // 16, SIZE["width"] // 16))
        norm = pipeline.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(latents.dtype)
        deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps)
        unpacked = pipeline._unpack_latents_with_ids(latents, ids) * deviation.to(latents.dtype) + mean
        latents = pipeline._unpatchify_latents(unpacked)
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae.decode(one, return_dict=False)[0] for one in latents.split(1)])
    return pipeline.image_processor.postprocess(decoded, output_type=output_type)


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
@pytest.mark.parametrize("form", FORMS)
def test_pictures_equal_the_stock_ones(form: str, output_type: str, folders: dict[str, Path], stock: Stock) -> None:
    made = Engine(str(folders[form]), dtype="fp32").generate(
        **arguments(num_images_per_prompt=2, output_type=output_type), generator=seeded(1, 2)
    )
    pipeline = stock(form, "fp32")
    latents = pipeline(**arguments(num_images_per_prompt=2), generator=seeded(1, 2)).images
    expected = pictures_one_by_one(pipeline, latents, output_type)
    assert len(made.images) == len(expected) == 2
    assert type(made.images) is type(expected)
    for one, other in zip(made.images, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert np.asarray(made.images[0]).std() > 0


@pytest.mark.parametrize("form", FORMS)
def test_one_bf16_picture_equals_a_stock_run(form: str, folders: dict[str, Path], stock: Stock) -> None:
    asked = arguments(output_type="np")
    made = Engine(str(folders[form]), dtype="bf16").generate(**asked, generator=seeded(1)[0]).images
    assert np.array_equal(made, stock(form, "bf16")(**asked, generator=seeded(1)[0]).images)


# --- embeddings -----------------------------------------------------------------------------------------------------


def cut_embeddings(
    folder: Path,
    dtype: str,
    groups: list[list[str]],
    placement: str = "gpu",
    warn: Callable[[str], object] = pytest.fail,
) -> list[torch.Tensor]:
    engine = Engine(str(folder), dtype=dtype)
    request = engine.request(groups[0], **SIZE, num_inference_steps=1, max_sequence_length=TEXT_TOKENS)
    stage = placed(engine.plan(request).stage("encode"), placement)
    encoder = TextEncoder(folder, engine.source.spec, stage, torch.device("cpu"), warn, CheckpointWeights(folder))
    try:
        return encoder.encode(groups, TEXT_TOKENS)
    finally:
        encoder.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", ["gpu", "mixed"])
@pytest.mark.parametrize("form", ["dev", "klein"])
def test_embeddings_of_the_cut_encoder_are_those_of_the_whole(
    form: str, placement: str, dtype: str, folders: dict[str, Path], stock: Stock
) -> None:
    groups = [[PROMPT, OTHER], [""]]
    made = cut_embeddings(folders[form], dtype, groups, placement)
    for prompts, embeds in zip(groups, made, strict=True):
        with torch.no_grad():
            expected, _ = stock(form, dtype).encode_prompt(prompts, max_sequence_length=TEXT_TOKENS)
        assert embeds.dtype == expected.dtype
        assert torch.equal(embeds, expected)


@pytest.mark.parametrize(("form", "layers"), [("dev", 30), ("klein", 27)])
def test_an_encoder_that_ends_at_the_last_tap_hands_out_the_normed_state(
    form: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "MISTRAL_LAYERS" if form == "dev" else "QWEN_LAYERS", layers)
    folder = (tiny.write_dev if form == "dev" else tiny.write_klein)(tmp_path / form)
    pipeline = tiny.load_stock(folder, align=True)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([PROMPT, OTHER], max_sequence_length=TEXT_TOKENS)
    (made,) = cut_embeddings(folder, "fp32", [[PROMPT, OTHER]])
    assert torch.equal(made, expected)
    norm = pipeline.text_encoder.model
    norm = (norm.language_model if form == "dev" else norm).norm
    width = tiny.HIDDEN
    assert not torch.equal(norm(made[..., :width]), made[..., :width])  # the norm does change a state


def test_a_long_prompt_is_cut_to_the_text_length_with_a_warning(folders: dict[str, Path], stock: Stock) -> None:
    long = " ".join([PROMPT] * 20)
    for form in ("dev", "klein"):
        warnings: list[str] = []
        (made,) = cut_embeddings(folders[form], "fp32", [[long]], warn=warnings.append)
        assert len(warnings) == 1
        assert f"cut to {TEXT_TOKENS} text tokens" in warnings[0]
        with torch.no_grad():
            expected, _ = stock(form, "fp32").encode_prompt(long, max_sequence_length=TEXT_TOKENS)
        assert torch.equal(made, expected)
