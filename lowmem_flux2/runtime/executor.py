"""Runs a Plan: encode, denoise, decode, each loaded, run, measured and freed before the next.

One component's weights live at a time. The executor makes no policy; what the plan asks for and this version lacks is
refused before anything is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from lowmem_flux2.errors import NotExecutable, UsageError
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, Stage
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.report import StageMeasure
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser, Generators, StepCallback, initial_latents
from lowmem_flux2.runtime.device import cap_vram, measure, release_memory, synchronize, torch_device
from lowmem_flux2.runtime.encode import TextEncoder

Wanted = Literal["pictures", "vae_latents", "packed_latents"]


class Observer(Protocol):
    """Told what is going on; the command line draws progress bars from it."""

    def stage_started(self, stage: Stage, total: int) -> None: ...

    def advanced(self) -> None: ...

    def stage_finished(self, stage: Stage) -> None: ...

    def event(self, text: str) -> None: ...


class Silent:
    """The observer that ignores everything."""

    def stage_started(self, stage: Stage, total: int) -> None:
        return

    def advanced(self) -> None:
        return

    def stage_finished(self, stage: Stage) -> None:
        return

    def event(self, text: str) -> None:
        return


@dataclass(slots=True)
class Outcome:
    """Result of a run: packed latents (images, tokens, channels); unpacked VAE latents and pictures where asked for."""

    packed_latents: torch.Tensor | None = None
    vae_latents: torch.Tensor | None = None
    pictures: torch.Tensor | None = None
    measures: list[StageMeasure] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors and hooks that a Python caller may hand over in place of what the stages would make.

    Shapes as in diffusers: ``prompt_embeds`` and ``negative_prompt_embeds`` (prompts, tokens, joint_dim), ``latents``
    (images, channels, height, width) noise.
    """

    generators: Generators = None
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    sigmas: Sequence[float] | None = None
    callback: StepCallback | None = None
    result: Wanted = "pictures"


