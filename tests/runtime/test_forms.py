"""Every form of checkpoint: made in its exact layout, recognised by content, run, equal to its decoded reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import single_files as forms
import tiny
import torch
from diffusers.quantizers.bfl.utils import dequantize_fp8r, quantize_fp8r
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from lowmem_flux2 import Engine
from lowmem_flux2.cli import app
from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.formats import GGUF_SCRATCH_BYTES
from lowmem_flux2.planning.gguf_header import BLOCKS, read_gguf_header
from lowmem_flux2.planning.job import plan_job, resolve_machine
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.selection import Selection, StreamFrom
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.workload import make_request
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import transformer_blocks, transformer_on_meta
from lowmem_flux2.runtime.packed import packed_sources
from lowmem_flux2.runtime.quantize import gguf_values

ASKED: dict[str, Any] = {
    **{"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0, "output_type": "latent"},
    "prompt_embeds": torch.randn(1, 64, 3 * tiny.HIDDEN, generator=torch.Generator().manual_seed(0)),
}


def latents(
    model: Path,
    weight_format: str,
    *,
    parts: Path | None = None,
    prompt: str | None = None,
    placement: StreamFrom = "auto",
) -> torch.Tensor:
    """What a model makes of a prompt, or of embeddings; of a single file with the text encoder and VAE of ``parts``."""
    given = {} if parts is None else {"text_encoder": str(parts), "vae": str(parts)}
    engine = Engine(
        str(model),
        dtype="fp32",
        weight_format=weight_format,
        text_weight_format="fp32",
        placement=placement,
        **given,
    )
    asked = ASKED if prompt is None else {**ASKED, "prompt_embeds": None, "prompt": prompt, "max_sequence_length": 64}
    made: torch.Tensor = engine.generate(**asked).images
    return made


def check(file: Path, parts: Path, reference: Path, formats: tuple[str, ...] = ("fp32", "int8")) -> None:
    """The file's pictures are those of its decoded reference, unquantized and prepared."""
    for weight_format in formats:
        expected = latents(reference, weight_format)
        assert torch.isfinite(expected).all()
        assert torch.equal(latents(file, weight_format, parts=parts), expected)


# --- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[forms.State], forms.State]] = {
    "bfl": forms.bfl_state,
    "comfyui": lambda state: forms.prefixed(forms.bfl_state(state)),
    "diffusers": lambda state: state,
}


