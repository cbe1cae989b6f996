"""Build a `ModelSpec` from the JSON files of a diffusers folder, checking that its parts belong together.

Everything is checked here, at the edge, so that the planner may trust a spec: a complaint names the file and the key.
Keys that tell one model from another are required; the rest fall back to the default that diffusers gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing
from lowmem_flux2.planning.models import (
    OUT_LAYERS,
    Architecture,
    Form,
    ModelDefaults,
    ModelSpec,
    StoredDtype,
    TextEncoderSpec,
    TransformerSpec,
    VisionSpec,
)
from lowmem_flux2.planning.sdnq import METHOD
from lowmem_flux2.planning.vae_spec import VaeSpec

CONFIG_FILES: Final[Mapping[str, str]] = {
    "model_index": "model_index.json",
    "transformer": "transformer/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
"""Required configs: their name in `spec_from_configs` and their path in a diffusers folder."""

OWN_CONFIG: Final = "lowmem_flux2"
OWN_CONFIG_FILE: Final = "lowmem_flux2.json"
"""Optional: a model's own defaults (height, width, steps, guidance, text length) and ``is_distilled``."""

KLEIN_KV: Final = "Flux2KleinKVPipeline"
"""Its references are computed in the first step alone."""
_FORMS: Final[Mapping[str, Form]] = {"Flux2Pipeline": "dev", "Flux2KleinPipeline": "klein", KLEIN_KV: "klein"}
_OTHER_FORMS: Final[Mapping[str, str]] = {
    "Flux2KleinInpaintPipeline": "which paints into a masked picture: that is not in this version",
}
_ENCODER_OF_FORM: Final[Mapping[Form, Architecture]] = {"dev": "mistral3", "klein": "qwen3"}
_ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "Mistral3ForConditionalGeneration": "mistral3",
    "Qwen3ForCausalLM": "qwen3",
}
_STORED_DTYPES: Final[Mapping[str, StoredDtype]] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_KNOWN_WIDTHS: Final[Mapping[int, tuple[str, str]]] = {
    15360: ("dev", "Mistral-Small-3.2-24B"),
    12288: ("klein-9B", "Qwen3-8B"),
    7680: ("klein-4B", "Qwen3-4B"),
}
_REQUIRED: Final = object()


