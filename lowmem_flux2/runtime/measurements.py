"""How fast this device computes, at FLUX.2's shapes: each measurement warmed up, a median, and bounded in time.

A measurement starts small, and grows as far as its share of the budget lets it: a slow machine measures fewer tokens
and fewer repeats, and never hangs in a matmul that was sized for another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from lowmem_flux2.planning.expansion import TRAFFIC, expanded_bytes
from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS, GGUF, MIXED
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.planning.support import LIBRARY_OF
from lowmem_flux2.runtime.device import DTYPES, synchronize
from lowmem_flux2.runtime.packed import LINEARS
from lowmem_flux2.runtime.quantize import MIXED_LINEARS, STORED
from lowmem_flux2.runtime.stored_linear import StoredLinear

HIDDEN_SIZES = (6144, 4096, 3072)
"""Of dev, klein-9b and klein-4b."""
HEAD_DIM, MLP_RATIO = 128, 3.0
SMALLEST_HIDDEN = 1024
"""Where even klein-4b's Linears take too much of the memory."""
TOKENS_CPU, TOKENS_CUDA = 768, 4608
"""256x256 and 1024x1024 pixels, with 512 text tokens."""
TOKEN_STEP = 64
REPEATS = 9
VAE_OF = "flux2-klein-4b"
"""Every FLUX.2 model has the same VAE."""
PX_STEP, PX_CPU, PX_CUDA = 64, 256, 1024
COPIES_CHANNELS, COPIES_PX = 128, 256
"""Of the decoder's last level, at a size whose tensors outweigh the kernel's fixed buffers."""
GGUF_KIND = "Q4_K"
"""The type of a GGUF file whose traffic planning takes for all."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured number: the ``Hardware`` field (``matmul_flops_per_s.bf16`` for a class), and how it was taken."""

    field: str
    value: float
    how: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of ``repeats`` runs after a warm-up; of the warm-up itself where that took the whole time."""

    median_s: float
    repeats: int

    def __str__(self) -> str:
        return f"median of {self.repeats}" if self.repeats > 1 else "one run"


@dataclass(slots=True)
class Bench:
    """The device under measurement, and how long the measurement at hand may take.

    Attributes:
        device: where it computes.
        dtype: name of the compute dtype that plans take here.
        hidden: the transformer's hidden size to measure at.
        slice_s: seconds for the measurement at hand.
    """

    device: torch.device
    dtype: str
    hidden: int
    slice_s: float = 1.0

    @property
    def most_tokens(self) -> int:
        return TOKENS_CUDA if self.device.type == "cuda" else TOKENS_CPU

    def time(self, work: Callable[[], object], share: float = 1.0, repeats: int = REPEATS) -> Timing:
        """Run until the share of the slice is used: a warm-up, then once at least and ``repeats`` times at most.

        A warm-up that takes the whole share is all there is.
        """
        end = time.perf_counter() + share * self.slice_s
        taken: list[float] = []
        while len(taken) <= repeats:
            start = time.perf_counter()
            work()
            synchronize(self.device)
            now = time.perf_counter()
            taken.append(now - start)
            if now > end or (len(taken) > 1 and now + taken[-1] > end):
                break
        timed = taken[1:] or taken
        return Timing(median(timed), len(timed))

    def grown(self, work: Callable[[int], Callable[[], object]], least: int, most: int) -> tuple[int, Timing]:
        """Time work of a size: the smallest first, then one that takes about a fifth of the slice.

        Args:
            work: prepares work of a size, a multiple of ``least``.

        Returns:
            The size, and what it took.
        """
        small = self.time(work(least), share=0.2, repeats=2)
        size = min(most, int(self.slice_s / 5 / small.median_s) * least)
        if size <= least:
            return least, small
        return size, self.time(work(size), share=0.75)


def hidden_size(device: torch.device, free_bytes: int) -> int:
    """The largest of FLUX.2's hidden sizes whose two Linears, in fp32, take at most a quarter of the free memory.

    A CPU takes klein-4b's at most: larger ones are as fast, and take longer to fill.
    """
    sizes = HIDDEN_SIZES if device.type == "cuda" else HIDDEN_SIZES[-1:]
    return next((size for size in sizes if 4 * 4 * 13 * size**2 <= free_bytes), SMALLEST_HIDDEN)


# ----------------------------------------------------------------------------------------------------------- matmuls


def matmul(bench: Bench, kind: str) -> Reading:
    """FLOP/s (OP/s for int8) of the two Linears of a single-stream block: h to 9h, and 4h to h."""
    hidden, multiply = bench.hidden, _MULTIPLY.get(kind, functional.linear)
    weights = [_filled((9 * hidden, hidden), kind, bench.device), _filled((hidden, 4 * hidden), kind, bench.device)]

    def work(tokens: int) -> Callable[[], object]:
        rows = [_filled((tokens, weight.shape[1]), kind, bench.device) for weight in weights]
        return lambda: [multiply(row, weight) for row, weight in zip(rows, weights, strict=True)]

    tokens, timing = bench.grown(work, TOKEN_STEP, bench.most_tokens)
    return Reading(
        f"matmul_flops_per_s.{kind}",
        2 * 13 * hidden**2 * tokens / timing.median_s,
        f"Linears of a single-stream block, {tokens} tokens x {hidden}, {timing}",
    )


def _filled(shape: tuple[int, int], kind: str, device: torch.device) -> torch.Tensor:
    """A matrix of noise, one row repeated: filling it must not take longer than multiplying it."""
    row = torch.randn(shape[1], device=device).expand(shape)
    if kind == "int8":
        return (row * 32).clamp(-127, 127).to(torch.int8)
    return row.to(torch.float8_e4m3fn if kind == "fp8" else DTYPES[kind]).contiguous()


def _int8_linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(rows, weight.t())


def _fp8_linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=rows.device)
    product: torch.Tensor = torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return product


_MULTIPLY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "int8": _int8_linear,
    "fp8": _fp8_linear,
}


def attention(bench: Bench) -> Reading:
    """FLOP/s of scaled dot product attention over text and image tokens, 4 S^2 h FLOP."""
    heads = bench.hidden // HEAD_DIM

    def work(tokens: int) -> Callable[[], object]:
        one = torch.randn(1, heads, tokens, HEAD_DIM, device=bench.device).to(DTYPES[bench.dtype])
        return partial(functional.scaled_dot_product_attention, one, one, one)

    tokens, timing = bench.grown(work, TOKEN_STEP, bench.most_tokens)
    rate = 4 * tokens**2 * bench.hidden / timing.median_s
    how = f"SDPA in {bench.dtype}, {heads} heads x {tokens} tokens x {HEAD_DIM}, {timing}"
    return Reading("attention_flops_per_s", rate, how)


def block_share(bench: Bench, matmul_rate: float, attention_rate: float) -> Reading:
    """What a whole single-stream block reaches of its Linears' rate: norms, rotation and gates take the rest.

    Args:
        matmul_rate, attention_rate: FLOP/s measured in the compute dtype.

    Returns:
        A share of ``matmul_rate``; not a ``Hardware`` field, the rates are multiplied by it.
    """
    hidden, dtype = bench.hidden, DTYPES[bench.dtype]
    with torch.device("meta"):
        block = Flux2SingleTransformerBlock(hidden, hidden // HEAD_DIM, HEAD_DIM, MLP_RATIO)
    block = block.to(dtype).to_empty(device=bench.device).eval()
    _fill_with_noise(block)

    def work(tokens: int) -> Callable[[], object]:
        rope = torch.ones(tokens, HEAD_DIM, device=bench.device), torch.zeros(tokens, HEAD_DIM, device=bench.device)
        return partial(
            block,
            hidden_states=torch.randn(1, tokens, hidden, device=bench.device).to(dtype),
            encoder_hidden_states=None,
            temb_mod=torch.zeros(1, 3 * hidden, device=bench.device, dtype=dtype),
            image_rotary_emb=rope,
        )

    tokens, timing = bench.grown(work, TOKEN_STEP, bench.most_tokens)
    linear_s = 2 * 13 * hidden**2 * tokens / matmul_rate
    rest_s = timing.median_s - 4 * tokens**2 * hidden / attention_rate
    share = min(1.0, linear_s / rest_s) if rest_s > 0 else 1.0
    return Reading("block_share", share, f"x {share:.2f} that a whole block of {tokens} tokens reaches, {timing}")


# ------------------------------------------------------------------------------------------------------------- memory


def memory(bench: Bench) -> Reading:
    """Bytes of a Linear's weight a second, as one token reads them."""
    hidden = bench.hidden
    weight = _filled((9 * hidden, hidden), bench.dtype, bench.device)
    token = _filled((1, hidden), bench.dtype, bench.device)
    timing = bench.time(lambda: functional.linear(token, weight))
    rate = weight.numel() * weight.element_size() / timing.median_s
    how = f"a Linear of {hidden} to {9 * hidden} in {bench.dtype} for one token, {timing}"
    return Reading("memory_bytes_per_s", rate, how)


