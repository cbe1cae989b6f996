"""Runs a Plan: encode, reference where there are any, denoise, decode, each loaded, run, measured and freed in turn.

One component's weights live at a time. The executor makes no policy; what the plan asks for and this version lacks is
refused before anything is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from lowmem_flux2.errors import RunError
from lowmem_flux2.planning.batches import Batch, batches_a_pass, negatives_of, prompt_batches
from lowmem_flux2.planning.budget import overrun
from lowmem_flux2.planning.ladder import Resource
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, Stage, StagePlan
from lowmem_flux2.planning.step_caches import computed_blocks
from lowmem_flux2.planning.upsampling import NEW_TOKENS
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.report import StageMeasure
from lowmem_flux2.runtime.cache import EntryDamaged
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser, Progress, initial_latents
from lowmem_flux2.runtime.device import (
    DTYPES,
    cap_vram,
    host_use,
    measure,
    release_memory,
    synchronize,
    torch_device,
)
from lowmem_flux2.runtime.encode import TextEncoder, image_rows
from lowmem_flux2.runtime.inputs import Inputs, batches_to_encode
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.observer import Observer
from lowmem_flux2.runtime.recovery import (
    Begun,
    begun_images,
    begun_prompts,
    failure_of,
    last_rung,
    rung_words,
    with_format_change,
)
from lowmem_flux2.runtime.reference_encoder import ReferenceEncoder, joined
from lowmem_flux2.runtime.references import References
from lowmem_flux2.runtime.upsample import Upsampler
from lowmem_flux2.runtime.weights import Weights


@dataclass(slots=True)
class Outcome:
    """Result of a run: packed latents (images, tokens, channels); unpacked VAE latents and pictures where asked for."""

    packed_latents: torch.Tensor | None = None
    vae_latents: torch.Tensor | None = None
    pictures: torch.Tensor | None = None
    measures: list[StageMeasure] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What denoising goes on from: noise (images, channels, height, width), a row of embeddings an image, progress."""

    noise: torch.Tensor
    embeds: torch.Tensor
    negative: torch.Tensor | None
    progress: Progress
    references: References | None = None


