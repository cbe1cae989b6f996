"""What a plan's stages hold at their peak, found by running them on fake tensors: diffusers' full-size modules and
transformers in the executor's own stage classes, without weights, time or a GPU.

Simulated bytes are live tensors, each rounded as the allocator rounds it. The allocator's fragmentation, library
workspaces and the CUDA context are not in them: those are the plan's margin and context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.planning.batches import batch_sizes, batches_a_pass
from lowmem_flux2.planning.chunks import chunk_bounds
from lowmem_flux2.planning.formats import GGUF
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Stage, StagePlan
from lowmem_flux2.planning.tiles import SPATIAL_FACTOR, tile_starts
from lowmem_flux2.planning.workload import Request, Workload
from lowmem_flux2.runtime.alike import REPEATS_RUN, Cut, cut_text_encoder, cut_transformer
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser, Progress
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.encode import TextEncoder, image_rows
from lowmem_flux2.runtime.fakes import FAKE_GPU, FakeKernels, FakeWeights
from lowmem_flux2.runtime.forward import Forward, Pass
from lowmem_flux2.runtime.live import LiveBytes
from lowmem_flux2.runtime.reference_encoder import ReferenceEncoder, joined
from lowmem_flux2.runtime.references import References

STEPS_RUN = 2
"""The first step starts from noise, the second from what the first left, as all that follow and hold no less."""
TILE_MARGIN = 1.02
"""Of what a smaller tile is taken to need: small tensors are rounded up, and rims of convolutions do not shrink."""


@dataclass(frozen=True, slots=True)
class SimulatedStage:
    """Peak live bytes of one stage.

    Attributes:
        resident_bytes: weights that stay on the device: resident blocks and what lies outside blocks.
        slot_bytes: device buffers of streamed blocks.
        activation_bytes: what the device's peak holds besides; on ``device=cpu`` with the stage's inputs and results,
            and blocks that rest in RAM.
        host_bytes: the host's peak, arenas, ring, inputs and results; 0 on ``device=cpu``, where there is one memory.
    """

    stage: Stage
    resident_bytes: int
    slot_bytes: int
    activation_bytes: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.resident_bytes + self.slot_bytes + self.activation_bytes


def simulate_stage(
    stage: StagePlan,
    workload: Workload,
    model: ModelSpec,
    folder: Path,
    *,
    on_host: bool = False,
    every_block: bool = False,
) -> SimulatedStage:
    """Simulate one stage.

    Args:
        folder: holds the model's config files; its weights are not read.
        on_host: on ``device=cpu``, with its kernels; else on a GPU.
        every_block: run all blocks, layers, chunks and tiles, not only those that differ; so it is with LoRAs, as any
            block may have one.

    Raises:
        UsageError: a stage that is not simulated.
    """
    check_simulated(stage)
    every_block = every_block or bool(workload.adapters)
    with TemporaryDirectory() as made:
        cut = None
        if not every_block and stage.stage == "denoise" and not workload.caches_references:
            cut = cut_transformer(folder, model, stage, Path(made))
        elif not every_block and stage.stage == "encode":
            cut = cut_text_encoder(folder, model, stage, Path(made))
        cut = cut or Cut(folder, model, stage, ())
        run = _Run(cut, workload, on_host, alike=not every_block)
        with closing(run.weights):
            stages = {"encode": run.encode, "reference": run.reference, "denoise": run.denoise, "decode": run.decode}
            stages[stage.stage]()
            return run.simulated(stage.stage)


def check_simulated(stage: StagePlan) -> None:
    """Raises UsageError for what fake tensors cannot tell."""
    if stage.stage == "upsample":
        raise UsageError("--caption-upsample is not simulated: what is drawn decides how it goes on; leave it out")
    if stage.weight_format == GGUF:
        raise UsageError(
            f"{stage.component} blocks in {GGUF} are not simulated, as a plan has their bytes and not their types: "
            "give another --weight-format or --text-weight-format"
        )


class _Run:
    """One stage under way in the fake world."""

    def __init__(self, cut: Cut, workload: Workload, on_host: bool, alike: bool) -> None:
        self._cut = cut
        self._alike = alike
        self._workload = workload
        self._device = torch.device("cpu") if on_host else FAKE_GPU
        self._dtype = DTYPES[cut.stage.compute_dtype]
        self._live = LiveBytes()
        self._loaded_bytes = 0
        hidden = cut.model.text_encoder.hidden_size
        self.weights = FakeWeights(cut.folder, hidden, self._live, FakeKernels(cuda=not on_host), cut.repeats, alike)

    def simulated(self, stage: Stage) -> SimulatedStage:
        """Read the meters, while the modes are still on."""
        device, slots = self._device.type, self.weights.slot_bytes
        resident = self._loaded_bytes - slots - (self.weights.arena_bytes if device == "cpu" else 0)
        peak = max(self._live.peak_bytes[device], self.weights.once_bytes)
        host = 0 if device == "cpu" else self._live.peak_bytes["cpu"]
        return SimulatedStage(stage, resident, slots, peak - resident - slots, host)

    def _loaded(self) -> None:
        self._loaded_bytes = self._live.span_bytes[self._device.type]

    # ------------------------------------------------------------------------------------------------ stages

    def encode(self) -> None:
        stage, work = self._cut.stage, self._workload
        dims, length = self._cut.model.text_encoder, work.text_tokens
        batches = batch_sizes(work, stage.batch_size)[stage.cached_batches :]
        together = batches_a_pass(dims, stage.batch_size, length, self._dtype.itemsize)
        passes = [batches[at : at + together] for at in range(0, len(batches), together)]
        tokenizer = cast(PreTrainedTokenizerBase, _Tokenizer())
        arguments = (self._cut.folder, self._cut.model, stage, self._device, _quiet, self.weights)
        made: list[torch.Tensor] = []
        with closing(_TextEncoder(*arguments, passes=len(passes), tokenizer=tokenizer)) as encoder:
            self._loaded()
            if self._cut.repeats:
                encoder.stand_for_layers()
            run = self._run_of([sum(sizes) for sizes in passes])
            for number, sizes in enumerate(passes):
                if number in run:
                    made += encoder.encode([("prompt",) * size for size in sizes], length)
                else:
                    made += [torch.empty(size, length, dims.joint_dim, dtype=self._dtype) for size in sizes]
        prompts = _batches(work.num_prompts, stage.batch_size)
        by_size = {
            size: torch.empty(size, length, dims.joint_dim, dtype=self._dtype) for size in {*prompts} - {*batches}
        }
        by_size |= {len(batch): batch for batch in made}
        rows = []
        for _ in range(work.guidance_passes):
            rows.append(image_rows([by_size[size] for size in prompts], work.num_images // work.num_prompts))

    def denoise(self) -> None:
        stage, work, model = self._cut.stage, self._workload, self._cut.model
        channels, multiple = model.transformer.in_channels, model.size_multiple
        request = _request(work)
        denoiser = _Denoiser(self._cut.folder, model, stage, request, self._device, _quiet, self.weights)
        denoiser.run_batches = self._run_of(_batches(work.num_images, stage.batch_size))
        if self._alike and stage.chunk_tokens:
            denoiser.stand_for_chunks(stage.chunk_tokens)
        if self._cut.repeats and stage.step_cache == "off":
            denoiser.stand_for_blocks()
        shape = (work.num_images, channels, work.height // multiple, work.width // multiple)
        noise = torch.empty(shape, dtype=self._dtype)
        embeds = [
            torch.empty(work.num_images, work.text_tokens, model.transformer.joint_dim, dtype=self._dtype)
            for _ in range(work.guidance_passes)
        ]
        references = None
        if work.reference_tokens:
            references = References(
                torch.empty(1, work.reference_tokens, channels, dtype=self._dtype),
                torch.empty(1, work.reference_tokens, 4, dtype=torch.int64),
            )
        negative = embeds[1] if len(embeds) > 1 else None
        denoiser.images_a_prompt, denoiser.negative = work.num_images // work.num_prompts, negative
        denoiser.denoise(noise, embeds[0], negative, references=references, on_loaded=self._loaded)

    def reference(self) -> None:
        """Every picture, or of each size the first and the last, which meets all other results."""
        encoder = _ReferenceEncoder(self._cut.folder, self._cut.model, self._cut.stage, self._device, self.weights)
        self._loaded()
        channels = self._cut.model.vae.in_channels
        # Zeros, because empty bytes count as weights.
        sizes = self._workload.references
        pictures = [torch.zeros(height, width, channels, dtype=torch.uint8) for width, height in sizes]
        made: list[torch.Tensor] = []
        for number, (size, picture) in enumerate(zip(sizes, pictures, strict=True)):
            if self._alike and size in sizes[:number] and size in sizes[number + 1 :]:
                made.append(torch.empty_like(made[sizes.index(size)]))
                continue
            if self._alike and self._cut.stage.tile_px:
                encoder.stand_for_tiles(size, self._cut.stage.tile_px, self._live)
            made.append(encoder.encode(picture))
        joined(made)

    def decode(self) -> None:
        work, model = self._workload, self._cut.model
        multiple = model.size_multiple
        height, width = work.height // multiple, work.width // multiple
        decoder = _Decoder(self._cut.folder, model, self._cut.stage, self._device, self.weights)
        self._loaded()
        if self._alike and self._cut.stage.tile_px:
            decoder.stand_for_tiles(work, self._cut.stage.tile_px, self._live)
        packed = torch.empty(work.num_images, height * width, model.transformer.in_channels, dtype=self._dtype)
        latents = decoder.unpack(packed, height, width)
        kept = latents.to("cpu")
        pictures: list[torch.Tensor] = []
        for number in range(work.num_images):
            if number in self._run_of([1] * work.num_images):
                pictures.append(decoder.decode(latents[:1]))
            else:
                pictures.append(torch.empty(1, model.vae.out_channels, work.height, work.width, dtype=self._dtype))
        torch.cat(pictures)
        del kept

    def _run_of(self, batches: Sequence[int]) -> set[int]:
        """Which batches are run: all, or the last, which meets all other results, and the first if that is larger."""
        if not self._alike:
            return set(range(len(batches)))
        return {len(batches) - 1} | ({0} if batches[0] > batches[-1] else set())


class _TextEncoder(TextEncoder):
    """The executor's, which may run only its last layers, where most tapped states wait."""

    def stand_for_layers(self) -> None:
        for layer in self._decoder.layers[:-REPEATS_RUN]:
            layer.forward = lambda hidden, **_: torch.empty_like(hidden)


