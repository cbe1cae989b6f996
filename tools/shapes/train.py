"""Train the parts of the `shapes` checkpoint, on one CPU core.

    python tools/shapes/train.py vae         --out WORK --minutes 13
    python tools/shapes/train.py text        --out WORK
    python tools/shapes/train.py transformer --out WORK --minutes 60

Each part is saved in diffusers' own layout under WORK; assemble.py makes the checkpoint of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from draw import PICTURE, SPECS, TRAIN_SPECS, draw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

TEXT_LENGTH = 24
"""Tokens of every prompt, padding included; padding is not masked, so training and use have to agree on it."""
STEPS = 20
"""Denoising steps whose schedule of sigmas the transformer is trained on."""

VAE_RATE = 4e-4
VAE_LATENT_NOISE = 0.12
"""Greatest noise, in standard deviations of the latents, that the decoder learns to bear."""
VAE_KL_WEIGHT = 3e-4
EDGE_WEIGHT = 7.0
STATISTICS_PICTURES = 2048

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
TEXT_RESIDUAL_SCALE = 0.3
"""Scale of the output projections of the random text encoder: lets 28 layers mix words without drowning them."""

RENDERINGS = 24
"""Drawings of every training prompt whose latents the transformer sees."""
RATE = 1e-3
BATCH = 64
EMA = 0.998
DROPPED_PROMPTS = 0.1
DECAY_FROM = 0.5
"""Share of the training time after which the learning rate falls."""


@dataclass
class Clock:
    """Progress of a run that is bounded by time."""

    minutes: float

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the time that is spent, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.minutes))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def decibels(mean_square: float) -> float:
    """PSNR of a mean square error between pictures in [-1, 1]."""
    return 10 * math.log10(4 / mean_square)


def make_vae() -> AutoencoderKLFlux2:
    """An untrained autoencoder: 64 pixels to 8x8 latents of 8 channels, packed by the pipeline to 4x4 of 32."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        sample_size=PICTURE,
    )


def edge_weights(pictures: Tensor) -> Tensor:
    """Weights, of mean 1, that make the pixels near an edge count more."""
    contrast = (functional.max_pool2d(pictures, 3, 1, 1) + functional.max_pool2d(-pictures, 3, 1, 1)).amax(
        1, keepdim=True
    )
    weights = 1 + EDGE_WEIGHT * functional.max_pool2d((contrast > 0.15).float(), 5, 1, 2)
    return weights / weights.mean()


def train_vae(out: Path, minutes: float, init: Path | None, rate: float) -> None:
    """Train the autoencoder on random drawings, then take the batch-norm statistics of its latents."""
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = AutoencoderKLFlux2.from_pretrained(init) if init else make_vae()
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=1e-4)
    clock = Clock(minutes)
    step, mean = 0, 0.0
    while (done := clock.progress) < 1:
        set_rate(optimizer, rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 2e-6)
        pictures = draw(rng.choices(TRAIN_SPECS, k=4 if done < 0.5 else 8))
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pictures).latent_dist
            noise = torch.randn_like(latents.mean) * latents.mean.detach().float().std()
            strength = VAE_LATENT_NOISE * torch.rand(len(pictures), 1, 1, 1)
            decoded = vae.decode(latents.mean + strength * noise).sample.float()
        error = decoded - pictures
        weights = edge_weights(pictures)
        kl = latents.mean.float().square().mean() + 0.05 * (latents.logvar.float() + 6).square().mean()
        loss = (weights * error.abs()).mean() + 2 * (weights * error.square()).mean() + VAE_KL_WEIGHT * kl
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mean += (error.square().mean().item() - mean) * max(0.05, 1 / (step + 1))
        step += 1
        if step % 200 == 0:
            print(f"vae step {step} {clock.seconds:.0f} s {decibels(mean):.2f} dB kl {kl.item():.2f}", flush=True)
            if step % 1000 == 0:
                vae.save_pretrained(out / "vae")
    vae.eval()
    set_statistics(vae, rng)
    test = draw(rng.choices(TRAIN_SPECS, k=512))
    print(f"vae done: {step} steps, {clock.seconds / 60:.1f} min, {decibels(reconstruction_error(vae, test)):.2f} dB")
    vae.save_pretrained(out / "vae")


