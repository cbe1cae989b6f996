"""Random tiny FLUX.2 checkpoints in diffusers folder form, made offline in a second or two.

The parts are the real classes at toy size, so the stock pipelines load and run them. Weights are random, yet scaled so
that every path (modulation, guidance, text, batch norm) moves the output; the pictures mean nothing.

`Flux2Pipeline` wants a `PixtralProcessor`, which transformers only defines where torchvision imports. Its
folder is therefore written file by file, as `PixtralProcessor.save_pretrained` would, and where torchvision is missing
`load_stock` gives the pipeline the folder's plain tokenizer, which yields the same ids for text.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers import __version__ as diffusers_version
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

ALIGNMENT = 256
LATENT_CHANNELS = 8
HIDDEN = 32  # text encoders; three of their states joined are the transformer's joint_attention_dim
QWEN_LAYERS = 29  # states 9, 18, 27 are used, so a cut after 27 drops two layers
MISTRAL_LAYERS = 32  # states 10, 20, 30 are used, likewise
VOCAB = 512
PATCH, MERGE = 8, 2  # vision patches

WORDS = (
    "a photo of the red green blue yellow small large circle square triangle cross cat dog house tree boat mountain "
    "on in at under left right center white black background night morning light painting watercolor and with"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{%- macro body(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '[IMG]' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ '[SYSTEM_PROMPT]' + body(m['content']) + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m['role'] == 'user' -%}{{ '[INST]' + body(m['content']) + '[/INST]' }}"
    "{%- else -%}{{ body(m['content']) + eos_token }}{%- endif -%}{%- endfor -%}"
)
# In the order of Mistral's own tokenizer, as far as [/SYSTEM_PROMPT].
MISTRAL_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)


# --- weights --------------------------------------------------------------------------------------------------------


def _randomize(module: torch.nn.Module, seed: int, gain: Callable[[str], float] = lambda name: 1.0) -> None:
    """Fill every parameter: matrices keep variance times `gain`, norm scales lie around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter.numel() // parameter.shape[0]
                noise *= gain(name) / math.sqrt(fan_in)
            elif name.endswith("bias"):
                noise *= 0.05
            else:
                noise = 1 + 0.1 * noise
            parameter.copy_(noise)
    module.eval().requires_grad_(False)


def _text_gain(name: str) -> float:
    if "embed" in name:
        return math.sqrt(HIDDEN)  # unit variance
    # Residual branches: neither lost against the stream nor doubling it in each of some thirty layers.
    return 0.5 if "o_proj" in name or "down_proj" in name else 1.0


def _transformer_gain(name: str) -> float:
    return 2.0 if "modulation" in name or "time_guidance_embed" in name or "norm_out" in name else 1.0


def _storage_aligned(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    size = tensor.numel() * tensor.element_size()
    raw = torch.empty(size + alignment, dtype=torch.uint8, device=tensor.device)
    start = -raw.data_ptr() % alignment
    aligned = raw[start : start + size].view(tensor.dtype).view(tensor.shape)
    return aligned.copy_(tensor.detach())


def align_weights(module: torch.nn.Module, alignment: int = ALIGNMENT) -> torch.nn.Module:
    """Move every parameter and buffer to an address that is a multiple of `alignment`; returns the module.

    CPU Linear kernels may round differently with the alignment of their weights, so a bit-for-bit comparison needs
    equal alignment on both sides. Values, dtypes and tied parameters are kept; strides become contiguous.
    """
    for tensor in _tensors(module):
        tensor.data = _storage_aligned(tensor, alignment)
    return module


def _tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# --- parts ----------------------------------------------------------------------------------------------------------


def make_transformer(*, seed: int = 0, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """2 double and 3 single blocks, 2 heads of 32."""
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=3 * HIDDEN,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance_embeds,
    )
    _randomize(transformer, seed + 1, _transformer_gain)
    return transformer


def make_vae(*, seed: int = 0) -> AutoencoderKLFlux2:
    """Four levels, so 8 pixels a latent, with batch-norm statistics that are not the identity."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )
    _randomize(vae, seed + 2)
    generator = torch.Generator().manual_seed(seed + 3)
    vae.bn.running_mean.copy_(0.3 * torch.randn(4 * LATENT_CHANNELS, generator=generator))
    vae.bn.running_var.copy_(0.5 + 1.5 * torch.rand(4 * LATENT_CHANNELS, generator=generator))
    return vae


def make_qwen3(tokenizer: Qwen2TokenizerFast, *, seed: int = 0) -> Qwen3ForCausalLM:
    """29 layers, embeddings tied as in Qwen3-4B."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=QWEN_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = Qwen3ForCausalLM(config)
    _randomize(encoder, seed + 4, _text_gain)
    return encoder


def make_mistral3(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Mistral3ForConditionalGeneration:
    """32 text layers, untied head, and one vision layer."""
    text = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=MISTRAL_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=PATCH,
    )
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=MERGE,
        tie_word_embeddings=False,
    )
    encoder = Mistral3ForConditionalGeneration(config)
    _randomize(encoder, seed + 4, _text_gain)
    return encoder


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.2's own settings."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def _byte_bpe(corpus: Sequence[str], specials: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of at most VOCAB tokens, the specials first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,  # leaves ids for tokens added later
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def make_qwen_tokenizer() -> Qwen2TokenizerFast:
    """Qwen's tokenizer class over a small vocabulary; pads on the right."""
    model = json.loads(_byte_bpe([WORDS] * 2 + ["user\nassistant\n\n"], []).to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="right",
    )
    tokenizer.add_tokens(["<|im_start|>", "<think>", "</think>"], special_tokens=True)
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def make_mistral_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for Tekken with its special ids; pads on the left.

    The pipeline's system message is in the training text, so that it and a prompt fit into 64 tokens.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe([SYSTEM_MESSAGE] * 4 + [WORDS] * 2, MISTRAL_SPECIALS),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=4096,
        padding_side="left",
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