class _Forward(Forward):
    """The executor's, which may make do with some blocks: others leave tensors of the size of what they are given."""

    blocks_run: Container[nn.Module] | None = None
    steps_left = 0

    def predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps_left -= 1
        return super().predict(*args, **kwargs)

    def _is_run(self, block: nn.Module) -> bool:
        return self.blocks_run is None or (not self.steps_left and block in self.blocks_run)

    def _double(self, block: nn.Module, one: Pass, *rest: Any) -> None:
        if self._is_run(block):
            super()._double(block, one, *rest)
        else:
            one.encoder_hidden, one.hidden = torch.empty_like(one.encoder_hidden), torch.empty_like(one.hidden)

    def _single(self, block: nn.Module, one: Pass, *rest: Any) -> None:
        if self._is_run(block):
            super()._single(block, one, *rest)
        else:
            one.hidden = torch.empty_like(one.hidden)


class _Denoiser(Denoiser):
    """The executor's, with two steps for all of them, and of some batches only."""

    forward_type = _Forward
    _forward: _Forward
    run_batches: Container[int] = ()
    images_a_prompt = 1
    negative: torch.Tensor | None = None

    def _are_equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether the rows are of the same prompts, or all of negative ones; fake tensors have no values."""
        return one.shape == other.shape and self._prompts(one) == self._prompts(other)

    def _prompts(self, embeds: torch.Tensor) -> list[int]:
        if self.negative is not None and embeds.untyped_storage()._cdata == self.negative.untyped_storage()._cdata:
            return []
        first = embeds.storage_offset() // embeds[0].numel()
        return [row // self.images_a_prompt for row in range(first, first + len(embeds))]

    def stand_for_blocks(self) -> None:
        """In the last step alone, run one block of each kind: the second, which no longer meets what came before."""
        net = self._transformer
        kinds = (net.transformer_blocks, net.single_transformer_blocks)
        self._forward.blocks_run = {kind[min(1, len(kind) - 1)] for kind in kinds if len(kind)}

    def stand_for_chunks(self, chunk_tokens: int) -> None:
        """Only the first and the last chunk, which is the longest: what is made of a chunk lies in tensors of all."""

        def chunks(tokens: int) -> list[tuple[int, int]]:
            bounds = chunk_bounds(tokens, chunk_tokens)
            return [*bounds[:-1][:1], bounds[-1]]

        self._forward.chunks = chunks

    def _run(
        self,
        noise: torch.Tensor,
        references: Any,
        progress: Progress,
        timesteps: Any,
        sigmas: Any,
        steps: Any,
        *rest: Any,
    ) -> Any:
        if len(progress.finished) not in self.run_batches:
            return torch.empty(len(noise), noise[0, 0].numel(), noise.shape[1], dtype=noise.dtype)
        self._forward.steps_left = len(steps[:STEPS_RUN])
        return super()._run(noise, references, progress, timesteps, sigmas, steps[:STEPS_RUN], *rest)


class _ReferenceEncoder(ReferenceEncoder):
    """The executor's, which may run only those tiles that may be its peak."""

    def stand_for_tiles(self, size: tuple[int, int], tile_px: int, live: LiveBytes) -> None:
        """Of the next picture, (width, height)."""
        self._vae.encoder.forward = type(self._vae.encoder).forward.__get__(self._vae.encoder)
        _stand_for_tiles(self._vae, self._vae.encoder, size, tile_px, live, given=SPATIAL_FACTOR, made=1)