@torch.no_grad()
def set_statistics(vae: AutoencoderKLFlux2, rng: random.Random) -> None:
    """Set the batch norm, by which the pipeline normalises latents, from the modes of many drawings."""
    pictures = draw(rng.choices(TRAIN_SPECS, k=STATISTICS_PICTURES))
    modes = torch.cat([vae.encode(batch).latent_dist.mode() for batch in torch.split(pictures, 128)])
    patches = Flux2KleinPipeline._patchify_latents(modes)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))
    vae.bn.num_batches_tracked.fill_(1)


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKLFlux2, pictures: Tensor) -> float:
    """Mean square error of pictures after encoding and decoding."""
    errors = [(vae.decode(vae.encode(b).latent_dist.mode()).sample - b).square() for b in torch.split(pictures, 128)]
    return float(torch.cat(errors).mean())


def make_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer as Qwen3's, with the words of the grammar as its only merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    corpus = [spec.prompt for spec in SPECS] + ["user\nassistant\n\n"] * 100
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    fast = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=4096,
    )
    fast.add_tokens(["<|im_start|>", "<think>", "</think>"], special_tokens=True)
    fast.chat_template = TEMPLATE
    fast.padding_side = "right"
    return fast


@torch.no_grad()
def make_text_encoder(vocabulary: int) -> Qwen3ForCausalLM:
    """A random Qwen3 that stays random: its hidden states tell prompts apart, which is all the transformer needs."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    encoder = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 1)
        elif parameter.ndim == 2:
            scale = TEXT_RESIDUAL_SCALE if "o_proj" in name or "down_proj" in name else 1.0
            parameter.normal_(0, scale / parameter.shape[1] ** 0.5)
    return encoder


def make_text(out: Path) -> None:
    """Make the tokenizer and the frozen text encoder."""
    tokenizer = make_tokenizer()
    longest = max(prompt_length(tokenizer, spec.prompt) for spec in SPECS)
    if longest > TEXT_LENGTH:
        raise RuntimeError(f"prompts take up to {longest} tokens, TEXT_LENGTH is {TEXT_LENGTH}")
    print(f"{len(tokenizer)} tokens, longest prompt {longest}")
    tokenizer.save_pretrained(out / "tokenizer")
    # Saved as it is shipped, in bf16, so that the transformer is trained on the embeddings of use.
    make_text_encoder(len(tokenizer)).bfloat16().save_pretrained(out / "text_encoder")


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Number of tokens that the pipeline makes of a prompt before padding."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return len(tokenizer(text)["input_ids"])


def make_transformer() -> Flux2Transformer2DModel:
    """An untrained FLUX.2 transformer that begins as the zero function."""
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 8, 8, 8),
        rope_theta=2000,
        guidance_embeds=False,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "modulation" in name or name.startswith(("proj_out", "norm_out.linear")):
                parameter.zero_()
    return transformer


@torch.no_grad()
def encode_drawings(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Draw every training prompt many times: (numbers of the prompts in TRAIN_SPECS, packed normalised latents)."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    generator = torch.Generator().manual_seed(2)
    numbers = torch.arange(len(TRAIN_SPECS)).repeat(RENDERINGS)
    latents = []
    for batch in torch.split(numbers, 128):
        pictures = draw([TRAIN_SPECS[i] for i in batch.tolist()], generator)
        with torch.autocast("cpu", torch.bfloat16):
            modes = vae.encode(pictures).latent_dist.mode()
        patches = Flux2KleinPipeline._patchify_latents(modes.float())
        latents.append(Flux2KleinPipeline._pack_latents((patches - mean) / std))
    return numbers, torch.cat(latents)


@torch.no_grad()
def embed_prompts(parts: Path) -> Tensor:
    """Embeddings of all training prompts, then of the empty prompt."""
    tokenizer = AutoTokenizer.from_pretrained(parts / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(parts / "text_encoder", dtype=torch.float32).eval()
    prompts = [spec.prompt for spec in TRAIN_SPECS] + [""]
    batches = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
    embed = Flux2KleinPipeline._get_qwen3_prompt_embeds
    return torch.cat([embed(encoder, tokenizer, batch, max_sequence_length=TEXT_LENGTH) for batch in batches])


def sample_sigmas(count: int) -> Tensor:
    """Noise levels: one half by the shifted schedule that the pipeline samples with, one half logit-normal."""
    mu = compute_empirical_mu(image_seq_len=16, num_steps=STEPS)
    uniform = torch.rand(count).clamp(1e-4, 1 - 1e-4)
    shifted = math.exp(mu) / (math.exp(mu) + 1 / uniform - 1)
    normal = torch.sigmoid(torch.randn(count) + mu / 2)
    return torch.where(torch.rand(count) < 0.5, shifted, normal)


def train_transformer(out: Path, minutes: float, init: Path | None, rate: float) -> None:
    """Train the transformer on the latents of drawings; keep the running mean of its weights."""
    torch.manual_seed(0)
    # Rounded as it is shipped.
    vae = AutoencoderKLFlux2.from_pretrained(out / "vae", dtype=torch.bfloat16).float().eval()
    cache = out / "latents.pt"
    if not cache.exists():
        torch.save(encode_drawings(vae), cache)
    numbers, latents = torch.load(cache)
    embeddings = embed_prompts(out)
    print(f"latents {tuple(latents.shape)}, std {latents.std():.3f}", flush=True)
    text_ids = Flux2KleinPipeline._prepare_text_ids(embeddings[:1])
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, 4, 4))

    transformer = Flux2Transformer2DModel.from_pretrained(init) if init else make_transformer()
    transformer.train()
    average = copy.deepcopy(transformer).eval().requires_grad_(False)
    parameters = list(transformer.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    clock = Clock(minutes)
    step, mean = 0, 0.0
    while (done := clock.progress) < 1:
        set_rate(optimizer, rate * min(1.0, (step + 1) / 100, (1 - done) / (1 - DECAY_FROM)) + 1e-6)
        chosen = torch.randint(len(numbers), (BATCH,))
        clean, prompts = latents[chosen], numbers[chosen]
        prompts[torch.rand(BATCH) < DROPPED_PROMPTS] = len(TRAIN_SPECS)
        sigmas, noise = sample_sigmas(BATCH), torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=noisy,
                encoder_hidden_states=embeddings[prompts],
                timestep=sigmas,
                img_ids=image_ids,
                txt_ids=text_ids,
                guidance=None,
                return_dict=False,
            )[0]
        loss = functional.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(EMA, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - keep)
        mean += (loss.item() - mean) * max(0.01, 1 / (step + 1))
        step += 1
        if step % 100 == 0:
            print(f"transformer step {step} {clock.seconds:.0f} s loss {mean:.4f}", flush=True)
            if step % 500 == 0:
                average.save_pretrained(out / "transformer")
    average.save_pretrained(out / "transformer")
    print(f"transformer done: {step} steps, {clock.seconds / 60:.1f} min, loss {mean:.4f}", flush=True)


def main() -> None:
    """Train the part named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "text", "transformer"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained parts")
    parser.add_argument("--minutes", type=float, default=13.0, help="training time")
    parser.add_argument("--init", type=Path, help="go on from the part in this folder")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.enable_flash_sdp(False)  # its backward is slow on CPUs, for so few tokens
    if options.part == "vae":
        train_vae(options.out, options.minutes, options.init, options.rate or VAE_RATE)
    elif options.part == "text":
        make_text(options.out)
    else:
        train_transformer(options.out, options.minutes, options.init, options.rate or RATE)


if __name__ == "__main__":
    main()