def expansions(bench: Bench) -> list[Reading]:
    """Memory traffic a second, as planning counts it, of each format whose library is there."""
    kinds = [name for name in TRAFFIC if name not in LIBRARY_OF or find_spec(LIBRARY_OF[name]) is not None]
    return [_expansion(bench, name, 1 / len(kinds)) for name in kinds]


def _expansion(bench: Bench, name: str, share: float) -> Reading:
    rows, columns = 2 * bench.hidden, bench.hidden
    kinds: dict[str, type[StoredLinear]] = STORED | {GGUF: LINEARS[GGUF_KIND], MIXED: MIXED_LINEARS[5]}
    kind = kinds[name]
    with torch.device("meta"):
        linear = torch.nn.Linear(columns, rows, bias=False)
    stored = kind(linear, DTYPES[bench.dtype])
    for tensor_name, buffer in list(stored.named_buffers()):
        setattr(stored, tensor_name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=bench.device))
    timing = bench.time(stored.dequantize, share)
    traffic = expanded_bytes(FORMATS[name], DTYPE_BYTES[bench.dtype], rows * columns, planes=float(name == MIXED))
    what = f"{rows} x {columns} weights{f' of {GGUF_KIND}' if name == GGUF else ''} expanded to {bench.dtype}"
    return Reading(f"expand_bytes_per_s.{name}", traffic / timing.median_s, f"{what}, {timing}")