# --- folders --------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_folder(
    folder: Path,
    pipeline: str,
    parts: dict[str, tuple[str, str]],
    *,
    transformer: Flux2Transformer2DModel,
    vae: AutoencoderKLFlux2,
    text_encoder: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    shard_bytes: int | None,
    **extra: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shards = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    for part in (transformer, vae, text_encoder):
        torch.nn.Module.to(part, dtype)  # not diffusers' own `to`, which logs a warning here
    transformer.save_pretrained(folder / "transformer", **shards)
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder", **shards)
    tokenizer.save_pretrained(folder / "tokenizer")
    make_scheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, "_diffusers_version": diffusers_version, **extra}
    _write_json(folder / "model_index.json", {**index, **{name: list(pair) for name, pair in sorted(parts.items())}})
    return folder


def _parts(text_encoder: str, tokenizer: str) -> dict[str, tuple[str, str]]:
    return {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", text_encoder),
        "tokenizer": ("transformers", tokenizer),
        "transformer": ("diffusers", "Flux2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLFlux2"),
    }


def write_klein(
    folder: Path | str,
    *,
    seed: int = 0,
    is_distilled: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    pipeline: str = "Flux2KleinPipeline",
) -> Path:
    """Write a tiny FLUX.2 klein checkpoint; `shard_bytes` splits transformer and text encoder into such shards."""
    tokenizer = make_qwen_tokenizer()
    return _write_folder(
        Path(folder),
        pipeline,
        _parts("Qwen3ForCausalLM", "Qwen2TokenizerFast"),
        transformer=make_transformer(seed=seed, guidance_embeds=False),
        vae=make_vae(seed=seed),
        text_encoder=make_qwen3(tokenizer, seed=seed),
        tokenizer=tokenizer,
        dtype=dtype,
        shard_bytes=shard_bytes,
        is_distilled=is_distilled,
    )


def write_dev(
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
) -> Path:
    """Write a tiny FLUX.2 dev checkpoint; `shard_bytes` splits transformer and text encoder into such shards."""
    tokenizer = make_mistral_tokenizer()
    path = _write_folder(
        Path(folder),
        "Flux2Pipeline",
        _parts("Mistral3ForConditionalGeneration", "PixtralProcessor"),
        transformer=make_transformer(seed=seed, guidance_embeds=True),
        vae=make_vae(seed=seed),
        text_encoder=make_mistral3(tokenizer, seed=seed),
        tokenizer=tokenizer,
        dtype=dtype,
        shard_bytes=shard_bytes,
    )
    _write_pixtral(path / "tokenizer")
    return path


def _write_pixtral(folder: Path) -> None:
    """Beside the tokenizer's files, what makes the folder a PixtralProcessor."""
    image_processor = {
        "image_processor_type": "PixtralImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": {"height": PATCH, "width": PATCH},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 64},
    }
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "PixtralProcessor",
            "image_processor": image_processor,
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
    )


# --- loading with the stock pipelines -------------------------------------------------------------------------------


@functools.cache
def has_pixtral_processor() -> bool:
    """Whether transformers can define PixtralProcessor here, which takes a torchvision that imports."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: a CUDA build of torchvision beside a CPU build of torch
        return False
    return True


def load_stock(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, align: bool = False, **kwargs: Any
) -> DiffusionPipeline:
    """The diffusers pipeline of a folder, on the CPU and without a progress bar; `align` aligns its weights."""
    path = Path(folder)
    plain = None
    name = json.loads((path / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    if name == "Flux2Pipeline" and "tokenizer" not in kwargs and not has_pixtral_processor():
        plain, kwargs["tokenizer"] = AutoTokenizer.from_pretrained(path / "tokenizer"), None
    pipeline_class = {kind.__name__: kind for kind in (Flux2Pipeline, Flux2KleinPipeline, Flux2KleinKVPipeline)}[name]
    pipeline = pipeline_class.from_pretrained(path, dtype=dtype, local_files_only=True, **kwargs)
    if plain is not None:  # handed to from_pretrained it would be checked against a class that is not there
        pipeline.register_modules(tokenizer=plain)
    pipeline.set_progress_bar_config(disable=True)
    if align:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                align_weights(part)
    return pipeline
