"""The denoise stage: an explicit loop over diffusers' own FLUX.2 blocks, bit-equal to the stock forward.

Timestep, guidance and text conditioning are computed once, before any block is loaded, and their weights (1.38 GiB on
dev) dropped. Batches of equal size share it, those of equal texts what is projected, and all of them the RoPE tables.
Then each step runs ``for block in streamer.round()``; both guidance passes go through a block while its weights are
there, so true guidance costs no second transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.chunks import chunk_bounds
from lowmem_flux2.planning.linears import CONDITIONING, is_conditioning
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.step_caches import parse_step_cache
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.runtime.adapters import AttachedAdapters
from lowmem_flux2.runtime.components import transformer_blocks, transformer_on_meta
from lowmem_flux2.runtime.device import DTYPES, release_memory
from lowmem_flux2.runtime.forward import Forward, StepConditioning
from lowmem_flux2.runtime.layout import load_module, unbind
from lowmem_flux2.runtime.reference_keys import ReferenceKeys, keep_references
from lowmem_flux2.runtime.references import References
from lowmem_flux2.runtime.step_cache import Reuse, reuse
from lowmem_flux2.runtime.step_hook import StepHook
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.weights import Weights

Generators = torch.Generator | Sequence[torch.Generator] | None

EVERY_STEP = ("x_embedder", "norm_out", "proj_out")


def initial_latents(model: ModelSpec, request: Request, dtype: torch.dtype, generators: Generators) -> torch.Tensor:
    """Noise (images, channels, height, width), a row a packed latent, on the host, drawn as the stock pipelines do.

    Raises:
        UsageError: a list of generators that is not one for each image.
    """
    multiple = model.size_multiple
    shape = (
        request.num_images,
        model.transformer.in_channels,
        request.height // multiple,
        request.width // multiple,
    )
    if isinstance(generators, Sequence):
        if len(generators) != request.num_images:
            raise UsageError(f"{len(generators)} generators for {request.num_images} images: one each, or a single one")
        generators = list(generators)
    first = generators[0] if isinstance(generators, list) else generators
    # A CUDA generator draws on its GPU, as it does in the stock pipelines.
    device = torch.device("cpu") if first is None else first.device
    noise: torch.Tensor = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
    return noise.to("cpu")


@dataclass(slots=True)
class Progress:
    """How far denoising has come: packed latents of finished batches, and of the batch under way after ``step`` steps.

    Kept by the caller, so that another Denoiser goes on where one ran out of memory. What the step cache keeps of the
    batch under way is in ``reuse``, or as it was read from a file still in ``saved``; ``skipped`` are the steps of each
    finished batch that it stood for. ``embeds`` are the prompts' of the batch under way where a step's hook has put
    others in their place.
    """

    finished: list[torch.Tensor] = field(default_factory=list)
    latents: torch.Tensor | None = None
    step: int = 0
    reuse: Reuse | None = None
    skipped: list[tuple[int, ...]] = field(default_factory=list)
    saved: Mapping[str, torch.Tensor] = field(default_factory=dict)
    embeds: torch.Tensor | None = None

    @property
    def kept(self) -> Mapping[str, torch.Tensor]:
        """What the step cache keeps of the batch under way, wherever it is."""
        return self.saved if self.reuse is None else self.reuse.tensors()


class Denoiser:
    """The transformer of one checkpoint, its blocks placed by the plan."""

    forward_type: type[Forward] = Forward

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        stage: StagePlan,
        request: Request,
        device: torch.device,
        warn: Callable[[str], None],
        weights: Weights,
    ) -> None:
        self._model = model
        self._stage = stage
        self._request = request
        self._device = device
        self._dtype = DTYPES[stage.compute_dtype]
        self._warn = warn
        self._weights = weights
        self._transformer = transformer_on_meta(folder / "transformer")
        if model.caches_references:
            keep_references(self._transformer)
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        self._forward = self.forward_type(
            self._transformer,
            self._dtype,
            device,
            request.guidance_scale,
            request.num_inference_steps,
            partial(chunk_bounds, chunk_tokens=stage.chunk_tokens) if stage.chunk_tokens else None,
        )
        self._adapters = AttachedAdapters(request.loras, model, weights, self._dtype, device)
        self._streamer: BlockStreamer | None = None
        self._interrupt = False
        self._ropes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._resting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._files = weights.open("transformer")  # last: nothing after it can fail and leave it open

    @torch.no_grad()
    def denoise(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_embeds: torch.Tensor | None,
        *,
        references: References | None = None,
        progress: Progress | None = None,
        sigmas: Sequence[float] | None = None,
        hook: StepHook | None = None,
        on_loaded: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
        on_batch: Callable[[int, torch.Tensor], None] = lambda _number, _latents: None,
    ) -> torch.Tensor:
        """Run all steps for all images, batch by batch in the plan's composition.

        Args:
            latents: initial noise (images, channels, height, width), host.
            prompt_embeds: (images, tokens, joint_dim), host; one row an image.
            negative_embeds: the same for the second guidance pass, or None.
            references: of every image, joined to its tokens at each step.
            progress: where to go on, and kept up to date at each step; None starts from the noise.
            hook: called after each step.

        Returns:
            Packed latents (images, height * width, channels) on the host.

        Raises:
            NonFiniteLatents: names the step and the first block whose output is not finite.
        """
        progress = progress or Progress()
        size = self._stage.batch_size
        batches = [slice(at, at + size) for at in range(0, len(latents), size)]
        timesteps = self._timesteps(latents, sigmas)
        left = batches[len(progress.finished) :]
        self._adapters.attach(self._transformer, is_conditioning)
        self._load_conditioning()
        moments = {
            size: self._moments(size, latents.dtype, timesteps) for size in {len(latents[each]) for each in left}
        }
        keeps = references is not None and self._model.caches_references
        self._resting = {size: self._modulations_at_rest(size) for size in moments} if keeps else {}
        projected = self._projected(
            [embeds[batch] for embeds in (prompt_embeds, negative_embeds) if embeds is not None for batch in left]
        )
        texts_of = [projected[number :: len(left)] for number in range(len(left))]
        del projected
        self._adapters.detach()
        self._drop(CONDITIONING)
        again = int(keeps and progress.step > 0)  # what was kept is made once more
        self._load_blocks(len(left) * len(timesteps) - progress.step + again)
        on_loaded()
        self._ropes.clear()
        for batch, texts in zip(left, texts_of, strict=True):
            steps = moments[len(latents[batch])]
            embeds = prompt_embeds[batch] if hook is None else prompt_embeds[batch].clone()  # it may write to them
            done = self._run(
                latents[batch], references, progress, timesteps, sigmas, steps, texts, embeds, hook, on_step
            )
            progress.finished.append(done)
            progress.skipped.append(tuple(sorted(progress.reuse.skipped)) if progress.reuse is not None else ())
            progress.latents, progress.step, progress.reuse, progress.embeds = None, 0, None, None
            on_batch(len(progress.finished) - 1, done)
        return torch.cat(progress.finished)

    @property
    def interrupt(self) -> bool:
        """Whether a step's hook wants no more steps of the batch under way: what there is becomes its pictures."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, wanted: bool) -> None:
        self._interrupt = wanted

    def close(self) -> None:
        self._adapters.detach()
        if self._streamer is not None:
            self._streamer.close()
        unbind(self._transformer)
        self._files.close()

    # --------------------------------------------------------------------------------------------- preparation

    def _timesteps(self, latents: torch.Tensor, sigmas: Sequence[float] | None) -> torch.Tensor:
        """The pipelines' own schedule: linear sigmas, shifted by an empirical function of tokens and steps."""
        steps = self._request.num_inference_steps
        schedule: object = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        if getattr(self._scheduler.config, "use_flow_sigmas", False):
            schedule = None
        tokens = latents.shape[-1] * latents.shape[-2]
        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
        timesteps: torch.Tensor
        timesteps, _ = retrieve_timesteps(self._scheduler, steps, self._device, sigmas=schedule, mu=mu)
        return timesteps

    def _load_conditioning(self) -> None:
        for name in CONDITIONING:
            child = self._transformer.get_submodule(name)
            if next(child.parameters()).is_meta:
                load_module(child, f"{name}.", self._files, self._dtype, self._device)

    def _moments(self, batch: int, latents_dtype: torch.dtype, timesteps: torch.Tensor) -> list[StepConditioning]:
        """Embed every timestep for batches of one size, one at a time in the stock forward's own shapes and dtypes."""
        net = self._transformer
        guidance = None
        if self._model.transformer.guidance_embeds:
            scale = torch.full([1], self._request.guidance_scale, device=self._device, dtype=torch.float32)
            guidance = scale.expand(batch).to(self._dtype) * 1000
        steps = []
        for moment in timesteps:
            timestep = moment.expand(batch).to(latents_dtype) / 1000
            embedding = net.time_guidance_embed(timestep.to(self._dtype) * 1000, guidance)
            steps.append(
                StepConditioning(
                    embedding,
                    net.double_stream_modulation_img(embedding),
                    net.double_stream_modulation_txt(embedding),
                    net.single_stream_modulation(embedding),
                )
            )
        return steps

    def _modulations_at_rest(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of references that are kept, as if at timestep 0: in double-stream blocks, and in single-stream ones."""
        net = self._transformer
        embedding = net.time_guidance_embed(torch.zeros(batch, dtype=self._dtype, device=self._device), None)
        return net.double_stream_modulation_img(embedding), net.single_stream_modulation(embedding)

    def _projected(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each batch's projected text; equal ones are one tensor: of one prompt's images, and of negative prompts."""
        distinct: list[tuple[torch.Tensor, torch.Tensor]] = []
        made: list[torch.Tensor] = []
        for embeds in given:
            text = next((text for known, text in distinct if self._are_equal(known, embeds)), None)
            if text is None:
                text = self._transformer.context_embedder(embeds.to(self._device, self._dtype))
                distinct.append((embeds, text))
            made.append(text)
        return made

    def _are_equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and torch.equal(one, other)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            unbind(self._transformer.get_submodule(name))
        release_memory(self._device)  # else what they held stays reserved, in pieces too small for the arena

    def _load_blocks(self, rounds: int) -> None:
        net = self._transformer
        for name in EVERY_STEP:
            load_module(net.get_submodule(name), f"{name}.", self._files, self._dtype, self._device)
        self._streamer = self._weights.streamer(
            self._stage, transformer_blocks(net), self._files, self._device, rounds, self._warn
        )
        # After the streamer, which puts quantized Linears in the place of others.
        self._adapters.attach(net, lambda linear: not is_conditioning(linear))

    # --------------------------------------------------------------------------------------------------- steps

    def _projected_anew(self, embeds: torch.Tensor) -> torch.Tensor:
        """Between two steps, when no block's activations are there, its embedder is there for a moment."""
        name = "context_embedder"
        embedder = self._transformer.get_submodule(name)
        load_module(embedder, f"{name}.", self._files, self._dtype, self._device)
        with self._adapters.attached(self._transformer, lambda linear: linear == name):
            text: torch.Tensor = embedder(embeds.to(self._device, self._dtype))
        unbind(embedder)
        return text

    def _rope(self, text: torch.Tensor, image_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of so many tokens; all images of a run are alike in their own and their references'."""
        tokens = (text.shape[1], image_ids.shape[1])
        if tokens not in self._ropes:
            self._ropes[tokens] = self._forward.rope(text, image_ids)
        return self._ropes[tokens]

    def _run(
        self,
        noise: torch.Tensor,
        references: References | None,
        progress: Progress,
        timesteps: torch.Tensor,
        sigmas: Sequence[float] | None,
        steps: Sequence[StepConditioning],
        texts: Sequence[torch.Tensor],
        embeds: torch.Tensor,
        hook: StepHook | None,
        on_step: Callable[[], None],
    ) -> torch.Tensor:
        """All steps of one batch; (B, channels, height, width) -> packed (B, tokens, channels), host."""
        image_ids = Flux2Pipeline._prepare_latent_ids(noise).to(self._device)
        beside = keys = None
        if references is not None:
            reference_ids = references.ids.to(self._device).expand(len(noise), -1, -1)
            beside = references.latents.to(self._device, self._dtype).repeat(len(noise), 1, 1)
            if self._model.caches_references:
                rope = self._rope(texts[0], torch.cat([reference_ids, image_ids], dim=1))
                keys = ReferenceKeys(self._transformer, beside, self._resting[len(noise)], rope)
                beside = None
            else:
                image_ids = torch.cat([image_ids, reference_ids], dim=1)
        self._interrupt = False
        latents = progress.latents
        if latents is None:
            latents = Flux2Pipeline._pack_latents(noise)
        latents = latents.to(self._device)  # those of an interrupted run come from its file
        own = latents.shape[1]
        kept = progress.reuse
        if kept is None:
            kept = progress.reuse = reuse(parse_step_cache(self._stage.step_cache), len(steps), own)
            kept.restore({name: tensor.to(self._device) for name, tensor in progress.saved.items()})
            progress.saved = {}
        streamer = self._streamer
        assert streamer is not None
        passes = [self._forward.start(text, self._rope(text, image_ids)) for text in texts]
        if progress.embeds is not None:
            embeds = progress.embeds
            passes[0] = self._forward.start(self._projected_anew(embeds), passes[0].rope)
        self._timesteps(noise, sigmas)  # rewinds the scheduler
        self._scheduler.set_begin_index(progress.step)
        for index in range(progress.step, len(steps)):
            moment, conditioning = timesteps[index], steps[index]
            tokens = latents if beside is None else torch.cat([latents, beside], dim=1)
            compute = partial(self._forward.predict, streamer, tokens, passes, conditioning, keys=keys)
            if keys is not None and not keys.are_there and index > 0:
                compute()  # of a run that goes on, whose first step is over: fills them
            prediction = kept.predict(index, compute, streamer.skip)[:, :own]
            advanced = self._scheduler.step(prediction, moment, latents, return_dict=False)[0]
            if not bool(torch.isfinite(advanced).all()):
                was_skipped = index in kept.skipped
                self._forward.explain_non_finite(streamer, index, tokens, passes, conditioning, was_skipped, keys)
            latents = advanced
            if hook is not None:
                given = {"latents": advanced, "prompt_embeds": embeds}
                writes = advanced._version, embeds._version  # how often each was written
                latents, left = hook(self, index, moment, given)
                is_same_text = left is embeds and embeds._version == writes[1]
                if not is_same_text:
                    progress.embeds = embeds = left
                    passes[0] = self._forward.start(self._projected_anew(embeds), passes[0].rope)
                if latents is not advanced or advanced._version != writes[0] or not is_same_text:
                    kept.forget()
            progress.latents, progress.step = latents, index + 1
            on_step()
            if self._interrupt:
                break
        finished: torch.Tensor = latents.to("cpu")
        return finished