class Executor:
    """One plan, one request, the folder with a model's configs and tokenizer, and where its weights come from.

    ``replan`` gives the plan with a stage's next lower peak of the memory that ran out, None on the last rung: the
    ladder's only policy. ``mend`` is told of a damaged entry that a stage came upon, which then begins again, going on
    from what it has finished; it raises where that cannot be.
    """

    def __init__(
        self,
        plan: Plan,
        model: ModelSpec,
        folder: Path,
        device_name: str,
        observer: Observer,
        weights: Weights,
        replan: Callable[[Plan, Stage, Resource], Plan | None],
        mend: Callable[[StagePlan, EntryDamaged], None] | None = None,
    ) -> None:
        self._plan = plan
        self._model = model
        self._folder = folder
        self._device = torch_device(device_name)
        self._observer = observer
        self._weights = weights
        self._replan = replan
        self._mend = mend
        self._outcome = Outcome()
        self._pictures: list[torch.Tensor] = []
        self._ram_before_bytes = host_use().anonymous_bytes
        self._moments: list[float] = []
        self._under_way: UnderWay | None = None
        self._interruption = Interruption()

    @property
    def plan(self) -> Plan:
        """The plan as it is being carried out: the ladder may have lowered stages of it."""
        return self._plan

    @property
    def undecoded(self) -> tuple[int, torch.Tensor] | None:
        """How many images have their picture, and all packed latents; None before those are done, or when all have."""
        packed, done = self._outcome.packed_latents, len(self._pictures)
        return None if packed is None or done == len(packed) else (done, packed)

    @property
    def under_way(self) -> UnderWay | None:
        """What denoising has come to; None before it began, and when all of it is done."""
        return self._under_way

    def run(self, request: Request, inputs: Inputs) -> Outcome:
        """Carry the plan out.

        Raises:
            Interrupted: as ``inputs.interruption`` asked; ``under_way`` or ``undecoded`` is what to keep.
            NonFiniteLatents: NaN or infinity appeared.
            RunError: out of memory on the last rung of the recovery ladder.
        """
        cap_vram(self._device, self._plan.limits.vram_bytes, self._plan.hardware.context_bytes)
        self._interruption = inputs.interruption or self._interruption
        packed = inputs.packed
        if packed is None:
            request = self._upsample(request, inputs)
            if inputs.result == "prompts":
                return self._outcome
            embeds, negative = self._encode(request, inputs)
            if inputs.result == "embeddings":
                return self._outcome
            packed = self._denoise(request, inputs, embeds, negative, self._reference(inputs))
        self._outcome.packed_latents = packed
        if inputs.on_latents is not None:
            inputs.on_latents(packed, self._plan)
        if inputs.result != "packed_latents":
            self._decode(request, inputs, packed)
        return self._outcome

    # -------------------------------------------------------------------------------------------------- stages

    def _upsample(self, request: Request, inputs: Inputs) -> Request:
        """The request with the prompts that the text encoder makes of its own, where that is asked for."""
        temperature = request.caption_upsample_temperature
        if temperature is None or inputs.prompt_embeds is not None:
            return request
        made: list[str] = []

        def attempt(stage: StagePlan, loaded: Callable[[], None]) -> None:
            arguments = (self._folder, self._model, stage, self._device, self._event, self._weights, inputs.seen)
            with closing(Upsampler(*arguments)) as upsampler:
                loaded()
                made.extend(upsampler.upsample(request.prompts, temperature, inputs.upsample_seed, self._stepped))

        self._climb("upsample", NEW_TOKENS, attempt)
        if inputs.on_upsampled is not None:
            inputs.on_upsampled(tuple(made))
        return replace(request, prompts=tuple(made))

    def _encode(self, request: Request, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One row of embeddings an image, for each guidance pass."""
        made, wanted = dict(inputs.known), batches_to_encode(request, self._plan, inputs)
        if any(batch not in made for batch in wanted):
            self._encode_batches(wanted, request, made, inputs)
        batches = prompt_batches(request.prompts, self._plan.stage("encode").batch_size)
        negatives = negatives_of(batches, request.negative_prompt)
        repeats, given = request.num_images_per_prompt, (inputs.prompt_embeds, inputs.negative_prompt_embeds)
        embeds = image_rows([made[batch] for batch in batches] if given[0] is None else [given[0]], repeats)
        if self._plan.workload.guidance_passes == 1:
            return embeds, None
        return embeds, image_rows([made[batch] for batch in negatives] if given[1] is None else [given[1]], repeats)

    def _encode_batches(
        self, wanted: list[Batch], request: Request, made: dict[Batch, torch.Tensor], inputs: Inputs
    ) -> None:
        """Put the embeddings of each batch into ``made``, in as few passes over the weights as memory allows."""
        batches = [batch for batch in dict.fromkeys(wanted) if batch not in made]
        planned, length = self._plan.stage("encode"), request.max_sequence_length
        dtype_bytes = DTYPES[planned.compute_dtype].itemsize
        together = batches_a_pass(self._model.text_encoder, planned.batch_size, length, dtype_bytes)
        passes = [batches[at : at + together] for at in range(0, len(batches), together)]

        def attempt(stage: StagePlan, loaded: Callable[[], None]) -> None:
            missing = [[batch for batch in group if batch not in made] for group in passes]
            left = [group for group in missing if group]
            arguments = (self._folder, self._model, stage, self._device, self._event, self._weights, len(left))
            with closing(TextEncoder(*arguments)) as encoder:
                loaded()
                for group in left:
                    for batch, embeddings in zip(group, encoder.encode(group, length, self._stepped), strict=True):
                        made[batch] = embeddings
                        if inputs.on_encoded is not None:
                            inputs.on_encoded(batch, embeddings, self._plan)

        def begun() -> Begun:
            return begun_prompts(request, planned.batch_size, wanted, made)

        self._climb("encode", len(passes) * len(planned.block_placements), attempt, begun)

    def _reference(self, inputs: Inputs) -> References | None:
        """Every reference image's latents, once for all steps and images; they stay on the host until denoising."""
        if inputs.encoded_references is not None or not inputs.references:
            return inputs.encoded_references
        done: list[torch.Tensor] = []

        def attempt(stage: StagePlan, loaded: Callable[[], None]) -> None:
            with closing(ReferenceEncoder(self._folder, self._model, stage, self._device, self._weights)) as encoder:
                loaded()
                for picture in inputs.references[len(done) :]:
                    done.append(encoder.encode(picture, len(done) + 1))
                    self._stepped()

        self._climb("reference", len(inputs.references), attempt)
        return joined(done)

    def _denoise(
        self,
        request: Request,
        inputs: Inputs,
        embeds: torch.Tensor,
        negative: torch.Tensor | None,
        references: References | None,
    ) -> torch.Tensor:
        latents = inputs.latents
        if latents is None:
            latents = initial_latents(self._model, request, embeds.dtype, inputs.generators)
        noise = latents.to(embeds.dtype)
        progress = inputs.progress or Progress()
        self._under_way = UnderWay(noise, embeds, negative, progress, references)
        size = self._plan.stage("denoise").batch_size
        batches, steps = -(-request.num_images // size), request.num_inference_steps

        def stepped() -> None:
            """After the very last step nothing is left to go on with: decoding stops."""
            self._advanced()
            if progress.step < steps or len(progress.finished) < batches - 1:
                self._interruption.check()

        def finished(number: int, done: torch.Tensor) -> None:
            if inputs.on_batch is not None:
                inputs.on_batch(number, done, self._plan)

        def attempt(stage: StagePlan, loaded: Callable[[], None]) -> None:
            arguments = (self._folder, self._model, stage, request, self._device, self._event, self._weights)
            with closing(Denoiser(*arguments)) as denoiser:
                denoiser.denoise(
                    noise,
                    embeds,
                    negative,
                    progress=progress,
                    sigmas=inputs.sigmas,
                    references=references,
                    hook=inputs.hook,
                    on_loaded=loaded,
                    on_step=stepped,
                    on_batch=finished,
                )

        def begun() -> Begun:
            return begun_images(request.num_images, size, len(progress.finished), progress.step)

        left = (batches - len(progress.finished)) * steps - progress.step
        self._climb("denoise", left, attempt, begun)
        self._under_way = None
        stage = self._plan.stage("denoise")
        blocks = computed_blocks(stage.step_cache, steps, len(stage.block_placements), progress.skipped)
        measure = replace(self._outcome.measures[-1], skipped_steps=tuple(progress.skipped), computed_blocks=blocks)
        self._outcome.measures[-1] = measure
        return torch.cat(progress.finished)

    def _decode(self, request: Request, inputs: Inputs, packed: torch.Tensor) -> None:
        multiple, pictures = self._model.size_multiple, self._pictures

        def attempt(stage: StagePlan, loaded: Callable[[], None]) -> None:
            with closing(Decoder(self._folder, self._model, stage, self._device, self._weights)) as decoder:
                loaded()
                in_dtype = packed.to(DTYPES[stage.compute_dtype])
                latents = decoder.unpack(in_dtype, request.height // multiple, request.width // multiple)
                self._outcome.vae_latents = latents.to("cpu")
                if inputs.result == "pictures":
                    for index in range(len(pictures), len(latents)):
                        self._interruption.check()
                        picture = decoder.decode(latents[index : index + 1])
                        if inputs.on_picture is not None:
                            inputs.on_picture(index, picture, self._plan)
                        pictures.append(picture if inputs.keeps_pictures else torch.empty(0))
                        self._advanced()

        self._climb("decode", len(packed), attempt)
        if pictures and inputs.keeps_pictures:
            self._outcome.pictures = torch.cat(pictures)

    # ------------------------------------------------------------------------------------------------- recovery

    def _climb(
        self,
        name: Stage,
        total: int,
        attempt: Callable[[StagePlan, Callable[[], None]], None],
        begun: Callable[[], Begun] = Begun,
    ) -> None:
        """Run a stage, measured; when memory runs out, go on with the plan of the next lower peak.

        What ``attempt`` has finished stays with the caller, so no work is lost; ``begun`` says what that is.

        Raises:
            RunError: out of memory on the last rung.
        """
        with self._measured(name, total) as loaded:

            def mend(damage: EntryDamaged) -> None:
                if self._mend is None:
                    raise damage
                self._mend(self._plan.stage(name), damage)

            def tried() -> None:
                attempt(self._plan.stage(name), loaded)

            while (failure := failure_of(tried, mend, self._device)) is not None:
                release_memory(self._device, after_failure=True)
                lower = self._replan(self._plan, name, failure.resource)
                if lower is None:
                    raise RunError(last_rung(name, failure))
                words = rung_words(self._plan.stage(name), lower.stage(name))
                self._event(f"{name}: {failure.what} ({failure.details}); going on with {words}")
                self._plan = with_format_change(self._plan, lower, name, begun())

    # ------------------------------------------------------------------------------------------------ measuring

    def _event(self, text: str) -> None:
        self._outcome.events.append(text)
        self._observer.event(text)

    def _advanced(self) -> None:
        """A step, layer or picture is done."""
        self._moments.append(time.perf_counter())
        self._observer.advanced()

    def _stepped(self) -> None:
        """The same, where what is done may stop."""
        self._advanced()
        self._interruption.check()

    @contextmanager
    def _measured(self, stage: Stage, total: int) -> Iterator[Callable[[], None]]:
        """Meter a stage and free what it leaves. Yields a function to call once it has loaded."""
        self._observer.stage_started(stage, total)
        planned = self._plan.stage(stage)  # the ladder may lower it: what failed before counts too
        self._moments.clear()
        start = time.perf_counter()
        load_s = 0.0
        steps = ExitStack()

        def loaded() -> None:
            nonlocal load_s
            synchronize(self._device)
            load_s = time.perf_counter() - start
            steps.enter_context(self._interruption.steps())

        try:
            with measure(self._device, self._plan.hardware.context_bytes) as taken, steps:
                yield loaded
        finally:
            release_memory(self._device)
        over = overrun(planned, self._plan.hardware, self._plan.limits, taken.peak_ram_bytes, self._ram_before_bytes)
        if over is not None:
            self._event(over)
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
                step_s=median([later - earlier for earlier, later in pairwise(self._moments)] or [0.0]),
                disk_read_bytes=taken.disk_read_bytes,
            )
        )
        self._observer.stage_finished(stage)
