"""The Python entry point, with diffusers' names: ``Engine(model=...).generate(prompt=..., guidance_scale=...)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lowmem_flux2.errors import NotExecutable, UsageError
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning.adapters import LoraLike, lora_files
from lowmem_flux2.planning.job import AUTO, Machine, plan_job, replay, resolve_machine
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import Selection, StreamFrom
from lowmem_flux2.planning.references import Reference
from lowmem_flux2.planning.sources import ModelSource, check_revision, resolve_model
from lowmem_flux2.planning.workload import Preference, Request, image_seeds, make_request, spec_of
from lowmem_flux2.runtime import call
from lowmem_flux2.runtime.cache import prompt_cache_limit
from lowmem_flux2.runtime.denoise import Generators
from lowmem_flux2.runtime.device import torch_device
from lowmem_flux2.runtime.download import with_weights
from lowmem_flux2.runtime.generation import Generation, GenerationJob, carry_out, with_layers_of
from lowmem_flux2.runtime.images import OutputType
from lowmem_flux2.runtime.inputs import Inputs, check_inputs
from lowmem_flux2.runtime.interrupted_file import InterruptedRun, read_saved
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.latents_file import LatentImage, SavedLatents
from lowmem_flux2.runtime.observer import Observer, Silent
from lowmem_flux2.runtime.reference_images import pictures_of, prepare_references
from lowmem_flux2.runtime.resumption import Resumption
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.runtime.step_hook import StepCallback, StepHook
from lowmem_flux2.runtime.upsample import seed_of
from lowmem_flux2.runtime.vision import seen_of
from lowmem_flux2.units import whole_number

__all__ = ["Engine", "Generation"]


class Engine:
    """A model on a machine. Holds no weights between calls: every stage loads, runs and frees its own.

    Args:
        model: ``shapes``, ``flux2-dev``, ``flux2-klein-4b``, ..., a diffusers folder, a single file, or a hub id.
        profile: ``auto`` for this machine, a shipped profile's name, or a TOML file.
        device: ``auto``, ``cuda``, ``cuda:1`` or ``cpu``.
        dtype: compute dtype: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        prefer: ``quality``, ``balanced``, ``speed`` or ``memory``.
        weight_format, text_weight_format: stored format of the transformer's and the text encoder's weights.
        placement: ``auto``, or force all streamed blocks to ``resident``, ``pinned``, ``pageable`` or ``disk``.
        vae_tile: ``auto``, ``off`` or a side in pixels.
        step_cache: ``auto``, ``off``, ``fine``, ``fair``, ``coarse``, or as ``planning.step_caches`` reads it.
        batch_size: images denoised together; 0 lets the planner choose.
        max_vram, max_ram: caps, in bytes or as text (``"8GiB"``); CUDA's allocator enforces the first, the second binds
            the plan, and a run that exceeds it says so in ``report.events``.
        revision: hub revision.
        offline: never touch the network.
        cache_dir: where prepared weights are kept; else LOWMEM_FLUX2_CACHE, else the platform's cache folder.
        text_encoder, vae, tokenizer: for a single file: a file (not of a tokenizer), a folder, a name or a hub id that
            has them; else those of the released model of its shape.
        prompt_cache: bytes that embeddings of prompts may take on disk, or as text (``"2GiB"``, ``"off"``); else
            LOWMEM_FLUX2_PROMPT_CACHE, else 1 GiB.
        may_prepare: quantize weights into the store where a plan needs them; False raises instead.
        allow_format_change: when memory runs out and no plan with the same weight format has a lower peak, go on with a
            smaller format, which changes the picture; recorded in ``report.events`` and ``report.plan.format_changes``.
        loras: added to the transformer in every call that does not name its own: files, ``(file, scale)`` or
            ``"FILE:SCALE"``.
        observer: told about stages, steps and events.

    Raises:
        LowMemFlux2Error: see ``lowmem_flux2.errors``.
    """

    def __init__(
        self,
        model: str = "shapes",
        *,
        profile: str = AUTO,
        device: str = AUTO,
        dtype: str = AUTO,
        prefer: Preference = "balanced",
        weight_format: str = AUTO,
        text_weight_format: str = AUTO,
        placement: StreamFrom = "auto",
        vae_tile: str | int = AUTO,
        step_cache: str = AUTO,
        batch_size: int = 0,
        max_vram: int | str | None = None,
        max_ram: int | str | None = None,
        revision: str | None = None,
        offline: bool = False,
        cache_dir: str | Path | None = None,
        text_encoder: str | None = None,
        vae: str | None = None,
        tokenizer: str | None = None,
        prompt_cache: int | str | None = None,
        may_prepare: bool = True,
        allow_format_change: bool = False,
        loras: Sequence[LoraLike] = (),
        observer: Observer | None = None,
    ) -> None:
        self._selection = Selection(
            prefer=prefer,
            weight_format=weight_format,
            text_weight_format=text_weight_format,
            dtype=dtype,
            placement=placement,
            vae_tile=str(vae_tile),
            step_cache=step_cache,
            batch_size=whole_number("batch_size", batch_size),
            max_vram_bytes=call.size_of("max_vram", max_vram),
            max_ram_bytes=call.size_of("max_ram", max_ram),
        )
        cache = Path(cache_dir) if cache_dir is not None else None
        self._source = resolve_model(
            model,
            revision=revision,
            offline=offline,
            text_encoder=text_encoder,
            vae=vae,
            tokenizer=tokenizer,
            cache=cache,
        )
        check_revision(self._source, revision)
        self._machine = resolve_machine(profile, device, self._selection.max_ram_bytes)
        self._running = Running(
            device=self._machine.device_name,
            cache=cache_folder(cache),
            prompt_cache_bytes=prompt_cache_limit(prompt_cache),
            offline=offline,
            may_prepare=may_prepare,
            allow_format_change=allow_format_change,
        )
        self._observer = observer or Silent()
        self._loras = lora_files(loras)

    @classmethod
    def of(
        cls, source: ModelSource, machine: Machine, selection: Selection, running: Running, observer: Observer
    ) -> Engine:
        """An engine from what has been resolved already, as the command line does before it imports torch."""
        engine = cls.__new__(cls)
        engine._source, engine._machine, engine._selection = source, machine, selection
        engine._running, engine._observer = running, observer
        engine._loras = ()
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back. Nothing is held between calls, so this is a no-op kept for ``with``."""

    @property
    def source(self) -> ModelSource:
        return self._source

    @property
    def machine(self) -> Machine:
        return self._machine

    def plan(self, request: Request) -> Plan:
        """The plan for a request, made before anything is loaded. Raises DoesNotFit."""
        return plan_job(self._of(request), self._machine, request, self._selection, running=True)

    def _of(self, request: Request) -> ModelSource:
        """The source as the request takes it: it may tap other layers of the text encoder."""
        return replace(self._source, spec=spec_of(self._source.spec, request.text_encoder_out_layers))

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        references: tuple[Reference, ...] = (),
        loras: Sequence[LoraLike] | None = None,
        caption_upsample_temperature: float | None = None,
    ) -> Request:
        """A checked request with the model's defaults. Sizes are rounded down, with a warning, as in diffusers."""
        multiple = self._source.spec.size_multiple
        return make_request(
            self._source.spec,
            call.prompts_of(prompt),
            negative_prompt=negative_prompt,
            width=call.rounded("width", width, multiple),
            height=call.rounded("height", height, multiple),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            references=references,
            loras=self._loras if loras is None else lora_files(loras),
            caption_upsample_temperature=caption_upsample_temperature,
        )

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: object = None,
        image_size: int | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        seed: int | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
        caption_upsample_temperature: float | None = None,
        loras: Sequence[LoraLike] | None = None,
        plan: Plan | None = None,
        save_latents: str | Path | None = None,
        from_latents: str | Path | SavedLatents | InterruptedRun | None = None,
        interruption: Interruption | None = None,
    ) -> Generation:
        """Make pictures. Arguments as in diffusers' Flux2Pipeline and Flux2KleinPipeline, ours after the callback.

        A KeyboardInterrupt passes through at once: weights are freed, no file is half-written, what was denoised is
        lost. With ``interruption`` it is not: see there.

        Args:
            image: reference images, up to ten: a PIL image, a path, an array (h, w, channels) or a tensor
                (channels, h, w) in [0, 1] or in 8 bits, a batch of these, or a list.
            image_size: reduces them to at most so many pixels squared; 1024 if not given, as the stock pipelines do.
            return_dict: False returns the stock tuple, ``(images,)``, for callers that unpack it.
            attention_kwargs: ``scale`` multiplies the scales of all LoRAs.
            text_encoder_out_layers: hidden states that the prompts' embeddings are made of; None for the model's own.
            callback_on_step_end: see ``runtime.step_hook.StepCallback``.
            seed: image i uses a generator of its own with ``seed + i``; drawn at random where neither seed, generator
                nor latents are given. Every seed is in the result.
            loras: in place of the engine's own: files, ``(file, scale)`` or ``"FILE:SCALE"``; ``()`` for none.
            plan: carry this plan out instead of making one.
            save_latents: write the denoised latents there before decoding; never over a file that is there.
            from_latents: decode such a file, or the ``latents`` of a ``DecodeFailed``, and nothing else; only the VAE
                is loaded. Or go on with the ``run`` of an ``Interrupted``, or the file of one, after
                its last step. All arguments but ``output_type``, ``interruption`` and, for such a run,
                ``callback_on_step_end`` are its own.
            interruption: stops the run after the step under way when it is asked to, by SIGINT or by the caller.

        Raises:
            UsageError: arguments that contradict each other or cannot be honoured.
            Interrupted: as ``interruption`` asked; its ``run`` is what to go on with.
            DecodeFailed: the latents are done, and in the exception, but no picture could be made of them.
            DoesNotFit, CheckpointError, RunError: see ``lowmem_flux2.errors``.
        """
        hook = StepHook.of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if from_latents is not None:
            asked = (prompt, image, image_size, negative_prompt, height, width, num_inference_steps, sigmas)
            given = (guidance_scale, generator, seed, latents, prompt_embeds, negative_prompt_embeds, plan)
            others = (attention_kwargs, text_encoder_out_layers)
            several = None if num_images_per_prompt == 1 else num_images_per_prompt
            files = (save_latents, max_sequence_length, several, loras, caption_upsample_temperature)
            call.check_alone(*asked, *given, *others, *files)
            saved, name = from_latents, "the latents"
            if isinstance(saved, str | Path):
                saved, name = read_saved(Path(saved)), str(saved)
            if isinstance(saved, SavedLatents) and callback_on_step_end is not None:
                raise UsageError("from_latents: these are denoised, so that no step calls back: leave out the callback")
            hooks = Inputs(hook=hook, interruption=interruption)
            return call.returned(self.resume(saved, name, output_type, hooks), return_dict)
        call.check_together(prompt, prompt_embeds, generator, seed, latents, output_type, plan)
        schedule = call.sigmas_of(sigmas)
        if schedule is not None and num_inference_steps is None:
            num_inference_steps = len(schedule)
        if caption_upsample_temperature and prompt is None:
            raise UsageError("caption_upsample_temperature: there is no prompt to upsample, only its embeddings")
        if prompt is None:
            texts = (prompt_embeds, negative_prompt_embeds, max_sequence_length)
            prompt, max_sequence_length = call.in_place_of_prompts(self._source.spec, guidance_scale, *texts)
        opened = None if image is None else pictures_of(image)
        references, pictures = prepare_references(opened, self._source.spec.size_multiple, image_size)
        request = self.request(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            references=references,
            loras=loras,
            caption_upsample_temperature=caption_upsample_temperature,
        )
        scale = call.lora_scale(attention_kwargs, request.loras)
        request = replace(
            request,
            loras=tuple(replace(lora, scale=lora.scale * scale) for lora in request.loras),
            text_encoder_out_layers=call.layers_of(text_encoder_out_layers),
        )
        seeds: tuple[int | None, ...] = (None,) * request.num_images
        if generator is None and latents is None:
            seeds = tuple(image_seeds(seed, request.num_images))
        inputs = Inputs(
            generators=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            sigmas=schedule,
            hook=hook,
            references=pictures,
            interruption=interruption,
            seen=seen_of(request, [picture for _, picture in opened or ()]),
        )
        check_inputs(self._source.spec, request, inputs)
        if plan is not None:
            plan = replay(plan, self._of(request), self._machine, request, "the given plan", self._selection)
        file = None if save_latents is None else Path(save_latents)
        made = self.run(request, plan or self.plan(request), inputs, seeds, output_type, file)
        return call.returned(made, return_dict)

    def resume(
        self,
        saved: SavedLatents | InterruptedRun,
        name: str = "the latents",
        output_type: OutputType = "pil",
        hooks: Inputs | None = None,
        save_latents: Path | None = None,
    ) -> Generation:
        """Go on with saved latents: decode them, or take the steps that are missing first.

        Args:
            name: what to call them in messages.
            hooks: ``on_picture``, whose number is that of the row in ``saved``, ``hook``, ``interruption``.
            save_latents: where those of an interrupted run are saved before they are decoded.

        Raises:
            UsageError: latents of a model with another VAE, or another transformer.
            DoesNotFit, CheckpointError, RunError: as ``generate``.
        """
        plan = self.plan_resume(saved, name)
        job = Resumption(saved, name).job(plan, output_type, hooks or Inputs())
        return self._carry_out(replace(job, save_latents=save_latents))

    def plan_resume(self, saved: SavedLatents | InterruptedRun, name: str = "the latents") -> Plan:
        """The plan that ``resume`` carries out."""
        return Resumption(saved, name).plan(self._of(saved.origin.request), self._machine, self._selection)

    def run(
        self,
        request: Request,
        plan: Plan,
        inputs: Inputs,
        seeds: Sequence[int | None],
        output_type: OutputType = "pil",
        save_latents: Path | None = None,
    ) -> Generation:
        """Carry a plan out for a request that is already checked. Images with a seed get a generator of their own."""
        numbers = [number for number in seeds if number is not None]
        if numbers:
            inputs = replace(inputs, generators=[torch.Generator().manual_seed(number) for number in numbers])
        if request.caption_upsample_temperature is not None:
            inputs = replace(inputs, upsample_seed=seed_of(inputs.generators))
        prompts = [text for text in request.prompts for _ in range(request.num_images_per_prompt)]
        images = tuple(LatentImage(at, *pair) for at, pair in enumerate(zip(seeds, prompts, strict=True)))
        return self._carry_out(GenerationJob(request, plan, inputs, images, output_type, save_latents))

    def _carry_out(self, job: GenerationJob) -> Generation:
        # Before a download of many gigabytes, or the preparing of what cannot run.
        torch_device(self._running.device)
        if job.plan.not_executable:
            missing = "; ".join(job.plan.not_executable)
            raise NotExecutable(f"this plan needs what this version cannot carry out yet: {missing}")
        self._source = with_weights(self._source, offline=self._running.offline)
        source = with_layers_of(self._of(job.request), job, self._running.offline)
        return carry_out(job, source, self._running, self._observer)