@dataclass(frozen=True, slots=True)
class _Section:
    """One JSON object of one file; every accessor raises CheckpointBroken naming file and key."""

    where: str
    values: Mapping[str, Any]

    def broken(self, text: str) -> CheckpointBroken:
        return CheckpointBroken(f"{self.where}: {text}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.broken(f"the key {key!r} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.broken(f"{key!r} is {value!r}, not a whole number of at least {least}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.broken(f"{key!r} is {value!r}, not a positive number")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.broken(f"{key!r} is {value!r}, not true or false")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        value = self.get(key, default)
        whole = isinstance(value, list | tuple) and all(isinstance(n, int) and n >= 1 for n in value)
        if not whole or not value:
            raise self.broken(f"{key!r} is {value!r}, not a list of positive whole numbers")
        return tuple(value)

    def section(self, key: str) -> _Section:
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.broken(f"{key!r} is {value!r}, not an object")
        return _Section(f"{self.where}: {key}", value)

    def expect_class(self, expected: str) -> None:
        found = self.get("_class_name")
        if found != expected:
            raise self.broken(f"_class_name is {found!r}, expected {expected!r}")

    def expect_readable(self) -> None:
        """Of quantized folders, bitsandbytes' 4 bits and SDNQ's are read here."""
        method = self.values.get("quantization_config")
        if method is None:
            return
        kind = method.get("quant_method", "unnamed") if isinstance(method, Mapping) else method
        if kind == METHOD or (kind == "bitsandbytes" and isinstance(method, Mapping) and method.get("load_in_4bit")):
            return
        eight = " in 8 bits" if kind == "bitsandbytes" else ""
        raise self.broken(
            f"this checkpoint is quantized by {kind}{eight}, which is not read here: take the bf16 release, which is "
            "quantized here, or one in bitsandbytes' 4 bits or SDNQ's, or a single file in fp8 or GGUF"
        )


def read_configs(folder: Path, source: str) -> dict[str, Mapping[str, Any]]:
    """Read the config files that a diffusers folder has; `spec_from_configs` complains of those that it lacks.

    Raises:
        CheckpointBroken: a file is there but is not a JSON object.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for key, file in {**CONFIG_FILES, OWN_CONFIG: OWN_CONFIG_FILE}.items():
        path = folder / file
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CheckpointBroken(f"{source}: {file} cannot be read as JSON: {error} ({path})") from error
        if not isinstance(value, dict):
            raise CheckpointBroken(f"{source}: {file} holds {type(value).__name__}, not a JSON object ({path})")
        configs[key] = value
    return configs


def spec_from_configs(
    name: str,
    source: str,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    stored_dtype: StoredDtype | None = None,
) -> ModelSpec:
    """Return the spec of a model given its parsed config files.

    Args:
        name: what the model is called in plans.
        source: alias, folder or hub id, for messages.
        configs: parsed JSON objects by the names of `CONFIG_FILES`, and optionally `OWN_CONFIG`.
        stored_dtype: from the weights' headers where there are any; else the configs' own ``dtype``.

    Raises:
        CheckpointMissing: a required config is not there.
        CheckpointBroken: a key is missing or unusable, a class is another one, or the parts do not belong together.
    """
    sections = {}
    for key, file in CONFIG_FILES.items():
        if key not in configs:
            raise CheckpointMissing(f"{source}: {file} is missing")
        sections[key] = _Section(f"{source}: {file}", configs[key])
    own = _Section(f"{source}: {OWN_CONFIG_FILE}", configs.get(OWN_CONFIG, {}))

    index = sections["model_index"]
    pipeline = index.get("_class_name")
    if pipeline in _OTHER_FORMS:
        raise index.broken(f"_class_name is {pipeline!r}, {_OTHER_FORMS[pipeline]}")
    if pipeline not in _FORMS:
        raise index.broken(f"_class_name is {pipeline!r}, expected {' or '.join(_FORMS)}")
    form = _FORMS[pipeline]
    # Flux2KleinKVPipeline knows no guidance, and its config need not say that it is distilled.
    is_distilled = pipeline == KLEIN_KV or (
        form == "klein" and own.flag("is_distilled", index.flag("is_distilled", False))
    )
    sections["scheduler"].expect_class("FlowMatchEulerDiscreteScheduler")
    transformer = _transformer(sections["transformer"])
    text_encoder = _text_encoder(sections["text_encoder"], form)
    vae = _vae(sections["vae"])
    _check_widths(sections, transformer, text_encoder, vae)
    return ModelSpec(
        name=name,
        form=form,
        is_distilled=is_distilled,
        source=source,
        stored_dtype=stored_dtype or _stored_dtype(sections["transformer"], sections["text_encoder"]),
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        defaults=_defaults(own, form, is_distilled),
        caches_references=pipeline == KLEIN_KV,
    )


def _transformer(config: _Section) -> TransformerSpec:
    config.expect_class("Flux2Transformer2DModel")
    config.expect_readable()
    in_channels = config.integer("in_channels")
    head_dim, axes = config.integer("attention_head_dim"), config.integers("axes_dims_rope", (32, 32, 32, 32))
    if sum(axes) != head_dim:
        raise config.broken(
            f"'axes_dims_rope' {list(axes)} sums to {sum(axes)}, which must be 'attention_head_dim' {head_dim}"
        )
    return TransformerSpec(
        num_double=config.integer("num_layers", least=0),
        num_single=config.integer("num_single_layers", least=0),
        num_heads=config.integer("num_attention_heads"),
        head_dim=head_dim,
        in_channels=in_channels,
        out_channels=config.integer("out_channels", in_channels),
        joint_dim=config.integer("joint_attention_dim"),
        mlp_ratio=config.number("mlp_ratio", 3.0),
        guidance_embeds=config.flag("guidance_embeds", True),
        timestep_channels=config.integer("timestep_guidance_channels", 256),
        patch_size=config.integer("patch_size", 1),
    )


def _text_encoder(config: _Section, form: Form) -> TextEncoderSpec:
    config.expect_readable()
    names = config.get("architectures", ())
    found = config.get("model_type", None) or next((_ARCHITECTURES[n] for n in names if n in _ARCHITECTURES), names)
    architecture = _ENCODER_OF_FORM[form]
    if found != architecture:
        raise config.broken(f"the text encoder is {found!r}, a {form} pipeline needs {architecture!r}")
    text = config.section("text_config") if architecture == "mistral3" else config
    num_heads, hidden_size = text.integer("num_attention_heads"), text.integer("hidden_size")
    # Both defaults are transformers' own. Released Mistral configs name no tying, and their weights hold an lm_head.
    head_dim = text.integer("head_dim", 128 if architecture == "qwen3" else hidden_size // num_heads)
    num_layers, out_layers = text.integer("num_hidden_layers"), OUT_LAYERS[architecture]
    if num_layers < max(out_layers):
        raise text.broken(
            f"{num_layers} layers are too few: a {form} pipeline takes the hidden states after layers "
            f"{', '.join(map(str, out_layers))}"
        )
    has_vision = config.values.get("vision_config") is not None
    return TextEncoderSpec(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=text.integer("num_key_value_heads"),
        head_dim=head_dim,
        vocab_size=text.integer("vocab_size"),
        out_layers=out_layers,
        tie_word_embeddings=config.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False)),
        vision=_vision(config, hidden_size) if has_vision else None,
        attention_bias=text.flag("attention_bias", False),
    )


def _vision(config: _Section, text_width: int) -> VisionSpec:
    """Pixtral tower and Mistral3's projector (transformers 5.23, modeling_pixtral.py and modeling_mistral3.py)."""
    vision = config.section("vision_config")
    h, patch = vision.integer("hidden_size"), vision.integer("patch_size")
    inner, layers = vision.integer("intermediate_size"), vision.integer("num_hidden_layers")
    layer = 4 * h * h + 3 * h * inner + 2 * h
    tower = vision.integer("num_channels", 3) * patch * patch * h + h + layers * layer
    tapped = config.get("vision_feature_layer", -1)
    width = h * (len(tapped) if isinstance(tapped, list | tuple) else 1)
    merge = config.integer("spatial_merge_size", 2)
    biases = 2 * text_width if config.flag("multimodal_projector_bias", False) else 0
    weights = tower + h + merge**2 * h * h + width * text_width + text_width * text_width + biases
    return VisionSpec(h, inner, layers, patch, merge, vision.integer("image_size", 1540), weights)


def _vae(config: _Section) -> VaeSpec:
    config.expect_class("AutoencoderKLFlux2")
    widths = config.integers("block_out_channels")
    patch = config.integers("patch_size", (2, 2))
    decoder_widths = config.values.get("decoder_block_out_channels")
    if len(patch) != 2:
        raise config.broken(f"'patch_size' is {list(patch)}, not rows and columns")
    spec = VaeSpec(
        block_out_channels=widths,
        layers_per_block=config.integer("layers_per_block"),
        latent_channels=config.integer("latent_channels"),
        patch_size=(patch[0], patch[1]),
        in_channels=config.integer("in_channels", 3),
        out_channels=config.integer("out_channels", 3),
        decoder_block_out_channels=None if decoder_widths is None else config.integers("decoder_block_out_channels"),
        mid_attention=config.flag("mid_block_add_attention", True),
        quant_conv=config.flag("use_quant_conv", True),
        post_quant_conv=config.flag("use_post_quant_conv", True),
    )
    if len(spec.decoder_block_out_channels or widths) != len(widths):
        raise config.broken("'decoder_block_out_channels' and 'block_out_channels' differ in length")
    return spec


def _check_widths(
    sections: Mapping[str, _Section], transformer: TransformerSpec, text_encoder: TextEncoderSpec, vae: VaeSpec
) -> None:
    found, needed = text_encoder.joint_dim, transformer.joint_dim
    sum_text = f"{len(text_encoder.out_layers)} x {text_encoder.hidden_size} = {found}"
    if found != needed and found in _KNOWN_WIDTHS and needed in _KNOWN_WIDTHS:
        (owner, encoder), (other, other_encoder) = _KNOWN_WIDTHS[found], _KNOWN_WIDTHS[needed]
        raise sections["text_encoder"].broken(
            f"this is {owner}'s {encoder} encoder ({sum_text}), the transformer is {other}'s "
            f"(needs {needed}, the width of {other_encoder})"
        )
    if found != needed:
        raise sections["text_encoder"].broken(
            f"the encoder gives {sum_text} values a token, the transformer needs joint_attention_dim {needed}"
        )
    if transformer.in_channels != vae.packed_channels or transformer.out_channels != vae.packed_channels:
        raise sections["vae"].broken(
            f"its folded latents have {vae.packed_channels} channels, the transformer takes {transformer.in_channels} "
            f"and gives {transformer.out_channels}"
        )


def _stored_dtype(*configs: _Section) -> StoredDtype:
    for config in configs:
        for key in ("dtype", "torch_dtype"):
            found = config.values.get(key)
            if isinstance(found, str) and found in _STORED_DTYPES:
                return _STORED_DTYPES[found]
            if found is not None:
                raise config.broken(f"{key!r} is {found!r}, none of {', '.join(_STORED_DTYPES)}")
    raise configs[-1].broken(
        "the key 'dtype' is missing, here and in the transformer's config, and there are no weights to tell it"
    )


def _defaults(own: _Section, form: Form, is_distilled: bool) -> ModelDefaults:
    if form == "dev":
        # The model card's example runs 50 steps and calls 28 "a good trade-off": on the cards this engine is for,
        # a step is what costs, so take the shorter of the two that the makers stand by.
        steps, guidance = 28, 4.0
    else:
        steps, guidance = (4, 1.0) if is_distilled else (50, 4.0)
    return ModelDefaults(
        height=own.integer("height", 1024),
        width=own.integer("width", 1024),
        num_inference_steps=own.integer("num_inference_steps", steps),
        guidance_scale=own.number("guidance_scale", guidance),
        max_sequence_length=own.integer("max_sequence_length", 512),
    )
