"""The shipped `shapes` checkpoint: complete, small, in bf16, and its pictures show what its prompts say."""

import json
import warnings

import pytest
import torch
from assemble import LIMIT_MB, folder_megabytes
from draw import PICTURE, SPECS, sample_specs
from safetensors import safe_open
from score import MODEL, check, pictures_of_stock, read_picture
from train import TEXT_LENGTH, prompt_length
from transformers import AutoTokenizer

WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def test_defaults_of_use() -> None:
    defaults = json.loads((MODEL / "lowmem_flux2.json").read_text())
    assert set(defaults) == {
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "max_sequence_length",
        "is_distilled",
    }
    assert (defaults["height"], defaults["width"]) == (PICTURE, PICTURE)
    assert defaults["num_inference_steps"] <= 20
    assert defaults["max_sequence_length"] == TEXT_LENGTH
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "Flux2KleinPipeline"
    assert index["is_distilled"] is defaults["is_distilled"] is False


def test_it_is_small_and_has_a_card() -> None:
    assert folder_megabytes(MODEL) <= LIMIT_MB
    assert "Apache-2.0" in (MODEL / "README.md").read_text()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_bf16_and_finite(name: str) -> None:
    with safe_open(MODEL / name, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (the file is no mapping)
            value = weights.get_tensor(key)
            if value.is_floating_point():
                assert value.dtype == torch.bfloat16, key
                assert value.isfinite().all(), key


def test_every_prompt_fits_the_text_length() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    assert max(prompt_length(tokenizer, spec.prompt) for spec in SPECS) <= TEXT_LENGTH


def test_pictures_of_the_stock_pipeline_pass() -> None:
    specs = sample_specs(20, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = pictures_of_stock(MODEL, specs, seed=1, steps=None, guidance=None)
    passed = [check(read_picture(p), spec)["all"] for p, spec in zip(pictures, specs, strict=True)]
    assert sum(passed) >= 18