def check_inputs(model: ModelSpec, request: Request, inputs: Inputs) -> None:
    """Compare what the caller hands over with the request, before anything is fetched or loaded.

    Raises:
        UsageError: a wrong number of generators or sigmas, or a wrong shape.
    """
    given = inputs.generators
    if isinstance(given, Sequence) and len(given) != request.num_images:
        raise UsageError(f"{len(given)} generators for {request.num_images} images: one each, or a single one")
    if inputs.sigmas is not None and len(inputs.sigmas) != request.num_inference_steps:
        raise UsageError(f"{len(inputs.sigmas)} sigmas for {request.num_inference_steps} steps: give one a step")
    multiple, channels = model.size_multiple, model.transformer.in_channels
    shape = (request.num_images, channels, request.height // multiple, request.width // multiple)
    if inputs.latents is not None and tuple(inputs.latents.shape) != shape:
        raise UsageError(f"latents have the shape {tuple(inputs.latents.shape)}, this request needs {shape}")
    width = model.text_encoder.joint_dim
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = getattr(inputs, name)
        if embeds is not None and (embeds.ndim != 3 or embeds.shape[::2] != (len(request.prompts), width)):
            needed = f"({len(request.prompts)}, tokens, {width})"
            raise UsageError(f"{name} have the shape {tuple(embeds.shape)}, this request needs {needed}")


class Executor:
    """One plan, one request, one model folder."""

    def __init__(self, plan: Plan, model: ModelSpec, folder: Path, device_name: str, observer: Observer) -> None:
        if plan.not_executable:
            raise NotExecutable(
                "this plan needs what this version cannot carry out yet: " + "; ".join(plan.not_executable)
            )
        self._plan = plan
        self._model = model
        self._folder = folder
        self._device = torch_device(device_name)
        self._observer = observer
        self._outcome = Outcome()

    def run(self, request: Request, inputs: Inputs) -> Outcome:
        """Carry the plan out.

        Raises:
            NonFiniteLatents: NaN or infinity appeared.
            torch.OutOfMemoryError: the device or its cap is full.
        """
        cap_vram(self._device, self._plan.limits.vram_bytes, self._plan.hardware.context_bytes)
        embeds, negative = self._encode(request, inputs)
        self._outcome.packed_latents = self._denoise(request, inputs, embeds, negative)
        if inputs.result != "packed_latents":
            self._decode(request, inputs, self._outcome.packed_latents)
        return self._outcome

    # -------------------------------------------------------------------------------------------------- stages

    def _encode(self, request: Request, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One row of embeddings an image, for each guidance pass."""
        stage = self._plan.stage("encode")
        two_passes = self._plan.workload.guidance_passes == 2
        embeds, negative = inputs.prompt_embeds, inputs.negative_prompt_embeds
        if embeds is None or (two_passes and negative is None):
            prompts = request.prompts
            chunks = [prompts[at : at + stage.batch_size] for at in range(0, len(prompts), stage.batch_size)]
            with self._measured("encode", len(chunks) * len(stage.block_placements)) as loaded:
                encoder = TextEncoder(self._folder, self._model, stage, self._device, self._event)
                loaded()
                try:
                    made: list[list[torch.Tensor]] = []
                    for chunk in chunks:
                        groups = [chunk] + ([[request.negative_prompt or ""] * len(chunk)] if two_passes else [])
                        made.append(encoder.encode(groups, request.max_sequence_length, self._observer.advanced))
                finally:
                    encoder.close()
                    del encoder
            embeds = torch.cat([groups[0] for groups in made]) if embeds is None else embeds
            if two_passes and negative is None:
                negative = torch.cat([groups[1] for groups in made])
        repeats = request.num_images_per_prompt
        embeds = embeds.repeat_interleave(repeats, dim=0)
        return embeds, negative.repeat_interleave(repeats, dim=0) if negative is not None and two_passes else None

    def _denoise(
        self, request: Request, inputs: Inputs, embeds: torch.Tensor, negative: torch.Tensor | None
    ) -> torch.Tensor:
        stage = self._plan.stage("denoise")
        latents = inputs.latents
        if latents is None:
            latents = initial_latents(self._model, request, embeds.dtype, inputs.generators)
        batches = -(-request.num_images // stage.batch_size)
        with self._measured("denoise", batches * request.num_inference_steps) as loaded:
            denoiser = Denoiser(self._folder, self._model, stage, request, self._device, self._event)
            try:
                packed = denoiser.denoise(
                    latents.to(embeds.dtype),
                    embeds,
                    negative,
                    sigmas=inputs.sigmas,
                    callback=inputs.callback,
                    on_loaded=loaded,
                    on_step=self._observer.advanced,
                )
            finally:
                denoiser.close()
        return packed

    def _decode(self, request: Request, inputs: Inputs, packed: torch.Tensor) -> None:
        stage = self._plan.stage("decode")
        multiple = self._model.size_multiple
        with self._measured("decode", request.num_images) as loaded:
            decoder = Decoder(self._folder, self._model, stage, self._device)
            loaded()
            try:
                latents = decoder.unpack(packed, request.height // multiple, request.width // multiple)
                if inputs.result == "pictures":
                    self._outcome.pictures = decoder.decode(latents, self._observer.advanced)
                self._outcome.vae_latents = latents.to("cpu")
            finally:
                decoder.close()

    # ------------------------------------------------------------------------------------------------ measuring

    def _event(self, text: str) -> None:
        self._outcome.events.append(text)
        self._observer.event(text)

    @contextmanager
    def _measured(self, stage: Stage, total: int) -> Iterator[Callable[[], None]]:
        """Meter a stage and free what it leaves. Yields a function to call once it has loaded."""
        self._observer.stage_started(stage, total)
        start = time.perf_counter()
        load_s = 0.0

        def loaded() -> None:
            nonlocal load_s
            synchronize(self._device)
            load_s = time.perf_counter() - start

        try:
            with measure(self._device, self._plan.hardware.context_bytes) as taken:
                yield loaded
        finally:
            release_memory(self._device)
        self._outcome.measures.append(
            StageMeasure(
                stage=stage,
                component=self._plan.stage(stage).component,
                load_s=load_s,
                time_s=taken.time_s,
                peak_vram_bytes=taken.peak_vram_bytes,
                peak_allocated_bytes=taken.peak_allocated_bytes,
                driver_used_bytes=taken.driver_used_bytes,
                peak_ram_bytes=taken.peak_ram_bytes,
                peak_rss_bytes=taken.peak_rss_bytes,
            )
        )
        self._observer.stage_finished(stage)
