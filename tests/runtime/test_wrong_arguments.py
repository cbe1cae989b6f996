"""What ``Engine.generate`` refuses before anything is loaded: values of a kind that it cannot take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowmem_flux2 import Engine
from lowmem_flux2.errors import UsageError
from lowmem_flux2.runtime.executor import Executor

NAN = float("nan")
ASKED: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}


def embeds(value: float = 0.0, *, tokens: int = 64) -> torch.Tensor:
    return torch.full((1, tokens, 3 * tiny.HIDDEN), value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 3}, "prompt: give text or a list of texts, not 3"),
    ({"prompt": ["a", 1]}, "a prompt must be text, not 1"),
    ({"negative_prompt": ["a"]}, "a prompt must be text"),
    ({"height": 64.0}, "height must be a whole number, not 64.0"),
    ({"num_inference_steps": 1.5}, "steps must be a whole number"),
    ({"num_images_per_prompt": 1.0}, "number of images must be a whole number"),
    ({"max_sequence_length": "64"}, "max-sequence-length must be a whole number"),
    ({"guidance_scale": "4"}, "guidance must be a number, not '4'"),
    ({"caption_upsample_temperature": "x"}, "the temperature must be a number"),
    ({"seed": 1.5}, "the seed must be a whole number"),
    ({"generator": 3}, "3 is no torch.Generator; a number goes into seed"),
    ({"sigmas": [1.0, NAN]}, "sigmas: there is NaN"),
    ({"sigmas": 1.0}, "sigmas: give a list of numbers"),
    ({"latents": torch.zeros(1, 32, 4, 4).numpy()}, "latents: give a tensor, not a ndarray"),
    ({"latents": torch.full((1, 32, 4, 4), NAN)}, "latents: there is NaN"),
    ({"prompt": None, "prompt_embeds": [embeds()]}, "prompt_embeds: give a tensor, not a list"),
    ({"prompt": None, "prompt_embeds": embeds(NAN)}, "prompt_embeds: there is NaN"),
    ({"prompt": None, "prompt_embeds": embeds().long()}, "prompt_embeds are of torch.int64"),
    ({"prompt": None, "prompt_embeds": embeds(tokens=65)}, "max_sequence_length 64: the embeddings have 65 tokens"),
    ({"negative_prompt_embeds": embeds(tokens=65)}, "have 65 tokens, the request has 64: give that many"),
    ({"attention_kwargs": [1]}, "attention_kwargs: give a dict"),
    ({"text_encoder_out_layers": 9}, "text_encoder_out_layers: give a list of numbers"),
    ({"text_encoder_out_layers": (9, 18, 20.5)}, "text_encoder_out_layers must be a whole number"),
    ({"callback_on_step_end": 3}, "callback_on_step_end: 3 cannot be called"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "give a list of names"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise: none of latents, prompt_embeds"),
    ({"loras": [("a.safetensors", "b")]}, "the scale must be a number"),
    ({"image": torch.zeros(3, 64, 64), "image_size": 100.5}, "the image size must be a whole number"),
    ({"plan": "plan.json"}, "plan: a str, not a Plan"),
]


def test_values_of_another_kind_are_refused(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "run", lambda *_: pytest.fail("it has begun"))
    engine = Engine(str(tiny_klein), dtype="fp32")
    for changed, said in WRONG:
        with pytest.raises(UsageError) as refused:
            engine.generate(**{**ASKED, "prompt": "a dog", "guidance_scale": 4.0, **changed})
        assert said in str(refused.value), changed


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1], "gave a list: a dict of tensors, or None"),
        ({"latents": torch.zeros(1, 3, 32)}, r"gave latents of the shape \(1, 3, 32\), not \(1, 16, 32\)"),
        ({"latents": None}, "gave latents that are a NoneType"),
    ],
)
def test_what_a_callback_may_not_return(returned: Any, said: str, tiny_klein: Path) -> None:
    with pytest.raises(UsageError, match=said):
        Engine(str(tiny_klein)).generate("a dog", **ASKED, callback_on_step_end=lambda *_: returned)


def test_latents_of_another_dtype_go_on_in_the_runs_own(tiny_dev: Path) -> None:
    def run(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        asked = {**ASKED, "output_type": "latent", "seed": 1}
        engine = Engine(str(tiny_dev), dtype="fp32")
        made = engine.generate("a dog", **asked, callback_on_step_end=lambda *_: {"latents": change(_[3]["latents"])})
        found: torch.Tensor = made.images
        return found

    rounded = run(torch.Tensor.bfloat16)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, run(lambda latents: latents.bfloat16().float()))


@pytest.mark.parametrize("form", ["distilled", "klein"])
def test_guidance_that_has_no_effect_is_said_once(form: str, folders: dict[str, Path]) -> None:
    engine = Engine(str(folders[form]), dtype="fp32", batch_size=1)
    asked = {**ASKED, "output_type": "latent", "num_images_per_prompt": 2}
    events = engine.generate("a dog", **asked, guidance_scale=4.0).report.events
    assert len([event for event in events if "guidance 4 has no effect" in event]) == (form == "distilled")
    assert not engine.generate("a dog", **asked).report.events


def test_what_no_engine_can_be_made_of(tiny_klein: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": None}, "model: give a name"),
        ({"model": ""}, "model: give a name"),
        ({"revision": "main"}, "not on the hub"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"max_ram": 0}, "max_ram must be above 0 bytes"),
        ({"max_ram": 1.5e9}, "max_ram must be a whole number"),
        ({"prompt_cache": -1}, "prompt_cache: -1 bytes"),
        ({"loras": [3]}, "loras: give files"),
    ]
    for changed, said in wrong:
        with pytest.raises(UsageError, match=said):
            Engine(**{"model": str(tiny_klein), **changed})
