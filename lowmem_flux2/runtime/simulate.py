"""What a plan's stages hold at their peak, found by running them on fake tensors: diffusers' full-size modules and
transformers in the executor's own stage classes, without weights, time or a GPU.

Simulated bytes are live tensors, each rounded as the allocator rounds it. The allocator's fragmentation, library
workspaces and the CUDA context are not in them: those are the plan's margin and context.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.planning.batches import batch_sizes, batches_a_pass
from lowmem_flux2.planning.formats import GGUF
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Stage, StagePlan
from lowmem_flux2.planning.workload import Request, Workload
from lowmem_flux2.runtime.alike import Cut, cut_text_encoder, cut_transformer
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.encode import image_rows
from lowmem_flux2.runtime.fakes import FAKE_GPU, FakeKernels, FakeWeights
from lowmem_flux2.runtime.live import LiveBytes
from lowmem_flux2.runtime.reference_encoder import joined
from lowmem_flux2.runtime.references import References
from lowmem_flux2.runtime.stand_ins import (
    SimulatedDecoder,
    SimulatedDenoiser,
    SimulatedReferenceEncoder,
    SimulatedTextEncoder,
)


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
        with closing(SimulatedTextEncoder(*arguments, passes=len(passes), tokenizer=tokenizer)) as encoder:
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
        denoiser = SimulatedDenoiser(self._cut.folder, model, stage, request, self._device, _quiet, self.weights)
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
        encoder = SimulatedReferenceEncoder(
            self._cut.folder, self._cut.model, self._cut.stage, self._device, self.weights
        )
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
        decoder = SimulatedDecoder(self._cut.folder, model, self._cut.stage, self._device, self.weights)
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
