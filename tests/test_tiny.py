"""The toy checkpoints load in the stock pipelines, and every input they have changes the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input

PROMPT = "a red circle on a white background"
FORMS = ["tiny_dev", "tiny_klein", "tiny_klein_distilled"]
DTYPES = [torch.float32, torch.bfloat16]


def generate(pipeline: Any, *, prompt: str = PROMPT, guidance: float = 4.0, seed: int = 0) -> np.ndarray:
    output = pipeline(
        prompt=prompt,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=guidance,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return output.images[0]


@contextmanager
def counted_calls(module: torch.nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_generates_and_repeats(form: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    pipeline = tiny.load_stock(folder, dtype)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {dtype}
    image = generate(pipeline)
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.05  # a picture, neither flat
    assert ((image > 0) & (image < 1)).mean() > 0.5  # nor saturated
    assert np.array_equal(image, generate(pipeline))
    assert np.array_equal(image, generate(tiny.load_stock(folder, dtype)))
    assert not np.array_equal(image, generate(pipeline, seed=1))
    assert not np.array_equal(image, generate(pipeline, prompt="a blue boat at night"))


@pytest.mark.parametrize(
    ("form", "guidance", "passes"),
    [
        ("tiny_dev", 4.0, 1),
        ("tiny_klein", 4.0, 2),
        ("tiny_klein", 1.0, 1),
        ("tiny_klein_distilled", 4.0, 1),
    ],
)
def test_passes_per_step(form: str, guidance: float, passes: int, request: pytest.FixtureRequest) -> None:
    pipeline = tiny.load_stock(request.getfixturevalue(form))
    with counted_calls(pipeline.transformer) as calls:
        generate(pipeline, guidance=guidance)
    assert len(calls) == 2 * passes


@pytest.mark.parametrize(
    ("form", "matters"), [("tiny_dev", True), ("tiny_klein", True), ("tiny_klein_distilled", False)]
)
def test_guidance_scale_matters(form: str, matters: bool, request: pytest.FixtureRequest) -> None:
    pipeline = tiny.load_stock(request.getfixturevalue(form))
    assert np.array_equal(generate(pipeline, guidance=4.0), generate(pipeline, guidance=2.0)) is not matters


@pytest.mark.parametrize(("form", "layers"), [("tiny_dev", (10, 20, 30)), ("tiny_klein", (9, 18, 27))])
def test_text_states_stay_in_range(form: str, layers: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    pipeline = tiny.load_stock(request.getfixturevalue(form))
    with torch.inference_mode():
        embeds, _ = pipeline.encode_prompt(PROMPT, max_sequence_length=64)
    assert embeds.shape == (1, 64, 3 * tiny.HIDDEN)
    scales = embeds.view(64, 3, tiny.HIDDEN).std(dim=(0, 2))
    assert ((scales > 0.5) & (scales < 5)).all()
    config = pipeline.text_encoder.config
    assert getattr(config, "text_config", config).num_hidden_layers > layers[-1]


def test_every_weight_is_random(tiny_dev: Path, tiny_klein: Path) -> None:
    for folder in (tiny_dev, tiny_klein):
        pipeline = tiny.load_stock(folder)
        for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            flat = [name for name, weight in part.named_parameters() if weight.numel() > 1 and weight.std() == 0]
            assert not flat
        assert pipeline.vae.bn.running_mean.std() > 0.1
        assert pipeline.vae.bn.running_var.std() > 0.1


def test_seeds(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        folder = tiny.write_klein(tmp_path / name, seed=seed)
        return (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()

    assert weights("a", 0) == weights("b", 0)
    assert weights("a", 0) != weights("c", 1)


@pytest.mark.parametrize("form", FORMS)
def test_small(form: str, request: pytest.FixtureRequest) -> None:
    sizes = files(request.getfixturevalue(form))
    assert max(sizes.values()) < 2_000_000
    assert sum(sizes.values()) < 3_300_000


@pytest.mark.parametrize("write", [tiny.write_dev, tiny.write_klein])
def test_saves_in_dtype_and_shards(write: Any, tmp_path: Path, tiny_dev: Path, tiny_klein: Path) -> None:
    folder = write(tmp_path / "sharded", dtype=torch.bfloat16, shard_bytes=300_000)
    assert sum(files(folder).values()) < 1_800_000
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert shards == {path.name for path in (folder / "transformer").glob("*.safetensors")}
    whole = tiny_dev if write is tiny.write_dev else tiny_klein
    image, reference = (generate(tiny.load_stock(path, torch.bfloat16)) for path in (folder, whole))
    assert np.array_equal(image, reference)


def test_encoder_takes_pictures(tiny_dev: Path) -> None:
    """What a PixtralProcessor would hand over for a 64 x 32 picture, made by hand: the class needs torchvision."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dev / "tokenizer")
    processor = json.loads((tiny_dev / "tokenizer" / "processor_config.json").read_text())
    rows, columns = 32 // (tiny.PATCH * tiny.MERGE), 64 // (tiny.PATCH * tiny.MERGE)
    row = processor["image_token"] * columns
    marks = processor["image_break_token"].join([row] * rows) + processor["image_end_token"]
    text = tokenizer.apply_chat_template(format_input([PROMPT])[0], tokenize=False).replace(PROMPT, marks + PROMPT)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    encoder = tiny.load_stock(tiny_dev).text_encoder
    assert (inputs["input_ids"] == encoder.config.image_token_index).sum() == rows * columns
    with torch.inference_mode():
        logits = [
            encoder(**inputs, pixel_values=torch.full((1, 3, 32, 64), shade), image_sizes=[(32, 64)]).logits
            for shade in (0.0, 1.0)
        ]
    assert all(torch.isfinite(one).all() for one in logits)
    assert not torch.equal(*logits)


def test_text_fits_into_64_tokens(tiny_dev: Path, tiny_klein: Path) -> None:
    from transformers import AutoTokenizer

    dev, klein = (AutoTokenizer.from_pretrained(folder / "tokenizer") for folder in (tiny_dev, tiny_klein))
    assert dev.padding_side == "left" and klein.padding_side == "right"
    assert len(dev.apply_chat_template(format_input([PROMPT])[0])["input_ids"]) < 64
    messages = [{"role": "user", "content": PROMPT}]
    text = klein.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<think>\n\n</think>\n\n")
    ids = klein(text)["input_ids"]
    assert len(ids) < 64
    assert klein.decode(ids) == text


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_align_weights(dtype: torch.dtype, tiny_klein: Path) -> None:
    plain = tiny.load_stock(tiny_klein, dtype)
    aligned = tiny.load_stock(tiny_klein, dtype, align=True)
    for name in ("transformer", "vae", "text_encoder"):
        before, after = (getattr(pipeline, name) for pipeline in (plain, aligned))
        for tensor in (*after.parameters(), *after.buffers()):
            assert tensor.data_ptr() % tiny.ALIGNMENT == 0
        expected = before.state_dict()
        state = after.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
    encoder = aligned.text_encoder
    assert encoder.lm_head.weight is encoder.model.embed_tokens.weight
    assert np.array_equal(generate(aligned), generate(aligned))