# ------------------------------------------------------------------------------------------------------------ the VAE


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a picture of ``px`` by ``px`` took through the VAE's decoder."""

    dtype: str
    px: int
    timing: Timing


def decode(bench: Bench) -> Decoded:
    """Time the decoder that all FLUX.2 models share, with weights of noise."""
    config, dtype = dict(shipped_configs(VAE_OF)["vae"]), DTYPES[bench.dtype]
    with init_empty_weights(include_buffers=False):
        vae: Any = AutoencoderKLFlux2.from_config(config).eval()
    factor, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    decoder = torch.nn.Module.to(vae.decoder, dtype).to_empty(device=bench.device)
    _fill_with_noise(decoder)

    def work(px: int) -> Callable[[], object]:
        return partial(decoder, torch.randn(1, channels, px // factor, px // factor, device=bench.device).to(dtype))

    most = PX_CUDA if bench.device.type == "cuda" else PX_CPU
    small = bench.time(work(PX_STEP), share=0.2, repeats=2)
    px = min(most, int((bench.slice_s / 6 / small.median_s) ** 0.5) * PX_STEP)  # time grows with the pixels
    if px <= PX_STEP:
        return Decoded(bench.dtype, PX_STEP, small)
    return Decoded(bench.dtype, px, bench.time(work(px), share=0.75))


def convolution_copies(bench: Bench) -> Reading:
    """What the kernel of a 3x3 convolution holds beside its tensors, in tensors of its size."""
    dtype, side = DTYPES[bench.dtype], COPIES_PX
    picture = torch.randn(1, COPIES_CHANNELS, side, side, device=bench.device).to(dtype)
    weight = torch.randn(COPIES_CHANNELS, COPIES_CHANNELS, 3, 3, device=bench.device).to(dtype)
    convolve = partial(functional.conv2d, picture, weight, padding=1)
    convolve()  # libraries set themselves up
    made = picture.numel() * picture.element_size()
    copies = max(peak_bytes(convolve, bench.device) / made - 1, 0)
    how = f"3x3, {COPIES_CHANNELS} channels at {side} px in {bench.dtype}: what was allocated at the peak"
    return Reading("convolution_copies", round(copies, 2), how)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that lay allocated at a time beyond what did before, kernels' own memory included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results = profiled.profiler.kineto_results if profiled.profiler else None
    now = most = 0
    for event in sorted(results.events() if results else (), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _fill_with_noise(module: torch.nn.Module) -> None:
    """Values small enough that nothing overflows, one row repeated: filling must not take longer than measuring."""
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape[-1:], device=parameter.device) * 0.02)
