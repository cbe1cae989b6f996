"""Folders that SDNQ has quantized and saved: every weight as sdnq decodes it, run, equal to the decoded reference."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # it compiles a function when it is imported
sdnq = pytest.importorskip("sdnq", reason="in the extras sdnq and dev")

from diffusers import Flux2Transformer2DModel  # noqa: E402
from sdnq.dequantizer import dequantize_sdnq_model  # noqa: E402
from test_forms import latents  # noqa: E402
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM  # noqa: E402

from lowmem_flux2.errors import CheckpointBroken, UsageError  # noqa: E402
from lowmem_flux2.planning.sources import resolve_model  # noqa: E402
from lowmem_flux2.runtime.checkpoint import TensorFile  # noqa: E402
from lowmem_flux2.runtime.download import with_weights  # noqa: E402

SVD = {"use_svd": True, "svd_rank": 8}
CASES: dict[str, dict[str, Any]] = {
    "uint4": {"weights_dtype": "uint4"},
    "uint4-svd": {"weights_dtype": "uint4", **SVD},
    "uint4-svd-matmul": {"weights_dtype": "uint4", "use_quantized_matmul": True, **SVD},
    "dynamic": {"weights_dtype": "int5", "use_dynamic_quantization": True, "dynamic_loss_threshold": 1e-3, **SVD},
    "int8": {"weights_dtype": "int8"},
    "int8-transposed": {"weights_dtype": "int8", "use_quantized_matmul": True, **SVD},
    "uint8-transposed": {"weights_dtype": "uint8", "use_quantized_matmul": True},
    "one scale": {"weights_dtype": "int8", "group_size": -2},
    "hadamard": {"weights_dtype": "int6", "use_hadamard": True, "hadamard_group_size": 24},
    "codebook": {"weights_dtype": "uint4", "use_codebook": True, "group_size": 16},
    "int12": {"weights_dtype": "int12"},
    "fp8": {"weights_dtype": "float8_e4m3fn"},
    "float6": {"weights_dtype": "float6_e3m2fn", "group_size": 16},
    "by name": {
        "weights_dtype": "int4",
        "modules_dtype_dict": {"uint3": ["to_k", ".transformer_blocks.1.attn.to_v"], "minimum_6bit": ["ff*linear_in"]},
        "modules_quant_config": {"ff_context": {"use_hadamard": True}},
    },
}


def quantize(part: Path, kind: type[Any], into: Path, decoded: Path, **asked: Any) -> dict[str, torch.Tensor]:
    """Save a component as sdnq quantizes it, and with the values that sdnq decodes; those by their stored names."""
    config = sdnq.SDNQConfig(minimum_allowed_numel=0, minimum_allowed_channel_size=1, **asked)
    model = sdnq.sdnq_post_load_quant(kind.from_pretrained(part), quantization_config=config, torch_dtype=torch.float32)
    model.save_pretrained(into)
    plain = kind.from_pretrained(part)
    plain.load_state_dict(dequantize_sdnq_model(model).state_dict())
    plain.save_pretrained(decoded)
    with TensorFile(decoded) as files:
        made = {}
        for name in files.names():
            made[name] = torch.empty(files.shape(name))
            files.read_into(name, made[name])
    return made


@pytest.mark.parametrize("case", CASES)
def test_decodes_as_sdnq_does(case: str, tmp_path: Path, tiny_klein: Path) -> None:
    expected = quantize(
        tiny_klein / "transformer", Flux2Transformer2DModel, tmp_path / "q", tmp_path / "d", **CASES[case]
    )
    with TensorFile(tmp_path / "q") as files:
        assert set(files.names()) == expected.keys()
        for name, tensor in expected.items():
            found = torch.empty_like(tensor)
            files.read_into(name, found)
            assert torch.equal(found, tensor), name
            if tensor.ndim == 2:
                part = torch.empty(min(70, len(tensor) - 3), tensor.shape[1])
                files.read_rows_from(name, 3, part)
                assert torch.equal(part, tensor[3:][: len(part)]), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path, tiny_dev: Path) -> dict[str, tuple[Path, Path]]:
    """Tiny models quantized by sdnq, and decoded."""
    made = {}
    for form, source, kind in (
        ("klein", tiny_klein, Qwen3ForCausalLM),
        ("dev", tiny_dev, Mistral3ForConditionalGeneration),
    ):
        root = tmp_path_factory.mktemp(form)
        pair = root / "quantized", root / "decoded"
        for folder in pair:
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
            shutil.copytree(source / "vae", folder / "vae", dirs_exist_ok=True)
        for part, kind_of, asked in (
            ("transformer", Flux2Transformer2DModel, CASES["uint4-svd"]),
            ("text_encoder", kind, CASES["dynamic"]),
        ):
            quantize(source / part, kind_of, pair[0] / part, pair[1] / part, **asked)
        made[form] = pair
    return made


@pytest.mark.parametrize("form", ["klein", "dev"])
def test_sdnq_folder(form: str, folders: dict[str, tuple[Path, Path]]) -> None:
    folder, decoded = folders[form]
    assert resolve_model(str(folder)).spec.stored_dtype == "bf16"
    for weight_format in ("fp32", "int8") if form == "klein" else ("fp32",):
        expected = latents(decoded, weight_format, prompt="a red circle")
        assert torch.isfinite(expected).all()
        assert torch.equal(latents(folder, weight_format, prompt="a red circle"), expected)


def test_says_what_to_install(folders: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_flux2.planning.stored.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"is quantized by SDNQ, and sdnq is not installed: .*'lowmem-flux2\[sdnq\]'"):
        with_weights(resolve_model(str(folders["klein"][0])), offline=True)


def test_what_is_not_read_is_told(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["klein"][0], tmp_path / "klein"))
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    own = config.pop("quantization_config")
    for changed, told in (
        ({**own, "scale_dtype": "uint8"}, "scales that are quantized too are not read here"),
        ({**own, "weights_dtype": "uint5"}, r"no uint5 matrix of SDNQ's"),
        ({**own, "weights_dtype": "uint2"}, r"the files hold \d+ weights .*, the config implies"),
        (None, r"of SDNQ's, it seems, whose config\.json is not beside it"),
    ):
        path.write_text(json.dumps({**config, **({"quantization_config": changed} if changed else {})}))
        with pytest.raises(CheckpointBroken, match=told):
            resolve_model(str(folder))
