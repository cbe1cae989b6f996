"""Counts against the real modules on torch's meta device, and specs built from config files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing
from lowmem_flux2.planning.configs import read_configs, spec_from_configs
from lowmem_flux2.planning.models import BlockSpec, ModelSpec, TextEncoderSpec, TransformerSpec
from lowmem_flux2.planning.sources import ASSETS, shipped_configs
from lowmem_flux2.planning.vae_spec import VaeSpec

FULL_SIZE = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")


def spec_of(name: str) -> ModelSpec:
    return spec_from_configs(name, name, shipped_configs(name))


def weights(module: nn.Module | None) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def assert_block(module: nn.Module, block: BlockSpec) -> None:
    linears = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    assert sorted(block.linears) == sorted(tuple(weight.shape) for weight in linears)
    others = [p.numel() for p in module.parameters() if not any(p is weight for weight in linears)]
    assert sorted(block.others) == sorted(others)
    assert block.linear_weights == sum(weight.numel() for weight in linears)
    assert block.other_weights == sum(others)
    assert block.total_weights == weights(module)


def meta_transformer(config: Mapping[str, Any]) -> Flux2Transformer2DModel:
    with torch.device("meta"):
        return Flux2Transformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")})


def assert_transformer(spec: TransformerSpec, real: Flux2Transformer2DModel) -> None:
    assert spec.total_weights == weights(real)
    assert len(spec.blocks) == len(real.transformer_blocks) + len(real.single_transformer_blocks)
    for block, module in zip(spec.blocks, (*real.transformer_blocks, *real.single_transformer_blocks), strict=True):
        assert_block(module, block)
    once = (
        real.time_guidance_embed,
        real.double_stream_modulation_img,
        real.double_stream_modulation_txt,
        real.single_stream_modulation,
        real.context_embedder,
    )
    assert spec.conditioning_weights == sum(map(weights, once))
    assert spec.norm_out_weights == weights(real.norm_out)
    assert spec.remaining_non_block_weights == sum(map(weights, (real.x_embedder, real.norm_out, real.proj_out)))
    assert spec.non_block_weights + sum(block.total_weights for block in spec.blocks) == spec.total_weights


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_transformer_counts(name: str) -> None:
    assert_transformer(spec_of(name).transformer, meta_transformer(shipped_configs(name)["transformer"]))


def test_published_sizes() -> None:
    billions = [round(spec_of(name).transformer.total_weights / 1e9, 2) for name in FULL_SIZE]
    assert billions == [32.22, 3.88, 9.08]
    assert round(spec_of("flux2-dev").text_encoder.cut_weights / 1e9, 1) == 17.3
    # diffusers' released VAE holds exactly this many parameters.
    assert spec_of("flux2-dev").vae.total_weights == 84_046_115


@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from([8, 16, 24]),
    st.sampled_from([1.0, 2.5, 3.0, 3.3, 4.0]),
    st.booleans(),
    st.integers(1, 2),
)
def test_tiny_transformer_counts(
    num_double: int, num_single: int, heads: int, head_dim: int, ratio: float, guided: bool, patch: int
) -> None:
    config = dict(shipped_configs("flux2-dev")["transformer"]) | {
        "num_layers": num_double,
        "num_single_layers": num_single,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "axes_dims_rope": [head_dim // 4] * 4,
        "mlp_ratio": ratio,
        "guidance_embeds": guided,
        "patch_size": patch,
        "out_channels": 96,
        "in_channels": 96,
        "timestep_guidance_channels": 32,
    }
    configs = shipped_configs("flux2-dev") | {"transformer": config}
    configs["vae"] = {**configs["vae"], "latent_channels": 24}
    assert_transformer(spec_from_configs("tiny", "tiny", configs).transformer, meta_transformer(config))


def assert_encoder(spec: TextEncoderSpec, real: Any, language: Any, vision: list[nn.Module]) -> None:
    for block, layer in zip(spec.blocks, language.layers, strict=False):
        assert_block(layer, block)
    assert len(spec.blocks) == spec.layers_used == max(spec.out_layers)
    assert len(language.layers) == spec.num_layers
    assert spec.embedding_weights == weights(language.embed_tokens)
    assert spec.cut_weights == weights(language.embed_tokens) + weights(language.layers[: spec.layers_used])
    seeing = spec.vision.weights if spec.vision is not None else 0
    assert seeing == sum(map(weights, vision))
    tied = weights(real.lm_head) if spec.tie_word_embeddings else 0  # on meta, tied weights are not shared yet
    shared = real.lm_head.weight is language.embed_tokens.weight
    assert spec.full_weights + seeing == weights(real) - (0 if shared else tied)


def meta_encoder(config: Mapping[str, Any]) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    config = json.loads(json.dumps(config))
    with torch.device("meta"):
        if config["model_type"] == "qwen3":
            qwen = Qwen3ForCausalLM(Qwen3Config.from_dict(config))
            return qwen, qwen.model, []
        mistral = Mistral3ForConditionalGeneration(Mistral3Config.from_dict(config))
    parts = mistral.model
    return mistral, parts.language_model, [parts.vision_tower, parts.multi_modal_projector]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_text_encoder_counts(name: str) -> None:
    assert_encoder(spec_of(name).text_encoder, *meta_encoder(shipped_configs(name)["text_encoder"]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tiny_qwen3_counts(tied: bool, bias: bool) -> None:
    tiny = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    configs = copy.deepcopy(shipped_configs("flux2-klein-4b"))
    encoder = {
        **configs["text_encoder"],
        **tiny,
        "vocab_size": 100,
        "attention_bias": bias,
        "tie_word_embeddings": tied,
    }
    configs["text_encoder"] = encoder
    configs["transformer"] = {**configs["transformer"], "joint_attention_dim": 144}
    assert_encoder(spec_from_configs("tiny", "tiny", configs).text_encoder, *meta_encoder(encoder))


@pytest.mark.parametrize("projector_bias", [False, True])
def test_tiny_mistral3_counts(projector_bias: bool) -> None:
    configs = copy.deepcopy(shipped_configs("flux2-dev"))
    text, vision = configs["text_encoder"]["text_config"], configs["text_encoder"]["vision_config"]
    text |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 8, "vocab_size": 100, "num_hidden_layers": 31}
    vision |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    vision |= {"patch_size": 4, "image_size": 16, "head_dim": 16}
    encoder = {**configs["text_encoder"], "multimodal_projector_bias": projector_bias}
    configs["text_encoder"] = encoder
    configs["transformer"] = {**configs["transformer"], "joint_attention_dim": 192}
    assert_encoder(spec_from_configs("tiny", "tiny", configs).text_encoder, *meta_encoder(encoder))


VAES = [
    VaeSpec(),
    VaeSpec(block_out_channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=8),
    VaeSpec(block_out_channels=(8,), layers_per_block=3, latent_channels=4, mid_attention=False, quant_conv=False),
    VaeSpec(block_out_channels=(8, 16), latent_channels=2, patch_size=(1, 2), post_quant_conv=False),
    VaeSpec(block_out_channels=(16, 24), decoder_block_out_channels=(8, 32), in_channels=4, out_channels=1),
]


@pytest.mark.parametrize("spec", VAES)
def test_vae_counts(spec: VaeSpec) -> None:
    levels = len(spec.block_out_channels)
    with torch.device("meta"):
        real = AutoencoderKLFlux2(
            block_out_channels=spec.block_out_channels,
            decoder_block_out_channels=spec.decoder_block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=spec.layers_per_block,
            latent_channels=spec.latent_channels,
            patch_size=spec.patch_size,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            mid_block_add_attention=spec.mid_attention,
            use_quant_conv=spec.quant_conv,
            use_post_quant_conv=spec.post_quant_conv,
            norm_num_groups=2,
        )
    assert spec.encoder_weights == weights(real.encoder) + weights(real.quant_conv)
    assert spec.decoder_weights == weights(real.decoder) + weights(real.post_quant_conv)
    assert spec.total_weights == weights(real)
    assert spec.packed_channels == real.bn.num_features
    assert spec.spatial_factor == 2 ** (levels - 1)


def test_stored_weights_count_what_is_saved() -> None:
    spec = spec_of("flux2-klein-4b")
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
    saved = sum(t.numel() for t in vae.state_dict().values() if t.is_floating_point())
    assert spec.stored_weights("vae") == {saved}
    assert spec.stored_weights("transformer") == {spec.transformer.total_weights}
    assert spec.stored_weights("text_encoder") == {spec.text_encoder.cut_weights}


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-4b"])
def test_the_needed_tensors_are_the_cut_decoder(name: str) -> None:
    spec = spec_of(name)
    with torch.device("meta"):
        config = AutoConfig.for_model(**shipped_configs(name)["text_encoder"])
        kind = Mistral3ForConditionalGeneration if spec.form == "dev" else Qwen3ForCausalLM
        saved = kind(config).state_dict()
    used = {key: tensor for key, tensor in saved.items() if spec.needs("text_encoder", key)}
    assert sum(tensor.numel() for tensor in used.values()) in spec.stored_weights("text_encoder")
    assert not any("vision" in key or "lm_head" in key or ".norm.weight" in key for key in used)
    older = {key.replace("model.language_model.", "language_model.model.") for key in used}
    assert all(spec.needs("text_encoder", key) for key in older)
    assert all(spec.needs("transformer", key) for key in ("proj_out.weight", "lm_head.weight"))


def test_forms_and_defaults() -> None:
    def told(name: str) -> tuple[Any, ...]:
        spec = spec_of(name)
        d = spec.defaults
        return spec.form, spec.is_distilled, d.num_inference_steps, d.guidance_scale, d.max_sequence_length, d.height

    assert told("flux2-dev") == ("dev", False, 28, 4.0, 512, 1024)
    assert told("flux2-klein-4b") == ("klein", True, 4, 1.0, 512, 1024)
    assert told("flux2-klein-base-9b") == ("klein", False, 50, 4.0, 512, 1024)
    assert spec_of("flux2-dev").size_multiple == 16
    assert spec_of("flux2-dev").stored_dtype == "bf16"


def test_own_defaults_and_dtype() -> None:
    own = {"height": 64, "width": 96, "num_inference_steps": 7, "guidance_scale": 2, "max_sequence_length": 64}
    configs = {**shipped_configs("flux2-klein-4b"), "lowmem_flux2": own | {"is_distilled": False}}
    configs["transformer"] = {**configs["transformer"], "torch_dtype": "float32"}
    spec = spec_from_configs("x", "x", configs)
    assert (spec.defaults.height, spec.defaults.width, spec.defaults.num_inference_steps) == (64, 96, 7)
    assert (spec.defaults.guidance_scale, spec.defaults.max_sequence_length) == (2.0, 64)
    assert not spec.is_distilled
    assert spec.stored_dtype == "fp32"
    assert spec_from_configs("x", "x", configs, stored_dtype="fp16").stored_dtype == "fp16"


BROKEN: list[tuple[str, str, dict[str, Any], list[str]]] = [
    (
        "flux2-dev",
        "model_index",
        {"_class_name": "FluxPipeline"},
        ["model_index.json", "FluxPipeline", "Flux2Pipeline"],
    ),
    ("flux2-dev", "model_index", {"_class_name": None}, ["model_index.json", "'_class_name' is missing"]),
    ("flux2-dev", "transformer", {"_class_name": "FluxTransformer2DModel"}, ["transformer/config.json", "expected"]),
    (
        "flux2-dev",
        "transformer",
        {"num_single_layers": None},
        ["transformer/config.json", "'num_single_layers' is missing"],
    ),
    ("flux2-dev", "transformer", {"num_layers": "8"}, ["'num_layers' is '8'"]),
    ("flux2-dev", "transformer", {"num_attention_heads": True}, ["'num_attention_heads' is True"]),
    ("flux2-dev", "transformer", {"mlp_ratio": -1}, ["'mlp_ratio' is -1"]),
    ("flux2-dev", "transformer", {"guidance_embeds": 1}, ["'guidance_embeds' is 1"]),
    (
        "flux2-dev",
        "transformer",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        ["quantized by bitsandbytes in 8 bits, which is not read here"],
    ),
    ("flux2-dev", "text_encoder", {"quantization_config": {"quant_method": "gptq"}}, ["quantized by gptq", "bf16"]),
    ("flux2-dev", "model_index", {"_class_name": "Flux2KleinInpaintPipeline"}, ["Flux2KleinInpaintPipeline", "masked"]),
    ("flux2-dev", "text_encoder", {"dtype": "int8"}, ["text_encoder/config.json", "'dtype' is 'int8'"]),
    (
        "flux2-dev",
        "text_encoder",
        {"dtype": None, "torch_dtype": None},
        ["text_encoder/config.json: the key 'dtype' is missing", "no weights to tell it"],
    ),
    ("flux2-dev", "transformer", {"in_channels": 64}, ["vae/config.json", "128", "64"]),
    ("flux2-dev", "transformer", {"joint_attention_dim": 1000}, ["3 x 5120 = 15360", "1000"]),
    ("flux2-dev", "text_encoder", {"text_config": None}, ["text_encoder/config.json", "'text_config' is missing"]),
    ("flux2-dev", "text_encoder", {"model_type": "t5"}, ["'t5'", "'mistral3'"]),
    ("flux2-dev", "text_encoder", {"model_type": None, "architectures": ["T5EncoderModel"]}, ["T5EncoderModel"]),
    ("flux2-klein-4b", "text_encoder", {"num_hidden_layers": 26}, ["26 layers", "9, 18, 27"]),
    ("flux2-klein-4b", "vae", {"latent_channels": None}, ["vae/config.json", "'latent_channels' is missing"]),
    ("flux2-klein-4b", "vae", {"block_out_channels": []}, ["'block_out_channels'"]),
    ("flux2-klein-4b", "vae", {"patch_size": [2]}, ["'patch_size'"]),
    ("flux2-klein-4b", "vae", {"decoder_block_out_channels": [64, 64]}, ["differ in length"]),
    ("flux2-klein-4b", "scheduler", {"_class_name": "DDIMScheduler"}, ["scheduler_config.json", "DDIMScheduler"]),
]


@pytest.mark.parametrize(("name", "part", "change", "told"), BROKEN)
def test_broken_configs_name_file_and_key(name: str, part: str, change: dict[str, Any], told: list[str]) -> None:
    configs = shipped_configs(name)
    with pytest.raises(CheckpointBroken) as caught:
        spec_from_configs("m", "some/model", {**configs, part: {**configs[part], **change}})
    for text in ("some/model", *told):
        assert text in str(caught.value)


def test_parts_of_two_known_models() -> None:
    configs = {**shipped_configs("flux2-klein-9b"), "text_encoder": shipped_configs("flux2-klein-4b")["text_encoder"]}
    with pytest.raises(CheckpointBroken) as caught:
        spec_from_configs("m", "m", configs)
    for text in (
        "klein-4B's Qwen3-4B encoder",
        "3 x 2560 = 7680",
        "the transformer is klein-9B's",
        "12288",
        "Qwen3-8B",
    ):
        assert text in str(caught.value)


def test_architecture_without_model_type() -> None:
    configs = shipped_configs("flux2-dev")
    configs["text_encoder"] = {
        k: v for k, v in configs["text_encoder"].items() if k not in ("model_type", "vision_config")
    }
    spec = spec_from_configs("m", "m", configs)
    assert (spec.text_encoder.architecture, spec.text_encoder.vision) == ("mistral3", None)


def test_missing_config_file() -> None:
    configs = {key: value for key, value in shipped_configs("flux2-dev").items() if key != "vae"}
    with pytest.raises(CheckpointMissing, match=r"vae/config\.json"):
        spec_from_configs("m", "m", configs)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_unreadable_json(tmp_path: Any, text: str) -> None:
    (tmp_path / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointBroken, match=r"model_index\.json"):
        read_configs(tmp_path, "m")


def test_shipped_configs_load_into_the_real_classes() -> None:
    for name in FULL_SIZE:
        vae = json.loads((ASSETS / "configs" / name / "vae" / "config.json").read_text())
        with torch.device("meta"):
            assert weights(AutoencoderKLFlux2.from_config(vae)) == 84_046_115


def test_import_is_light() -> None:
    code = (
        "import sys; import lowmem_flux2.planning.models, lowmem_flux2.planning.sources; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'huggingface_hub', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_rope_axes_must_fill_the_head() -> None:
    configs = shipped_configs("flux2-dev")
    configs["transformer"] = {**configs["transformer"], "axes_dims_rope": [32, 32, 32]}
    with pytest.raises(CheckpointBroken, match=r"axes_dims_rope' \[32, 32, 32\] sums to 96.*'attention_head_dim' 128"):
        spec_from_configs("dev", "dev", configs)