class _Decoder(Decoder):
    """The executor's, which may run only those tiles that may be its peak."""

    def stand_for_tiles(self, work: Workload, tile_px: int, live: LiveBytes) -> None:
        size = (work.width, work.height)
        _stand_for_tiles(self._vae, self._vae.decoder, size, tile_px, live, given=1, made=SPATIAL_FACTOR)


def _stand_for_tiles(
    vae: Any, half: Any, size: tuple[int, int], tile_px: int, live: LiveBytes, *, given: int, made: int
) -> None:
    """Let one half of the VAE run the last tile of a size, of pictures of (width, height), if it may be the peak.

    The last one meets the most finished tiles. Whole tiles come first; a smaller one takes memory as its area is, and
    is run if that and what is there may be more than the peak so far. Not blending either: it writes into tiles that
    are there, a row at a time.

    Args:
        given, made: what the half is given and makes, elements a latent's side.
    """
    vae.blend_v = vae.blend_h = lambda above, tile, extent: tile
    across, down = (tile_starts(side, tile_px) for side in size)
    totals = Counter((given * height, given * width) for _, height in down for _, width in across)
    seen: Counter[tuple[int, int]] = Counter()
    most: list[float] = []  # bytes an element given, of the first tile that was run
    run = half.forward

    def forward(tile: torch.Tensor) -> torch.Tensor:
        height, width = tile.shape[-2:]
        device = tile.device.type
        seen[height, width] += 1
        before, area = live.now_bytes[device], height * width
        is_last = seen[height, width] % totals[height, width] == 0
        if not is_last or (most and before + TILE_MARGIN * most[0] * area < live.peak_bytes[device]):
            sides = (height // given * made, width // given * made)
            return tile.new_empty(len(tile), half.conv_out.out_channels, *sides)
        result: torch.Tensor = run(tile)
        most.append((live.peak_bytes[device] - before) / area)
        return result

    half.forward = forward


class _Tokenizer:
    """Chat templates and tokens of any prompt, padded: which tokens they are changes no shape."""

    def apply_chat_template(self, conversation: Sequence[Any], tokenize: bool, **wanted: Any) -> Any:
        return self(conversation, **wanted) if tokenize else ""

    def __call__(self, texts: Sequence[Any], max_length: int = 1, **wanted: Any) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}


def _request(work: Workload) -> Request:
    """A request of this size; what its prompts say plays no part."""
    return Request(
        prompts=("prompt",) * work.num_prompts,
        negative_prompt=None,
        width=work.width,
        height=work.height,
        num_inference_steps=work.steps,
        guidance_scale=1.0,
        num_images_per_prompt=work.num_images // work.num_prompts,
        max_sequence_length=work.text_tokens,
        loras=tuple(Lora(adapter.path, adapter.scale) for adapter in work.adapters),
    )


def _batches(total: int, size: int) -> list[int]:
    return [min(size, total - at) for at in range(0, total, size)]


def _quiet(text: str) -> None:
    return
