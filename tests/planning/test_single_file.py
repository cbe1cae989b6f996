"""Single files as MODEL: recognised by their headers, with the right parts beside them, before anything is loaded."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sparse import Shapes, bfl_shapes, write
from typer.testing import CliRunner

from lowmem_flux2.cli import app
from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing, DoesNotFit, UsageError
from lowmem_flux2.planning.configs import OWN_CONFIG_FILE
from lowmem_flux2.planning.sources import resolve_model, shipped_configs

ALIASES = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def full_size(name: str) -> Shapes:
    return bfl_shapes(resolve_model(name, offline=True).spec.transformer)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ALIASES)
def test_a_released_model_needs_nothing_else(name: str, prefix: str, tmp_path: Path) -> None:
    file = write(tmp_path / "whatever.safetensors", full_size(name), prefix=prefix)
    found, released = resolve_model(str(file), offline=True), resolve_model(name, offline=True)
    assert (found.spec.transformer, found.spec.text_encoder) == (released.spec.transformer, released.spec.text_encoder)
    assert (found.spec.form, found.spec.is_distilled) == (released.spec.form, released.spec.is_distilled)
    assert found.folder is None
    assert found.single is not None
    assert {(part.repo_id, part.part) for part in found.single.missing} == {
        (released.repo_id, "text_encoder"),
        (released.repo_id, "vae"),
    }
    assert found.spec.name == "whatever"


def test_a_base_model_is_told_by_its_text_encoder(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", full_size("flux2-klein-4b"))
    assert not resolve_model(str(file), text_encoder="flux2-klein-base-4b", offline=True).spec.is_distilled
    wide = write(tmp_path / "y.safetensors", full_size("flux2-klein-9b"))
    assert resolve_model(str(wide), text_encoder="flux2-klein-9b-kv", offline=True).spec.caches_references


def test_what_would_fit_names_the_file_and_its_parts(tmp_path: Path) -> None:
    """Without its text encoder a base model would be planned as the distilled one."""
    file = write(tmp_path / "my model.safetensors", full_size("flux2-klein-4b"))
    typed = ["plan", "-m", str(file), "--text-encoder", "flux2-klein-base-4b", "--profile", "rtx-3060-12gb"]
    refused = CliRunner().invoke(app, [*typed, "--max-ram", "900MiB", "--offline"])
    assert isinstance(refused.exception, DoesNotFit)
    command = shlex.split(refused.exception.closest[0], comments=True)
    assert command[3] == str(file)
    done = CliRunner().invoke(app, [*command[1:], "--json", "--offline"])
    assert json.loads(done.stdout)["workload"]["guidance_passes"] == 2


def test_the_encoder_of_another_size_is_refused_by_width(tmp_path: Path) -> None:
    file = write(tmp_path / "nine.safetensors", full_size("flux2-klein-9b"))
    with pytest.raises(CheckpointBroken) as caught:
        resolve_model(str(file), text_encoder="flux2-klein-4b", offline=True)
    for told in (str(file), "--text-encoder flux2-klein-4b", "klein-4B's Qwen3-4B encoder", "klein-9B's", "12288"):
        assert told in str(caught.value)
    with pytest.raises(CheckpointBroken, match="the text encoder is 'mistral3', a klein pipeline needs 'qwen3'"):
        resolve_model(str(file), text_encoder="flux2-dev", offline=True)


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    file = write(tmp_path / "nine.safetensors", full_size("flux2-klein-9b"))
    code = (
        "import sys; from lowmem_flux2.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules and 'gguf' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "plan", "-m", str(file), "--profile", "rtx-3060-12gb", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "nine" in done.stdout


def test_a_folder_of_links_is_made_once(tmp_path: Path, cache: Path, tiny_klein: Path) -> None:
    spec = resolve_model(str(tiny_klein)).spec.transformer
    file = write(tmp_path / "my file.safetensors", bfl_shapes(spec))
    found = resolve_model(str(file), text_encoder=str(tiny_klein))
    assert found.folder is not None
    assert found.folder.parent == cache / "assembled"
    assert found.spec.source == f"{file} --text-encoder {tiny_klein}"
    assert (found.folder / "vae").resolve() == tiny_klein / "vae"
    assert [path for path in found.folder.rglob("*") if path.is_file() and path.suffix == ".safetensors"] == [
        found.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    ]
    assert resolve_model(str(file), text_encoder=str(tiny_klein), vae=str(tiny_klein)).folder == found.folder
    assert resolve_model(str(found.folder)).spec.transformer == spec
    elsewhere = resolve_model(str(file), text_encoder=str(tiny_klein), cache=tmp_path / "own").folder
    assert elsewhere is not None
    assert elsewhere.is_relative_to(tmp_path / "own")
    assert len(list((cache / "assembled").iterdir())) == 1


def test_parts_from_folders_of_their_own(tmp_path: Path, tiny_klein: Path) -> None:
    file = write(tmp_path / "x.safetensors", bfl_shapes(resolve_model(str(tiny_klein)).spec.transformer))
    encoder = shutil.copytree(tiny_klein / "text_encoder", tmp_path / "encoder")
    for path in (tiny_klein / "tokenizer").iterdir():
        if path.name != "config.json":
            shutil.copy(path, encoder)
    found = resolve_model(str(file), text_encoder=str(encoder), vae=str(tiny_klein / "vae"))
    assert found.folder is not None
    assert (found.folder / "tokenizer").resolve() == encoder
    assert found.spec.is_distilled
    (encoder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointMissing, match=r"tokenizer_config\.json is missing"):
        resolve_model(str(file), text_encoder=str(encoder), vae=str(tiny_klein / "vae"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, tiny_klein: Path) -> None:
    file = write(tmp_path / "x.safetensors", bfl_shapes(resolve_model(str(tiny_klein)).spec.transformer))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot be written: .* --cache-dir"):
        resolve_model(str(file), text_encoder=str(tiny_klein), cache=tmp_path / "cache")


FOUND: dict[str, tuple[Shapes, str, str]] = {
    "FLUX.1": (
        {"img_in.weight": (64, 32), "double_blocks.0.img_mod.lin.weight": (384, 64)},
        "BF16",
        r"'double_blocks\.0\.img_mod\.lin\.weight' is none of FLUX\.2's \(a FLUX\.1 model, it seems\)",
    ),
    "a LoRA": ({"transformer.x_embedder.lora_A.weight": (4, 32)}, "BF16", "is a LoRA, not a model"),
    "a text encoder": ({"model.layers.0.mlp.up_proj.weight": (4, 4)}, "BF16", "is a text encoder: .*--text-encoder"),
    "a VAE": ({"decoder.up.0.block.0.conv1.weight": (4, 4, 3, 3)}, "BF16", "is a VAE: .*--vae"),
    "something else": ({"unet.weight": (4, 4)}, "BF16", "holds no FLUX.2 transformer: .* it has unet.weight"),
    "nothing": ({}, "BF16", "it has nothing"),
    "fp8 without scales": (
        {"img_in.weight": (64, 32)},
        "F8_E4M3",
        "'img_in.weight' is stored as F8_E4M3 without a scale .*'img_in.weight_scale'.*'img_in.scale_weight'",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_says_what_was_found(case: str, tmp_path: Path) -> None:
    shapes, dtype, told = FOUND[case]
    with pytest.raises(CheckpointBroken, match=told):
        resolve_model(str(write(tmp_path / "x.safetensors", shapes, dtype)), offline=True)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        (
            "double_blocks.1.img_attn.proj.weight",
            None,
            r"lacks the tensor 'transformer_blocks\.1\.attn\.to_out\.0\.weight'",
        ),
        (
            "single_blocks.2.linear2.weight",
            (256, 64),
            r"blocks\.2\.attn\.to_out\.weight' has shape \[256, 64\], in other",
        ),
    ],
)
def test_a_block_unlike_the_others(
    name: str, shape: tuple[int, ...] | None, told: str, tmp_path: Path, tiny_klein: Path
) -> None:
    shapes = bfl_shapes(resolve_model(str(tiny_klein)).spec.transformer)
    assert shape is None or sorted(shape) == sorted(shapes[name])
    changed = {**shapes, name: shape} if shape else {key: value for key, value in shapes.items() if key != name}
    with pytest.raises(CheckpointBroken, match=told):
        resolve_model(str(write(tmp_path / "x.safetensors", changed)), text_encoder=str(tiny_klein))


def test_parts_that_are_missing_or_out_of_place(tmp_path: Path, tiny_klein: Path) -> None:
    file = str(write(tmp_path / "x.safetensors", bfl_shapes(resolve_model(str(tiny_klein)).spec.transformer)))
    with pytest.raises(UsageError, match=r"2 double-stream and 3 single-stream .* give both --text-encoder and --vae"):
        resolve_model(file)
    with pytest.raises(UsageError, match="go with a model that is a single file; flux2-dev has its own"):
        resolve_model("flux2-dev", vae=str(tiny_klein))
    with pytest.raises(CheckpointBroken, match=r"x\.safetensors holds no VAE: .*; it has context_embedder"):
        resolve_model(file, text_encoder=str(tiny_klein), vae=file)
    with pytest.raises(CheckpointMissing, match="--vae nothing: there is no such folder or file, and it is neither"):
        resolve_model(file, text_encoder=str(tiny_klein), vae="nothing")
    with pytest.raises(CheckpointMissing, match=r"--vae a/b\.gguf: there is no such folder or file"):
        resolve_model(file, text_encoder=str(tiny_klein), vae="a/b.gguf")  # not asked of the hub
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointMissing, match=r"neither a vae/config\.json nor a config\.json"):
        resolve_model(file, text_encoder=str(tiny_klein), vae=str(tmp_path / "empty"))
    half = shutil.copytree(tiny_klein, tmp_path / "half")
    next((half / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointMissing, match=r"vae has no \.safetensors weights"):
        resolve_model(file, text_encoder=str(half))


def test_the_embedded_model_has_parts_too(tmp_path: Path) -> None:
    spec = resolve_model("shapes").spec
    file = write(tmp_path / "x.safetensors", bfl_shapes(spec.transformer))
    found = resolve_model(str(file), text_encoder="shapes")
    assert (found.spec.defaults, found.spec.is_distilled) == (spec.defaults, spec.is_distilled)
    assert found.folder is not None
    assert (found.folder / OWN_CONFIG_FILE).is_file()


def test_shapes_of_the_shipped_configs_are_told_apart() -> None:
    keys = ("num_layers", "num_single_layers", "num_attention_heads")
    assert len({tuple(shipped_configs(name)["transformer"][key] for key in keys) for name in ALIASES}) == len(ALIASES)
