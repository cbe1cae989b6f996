"""From a plan to pictures: what the plan needs is fetched, the executor runs, and what it made is handed back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowmem_flux2.errors import DecodeFailed, Interrupted, LowMemFlux2Error
from lowmem_flux2.planning.adapter_file import read_adapter
from lowmem_flux2.planning.detect import identify
from lowmem_flux2.planning.ladder import Resource, next_format, next_rung
from lowmem_flux2.planning.models import OUT_LAYERS
from lowmem_flux2.planning.plan import Plan, Stage, StagePlan
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.report import Report
from lowmem_flux2.runtime.cache import EntryDamaged
from lowmem_flux2.runtime.device import torch_device
from lowmem_flux2.runtime.download import with_whole_text_encoder
from lowmem_flux2.runtime.executor import Executor
from lowmem_flux2.runtime.images import OutputType, images_of
from lowmem_flux2.runtime.inputs import UNDENOISED, Inputs
from lowmem_flux2.runtime.interrupted_file import InterruptedRun, check_interrupted, interrupted_run
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.latents_file import LatentImage, SavedLatents, check_latents, saved_latents
from lowmem_flux2.runtime.observer import Observer
from lowmem_flux2.runtime.pinning import Pinning
from lowmem_flux2.runtime.prepared import at_hand, prepared_store, prepared_stores
from lowmem_flux2.runtime.prompt_cache import PromptCache, with_known_prompts
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.runtime.versions import versions
from lowmem_flux2.runtime.weights import CheckpointWeights


@dataclass(frozen=True, slots=True)
class Generation:
    """What ``generate`` returns.

    Attributes:
        images: by ``output_type`` a list of PIL images, an array (n, h, w, 3) or tensor (n, 3, h, w) in [0, 1], or
            latents.
        seeds: seed of each image; None where the caller gave generators or latents.
        report: predicted beside measured.
        latents_file: where the latents were saved, if that was asked for.
    """

    images: Any
    seeds: tuple[int | None, ...]
    report: Report
    latents_file: Path | None = None


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """What is to be made: a checked request, its plan, and what the caller hands over.

    Args:
        images: one for each picture.
        save_latents: where the denoised latents are saved before they are decoded.
        resumed: latents of an earlier run, which ``inputs`` and ``images`` are of; then the plan is to decode alone.
        interrupted: where an earlier run of the same request and plan stopped, which ``inputs`` are of.
        resumed_name: what to call either in messages.
    """

    request: Request
    plan: Plan
    inputs: Inputs
    images: tuple[LatentImage, ...]
    output_type: OutputType
    save_latents: Path | None = None
    resumed: SavedLatents | None = None
    interrupted: InterruptedRun | None = None
    resumed_name: str = ""


def with_layers_of(source: ModelSource, job: GenerationJob, offline: bool) -> ModelSource:
    """The source with those of its text encoder's layers that the job needs and that a download may have left out.

    Raises:
        CheckpointMissing, CheckpointAccess, DoesNotFit: as ``with_weights``.
    """
    is_upsampled = job.request.caption_upsample_temperature is not None and job.inputs.prompt_embeds is None
    text = source.spec.text_encoder
    is_deep = text.layers_used > max(OUT_LAYERS[text.architecture])
    if not (is_upsampled or is_deep) or job.resumed is not None or job.interrupted is not None:
        return source
    return with_whole_text_encoder(source, offline=offline, sees=is_upsampled and bool(job.request.references))


def carry_out(job: GenerationJob, source: ModelSource, running: Running, observer: Observer) -> Generation:
    """Carry a plan out, for a model with weights.

    Raises:
        DecodeFailed: with the latents, which were done.
        Interrupted: as ``job.inputs.interruption`` asked; with what was done, if denoising had begun.
        LowMemFlux2Error: whatever else went wrong.
    """
    assert source.folder is not None
    events: list[str] = []
    written: list[Path] = []

    def event(text: str) -> None:
        events.append(text)
        observer.event(text)

    plan, inputs = job.plan, job.inputs
    if job.output_type == "latent":
        # The stock pipelines differ here: dev returns packed latents, klein denormalised and unpatchified ones.
        inputs = replace(inputs, result="packed_latents" if source.spec.form == "dev" else "vae_latents")
    if job.interrupted is not None:
        check_interrupted(job.interrupted, source, job.resumed_name)
    images = job.images

    def upsampled(prompts: tuple[str, ...]) -> None:
        nonlocal images
        repeats = job.request.num_images_per_prompt
        images = tuple(
            replace(image, upsampled_prompt=prompts[at // repeats], upsample_seed=job.inputs.upsample_seed)
            for at, image in enumerate(images)
        )
        if job.inputs.on_upsampled is not None:
            job.inputs.on_upsampled(prompts)

    inputs = replace(inputs, on_upsampled=upsampled)
    is_upsampled = job.request.caption_upsample_temperature is not None
    if inputs.packed is None and running.prompt_cache_bytes and not is_upsampled:
        device = torch_device(running.device)
        cache = PromptCache.of(source, plan, device, running.cache, running.prompt_cache_bytes, event)
        plan, inputs = with_known_prompts(cache, source, plan, job.request, inputs)
    guidance, denoises = job.request.guidance_scale, inputs.packed is None and inputs.result not in UNDENOISED
    if denoises and source.spec.is_distilled and guidance not in (1, source.spec.defaults.guidance_scale):
        event(f"guidance {guidance:g} has no effect on {source.spec.name}: it is distilled")
    for lora in () if job.resumed is not None else job.request.loras:
        if (left_out := read_adapter(lora, source.spec).warning) is not None:
            event(left_out)
    stores = prepared_stores(plan, source, running, observer, event)
    mended: set[tuple[str, str]] = set()
    weights = CheckpointWeights(source.folder, stores, Pinning.of(plan))
    if job.resumed is not None:
        check_latents(job.resumed, source, weights, job.resumed_name)

    def replan(current: Plan, stage: Stage, resource: Resource) -> Plan | None:
        lower = next_rung(current, stage, source.spec, resource=resource)
        if lower is None and stage != "decode" and running.allow_format_change:
            lower = next_format(current, stage, source.spec, at_hand(current.stage(stage), source, running), resource)
            if lower is not None:
                stores.update(prepared_stores(lower, source, running, observer, event))
        return lower

    def mend(stage: StagePlan, damage: EntryDamaged) -> None:
        fault = (stage.stage, damage.what)
        if fault in mended:  # just made: whatever damages it would do so again
            raise damage
        mended.add(fault)
        stores[stage.prepared_as] = prepared_store(stage, source, running, observer, event, damage)

    def saved(packed: torch.Tensor, carried_out: Plan) -> SavedLatents:
        return job.resumed or saved_latents(source, job.request, carried_out, images, packed, weights)

    def save(packed: torch.Tensor, carried_out: Plan) -> None:
        assert job.save_latents is not None
        try:
            written.append(saved(packed, carried_out).save(job.save_latents))
        except OSError as error:  # the pictures are still to be had
            event(f"the latents could not be saved in {job.save_latents}: {error}")

    if job.save_latents is not None:
        inputs = replace(inputs, on_latents=save)
    executor = Executor(plan, source.spec, source.folder, running.device, observer, weights, replan, mend)
    try:
        with _keeping_what_is_done(executor, inputs.interruption):
            outcome = executor.run(job.request, inputs)
    except (LowMemFlux2Error, OSError) as error:
        if executor.undecoded is not None:
            done, packed = executor.undecoded
            raise DecodeFailed(error, saved(packed, executor.plan).after(done), next(iter(written), None)) from error
        if isinstance(error, Interrupted) and executor.under_way is not None:
            sigmas = None if inputs.sigmas is None else tuple(inputs.sigmas)
            arguments = (source, job.request, executor.plan, images, executor.under_way, sigmas)
            raise Interrupted(str(error), interrupted_run(*arguments)) from error
        raise
    report = Report(
        executor.plan,
        tuple(outcome.measures),
        (*events, *outcome.events),
        tuple(image.record() for image in images),
        versions(),
        cached_prompts=tuple(dict.fromkeys(prompt for batch in inputs.known for prompt in batch)),
        machine=identify(running.device),
        spec=source.spec,
        references=job.request.references,
    )
    seeds = tuple(image.seed for image in job.images)
    return Generation(images_of(outcome, source.spec, job.output_type), seeds, report, next(iter(written), None))


@contextmanager
def _keeping_what_is_done(executor: Executor, interruption: Interruption | None) -> Iterator[None]:
    """A KeyboardInterrupt between stages or while weights are loaded, or with denoised latents, loses none of them.

    Only for a caller who asks for interruption; for another it is what it always is.

    Raises:
        Interrupted: in place of that KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if interruption is None or (interruption.is_asked and executor.undecoded is None):
            raise
        raise Interrupted("interrupted") from error