@pytest.mark.parametrize("model", ["tiny_dev", "tiny_klein"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    state = {name: tensor.bfloat16() for name, tensor in forms.transformer_state(folder).items()}
    save_file(LAYOUTS[layout](state), tmp_path / "any-name.safetensors")
    reference = forms.with_transformer(tmp_path / "reference", folder, state)
    source = resolve_model(str(tmp_path / "any-name.safetensors"), text_encoder=str(folder), vae=str(folder))
    assert source.spec.stored_dtype == "bf16"
    assert source.spec.transformer == resolve_model(str(folder)).spec.transformer
    check(tmp_path / "any-name.safetensors", folder, reference, ("fp32", "int8") if layout == "bfl" else ("fp32",))


@pytest.mark.parametrize("guidance", [False, True])
def test_rows_are_those_of_diffusers_converter(guidance: bool, tmp_path: Path) -> None:
    """Each stored tensor holds its own number and its rows' numbers, so that every row is known again."""
    state = tiny.make_transformer(guidance_embeds=guidance).state_dict()
    bfl = {
        name: (1000 * number + torch.arange(len(tensor))).float().view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor)
        for number, (name, tensor) in enumerate(forms.bfl_state(state).items())
    }
    save_file({name: tensor.contiguous() for name, tensor in bfl.items()}, tmp_path / "model.safetensors")
    expected = forms.diffusers_state(bfl)
    with TensorFile(tmp_path) as files:
        assert set(files.names()) == set(expected)
        for name, tensor in expected.items():
            found = torch.empty_like(tensor)
            files.read_into(name, found)
            assert torch.equal(found, tensor), name
            if tensor.ndim == 2:
                part = torch.empty(3, tensor.shape[1])
                files.read_rows_from(name, len(tensor) // 2 - 1, part)  # across the swapped halves of norm_out
                assert torch.equal(part, tensor[len(tensor) // 2 - 1 :][:3]), name


# --- fp8 ------------------------------------------------------------------------------------------------------------

FP8: dict[str, dict[str, Any]] = {
    "rows": {"by_row": True, "ending": ".weight_scale", "beside": ".input_scale"},
    "tensor": {"by_row": False, "ending": ".weight_scale", "beside": ".input_scale"},
    "comfyui": {"by_row": False, "ending": ".scale_weight", "beside": ".scale_input"},
}


@pytest.mark.parametrize("case", FP8)
def test_fp8(case: str, tmp_path: Path, tiny_klein: Path) -> None:
    bfl = forms.bfl_state(forms.transformer_state(tiny_klein))
    stored, decoded = forms.fp8_state(bfl, **FP8[case])
    if case == "comfyui":
        stored = forms.prefixed({**stored, "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)})
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "x.safetensors")
    reference = forms.with_transformer(tmp_path / "reference", tiny_klein, forms.diffusers_state(decoded))
    check(tmp_path / "x.safetensors", tiny_klein, reference, ("fp32", "int8") if case == "rows" else ("fp32",))


def test_fp8_rows_decode_as_in_diffusers() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    stored, decoded = forms.fp8_state({"double_blocks.0.x.weight": weight}, **FP8["rows"])
    quantized, scale = quantize_fp8r(weight)
    assert torch.equal(stored["double_blocks.0.x.weight_scale"], scale)
    assert torch.equal(decoded["double_blocks.0.x.weight"], dequantize_fp8r(quantized, scale))


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path) -> Path:
    return forms.write_wide(tmp_path_factory.mktemp("wide") / "klein", tiny_klein)


@pytest.mark.parametrize("kind", [*BLOCKS, "F16", "BF16", "F32"])
def test_gguf(kind: str, tmp_path: Path, wide: Path) -> None:
    bfl = forms.bfl_state(forms.transformer_state(wide))
    prefix = forms.COMFY_PREFIX if kind == "Q8_0" else ""
    decoded = forms.write_gguf(tmp_path / "x", bfl, kind, prefix=prefix)
    reference = forms.with_transformer(tmp_path / "reference", wide, forms.diffusers_state(decoded))
    assert resolve_model(str(tmp_path / "x"), text_encoder=str(wide)).spec.transformer.num_single == 2
    check(tmp_path / "x", wide, reference, ("fp32", "int8") if kind == "Q4_K" else ("fp32",))


@pytest.mark.parametrize("kinds", [("Q8_0",), ("Q4_0",), ("Q4_K", "Q6_K", "F16", "Q5_K")], ids=" ".join)
def test_gguf_streamed_as_it_is(kinds: tuple[str, ...], tmp_path: Path, wide: Path) -> None:
    """The file's own blocks rest and are streamed; each byte is planned, and no place changes a pixel."""
    bfl = forms.bfl_state(forms.transformer_state(wide))
    decoded = forms.write_gguf(tmp_path / "x", bfl, *kinds)
    reference = forms.with_transformer(tmp_path / "reference", wide, forms.diffusers_state(decoded))
    expected = latents(reference, "fp32")
    for placement in ("resident", "disk"):
        assert torch.equal(latents(tmp_path / "x", "gguf", parts=wide, placement=placement), expected)
    source = resolve_model(str(tmp_path / "x"), text_encoder=str(wide))
    assert source.folder is not None
    stage = StagePlan.bare("denoise", "gguf", "fp32")
    blocks = transformer_blocks(transformer_on_meta(source.folder / "transformer"))
    with TensorFile(source.folder / "transformer") as files:
        made = packed_sources(blocks, files, torch.float32)
    assert [each.layout.total_bytes for each in made] == block_sizes(stage, source.spec)


def test_the_plan_takes_a_gguf_files_own_blocks(wide: Path) -> None:
    """Nothing is as faithful in so few bytes, nothing needs preparing; other models and text encoders have none."""
    source = resolve_model("flux2-dev", offline=True)
    dims = source.spec.transformer
    q4_k = tuple(tuple(rows * columns // 256 * 144 for rows, columns in block.linears) for block in dims.blocks)
    spec = replace(source.spec, transformer=replace(dims, packed=q4_k))
    machine = resolve_machine("rtx-3060-12gb", "auto")
    plan = plan_job(replace(source, spec=spec), machine, make_request(spec, ("x",)), Selection())
    assert plan.stage("denoise").weight_format == "gguf"
    assert not [made for made in plan.preparations if made.component == "transformer"]
    for model, fixed in ((wide, {"weight_format": "gguf"}), (wide, {"text_weight_format": "gguf"})):
        with pytest.raises(UsageError, match=r"weight format gguf: the .* is not a GGUF file"):
            engine = Engine(str(model), dtype="fp32", **fixed)
            engine.plan(engine.request("x", height=64, width=64))


def test_expanding_gguf_blocks_takes_no_more_than_is_planned() -> None:
    weights = 1 << 16
    for kind, (block, size) in BLOCKS.items():
        blocks = torch.zeros(weights // block, size, dtype=torch.uint8)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            gguf_values(kind, blocks, torch.float32)
        live = peak = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        assert weights < peak <= GGUF_SCRATCH_BYTES * weights, kind


def test_gguf_headers_are_those_that_gguf_py_reads(tmp_path: Path, wide: Path) -> None:
    forms.write_gguf(tmp_path / "x", forms.bfl_state(forms.transformer_state(wide)), "Q4_K", "Q8_0", "F32")
    header, reader = read_gguf_header(tmp_path / "x"), gguf.GGUFReader(tmp_path / "x")
    assert header.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (header.data_begin + info.begin, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_gguf_files_that_are_not_read_say_what_they_are(tmp_path: Path, wide: Path) -> None:
    bfl = forms.bfl_state(forms.transformer_state(wide))
    forms.write_gguf(tmp_path / "gemma3", bfl, "Q8_0", architecture="gemma3")
    with pytest.raises(CheckpointBroken, match=r"its GGUF architecture is 'gemma3'; read here are .*\(qwen3, llama"):
        resolve_model(str(tmp_path / "gemma3"))
    forms.write_gguf(tmp_path / "cut", bfl, "Q8_0")
    whole = (tmp_path / "cut").read_bytes()
    for length, told in ((len(whole) - 1, "is truncated: its header describes"), (100, "header goes beyond its end")):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CheckpointBroken, match=told):
            resolve_model(str(tmp_path / "cut"))
    writer = gguf.GGUFWriter(tmp_path / "iq", "flux")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    writer.add_tensor("img_in.weight", np.zeros((4, 18), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointBroken, match=r"'img_in.weight' of shape \[4, 32\] is stored as IQ4_NL, which is not"):
        resolve_model(str(tmp_path / "iq"))


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_bitsandbytes_folder(kind: str, nested: bool, tmp_path: Path, tiny_klein: Path) -> None:
    folder, reference = forms.write_bnb(tmp_path, tiny_klein, kind, nested=nested)
    assert resolve_model(str(folder)).spec.stored_dtype == "bf16"
    for weight_format in ("fp32", "int8") if nested else ("fp32",):
        expected = latents(reference, weight_format, prompt="a red circle")
        assert torch.equal(latents(folder, weight_format, prompt="a red circle"), expected)


def test_bitsandbytes_nf4_is_never_quantized_again(tmp_path: Path, tiny_klein: Path) -> None:
    """Prepared in nf4, the stored bytes are taken over: the decoded checkpoint's values, to the last bit."""
    folder, reference = forms.write_bnb(tmp_path, tiny_klein, "nf4", nested=True)
    assert torch.equal(latents(folder, "nf4"), latents(reference, "fp32"))
    assert not torch.equal(latents(reference, "nf4"), latents(reference, "fp32"))


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_takes_a_single_file(
    tmp_path: Path, cache: Path, tiny_klein: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``prepare``, ``plan --json`` and ``generate --plan`` of an fp8 file."""
    stored, _ = forms.fp8_state(forms.bfl_state(forms.transformer_state(tiny_klein)), **FP8["rows"])
    file = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file)
    model = ["-m", str(file), "--text-encoder", str(tiny_klein), "--dtype", "fp32"]
    request = ["-W", "64", "-H", "64", "--steps", "1", "--guidance", "1", "--max-sequence-length", "64"]
    run = partial(app, standalone_mode=False)
    run(["prepare", *model, "--weight-format", "int8", "--component", "transformer"])
    assert [entry.name[:16] for entry in (cache / "prepared").glob("*/")] == ["transformer-int8"]
    capsys.readouterr()
    run(["plan", *model, *request, "--weight-format", "int8", "--json"])
    plan = tmp_path / "plan.json"
    plan.write_text(capsys.readouterr().out)
    asked = ["-p", "a red circle", "-s", "1", "--plan", str(plan), "-o", str(tmp_path / "out.png"), "--no-prepare"]
    run(["generate", *model[:4], *request, *asked])
    assert (tmp_path / "out.png").is_file()
