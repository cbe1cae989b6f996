"""Makes a batch by its manifest: all prompts encoded, all images denoised, all decoded, from wherever it was.

Prompts are upsampled before, where that is asked for.

The manifest is replaced after each denoised batch and each picture, when what it then says is on disk. Images that were
under way when the process was killed begin again with the same seeds; those that Ctrl-C stopped go on at their step.
Either way its composition is the manifest's, so that the bits are those of an unbroken run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowmem_flux2.errors import DecodeFailed, Interrupted, RunError
from lowmem_flux2.planning.batches import Batch, negatives_of, prompt_batches
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.report import ImageRecord, Report
from lowmem_flux2.runtime.denoise import Progress
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.engine import Engine
from lowmem_flux2.runtime.images import to_pil
from lowmem_flux2.runtime.inputs import Inputs
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.manifest import Group, ImageState, Manifest, StoppedBatch, parts_of, write_manifest
from lowmem_flux2.runtime.parts import Denoised, Parts
from lowmem_flux2.runtime.picture import describe, png_bytes
from lowmem_flux2.runtime.reference_images import load_references
from lowmem_flux2.runtime.store import content_fingerprint
from lowmem_flux2.runtime.versions import versions
from lowmem_flux2.runtime.vision import seen_of

COMPONENTS = ("text_encoder", "transformer", "vae")


def fingerprints(folder: Path) -> dict[str, str]:
    """Of what is in each component's files, so that a copy of the model goes on with a batch."""
    return {name: content_fingerprint(folder, name) for name in COMPONENTS}


@dataclass(frozen=True, slots=True)
class BatchHooks:
    """What a batch asks and tells.

    Args:
        event: told of warnings.
        saved: told of each picture: its file and seed.
        upsampled: told of the prompts that the text encoder made.
        metadata: whether pictures say how they were made.
    """

    event: Callable[[str], None]
    saved: Callable[[Path, int], None]
    upsampled: Callable[[tuple[str, ...]], None] = lambda _prompts: None
    metadata: bool = True


class BatchRun:
    """One process's part in making a batch."""

    def __init__(
        self, manifest: Manifest, path: Path, engine: Engine, interruption: Interruption, hooks: BatchHooks
    ) -> None:
        self.manifest = manifest
        self._path = path
        self._engine = engine
        self._interruption = interruption
        self._hooks = hooks
        self._parts = Parts(parts_of(path))
        self._reports: dict[int, list[Report]] = {}
        self._made: dict[int, list[ImageRecord]] = {}

    @property
    def reports(self) -> list[Report]:
        """One a group that this process had something to do for: its stages, and the pictures that it saved."""
        return [
            replace(
                reports[0],
                plan=reports[-1].plan,
                stages=tuple(stage for report in reports for stage in report.stages),
                events=tuple(text for report in reports for text in report.events),
                images=tuple(self._made.get(group, ())),
            )
            for group, reports in sorted(self._reports.items())
        ]

    def run(self) -> None:
        """Make what is missing. Afterwards the folder of parts is gone.

        Raises:
            ManifestMismatch: another model.
            Interrupted: by Ctrl-C; what is done is kept.
            LowMemFlux2Error: whatever went wrong; what is done is kept.
        """
        folder = self._engine.source.folder
        assert folder is not None
        here = fingerprints(folder)
        self.manifest.check_weights(here, self._path)
        with self._parts.held():
            if self.manifest.versions != versions() and self.manifest.count("done"):
                self._hooks.event("this batch was begun with other versions of the libraries: see each picture's own")
            self._keep(self._as_found(replace(self.manifest, weights=here)))
            self._upsample()
            self._encode()
            self._denoise()
            self._decode()
        self._parts.remove()

    def _keep(self, manifest: Manifest) -> None:
        self.manifest = manifest
        write_manifest(manifest, self._path)

    def _as_found(self, manifest: Manifest) -> Manifest:
        """What the manifest says is there, and is not, is to be made again."""
        whole: dict[str, bool] = {}
        for index, image in enumerate(manifest.images):
            path = self._file(image)
            if image.state == "done" and not path.exists():
                self._hooks.event(f"{path} is gone: it is made again")
                manifest = manifest.with_image(index, replace(image, state="pending", sha256=None))
            elif image.state == "latents":
                name = image.latents or ""
                if name not in whole:
                    whole[name] = self._parts.latents(name) is not None
                if not whole[name]:
                    self._hooks.event(f"{path}: its latents are gone or damaged: they are made again")
                    manifest = manifest.with_image(index, replace(image, state="pending", latents=None))
        return manifest

    def _file(self, image: ImageState) -> Path:
        return self._path.parent / image.path

    # ---------------------------------------------------------------------------------------------------- upsample

    def _upsample(self) -> None:
        """Each group's prompts together, sampled with the seed of its first image; kept in the manifest."""
        for number, group in enumerate(self.manifest.groups):
            if not group.is_to_be_upsampled:
                continue
            made: list[str] = []
            inputs = Inputs(
                result="prompts",
                references=load_references(group.request.references),
                seen=seen_of(group.request),
                on_upsampled=made.extend,
                interruption=self._interruption,
            )
            result = self._engine.run(group.request, group.plan, inputs, self._seeds(group))
            self._keep(self.manifest.with_upsampled(number, tuple(made)))
            self._hooks.upsampled(tuple(made))
            self._reports.setdefault(number, []).append(result.report)

    def _seeds(self, group: Group) -> list[int]:
        return [self.manifest.images[at].seed for at in group.images]

    # ------------------------------------------------------------------------------------------------------ encode

    def _encode(self) -> None:
        """The embeddings of all prompts of groups that are not denoised, into the folder of parts."""
        pending = [at for at in range(len(self.manifest.groups)) if self.manifest.pending_batches(at)]
        for number in dict.fromkeys(self.manifest.groups[at].encode for at in pending):
            job = self.manifest.encodes[number]
            places = {batch: at for at, batch in enumerate(job.batches)}
            found = {batch: self._parts.embeddings(number, at, batch) for batch, at in places.items()}
            known = {batch: each[0] for batch, each in found.items() if each is not None}
            if len(known) == len(places):
                continue

            def keep(
                batch: Batch,
                embeddings: torch.Tensor,
                plan: Plan,
                number: int = number,
                places: dict[Batch, int] = places,
            ) -> None:
                weight_format = plan.stage("encode").weight_format
                self._parts.put_embeddings(number, places[batch], batch, embeddings, weight_format)

            inputs = Inputs(result="embeddings", known=known, on_encoded=keep, interruption=self._interruption)
            made = self._engine.run(job.request, job.plan, inputs, [None] * job.request.num_images)
            if len(self.manifest.groups) == 1:
                self._reports.setdefault(0, []).append(made.report)

    def _embeddings(self, group: Group) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
        """A row a prompt, the same of negative prompts, and the format that each prompt's encoder had."""
        job = self.manifest.encodes[group.encode]
        made: dict[Batch, torch.Tensor] = {}
        formats: dict[str, str] = {}
        for number, batch in enumerate(job.batches):
            found = self._parts.embeddings(group.encode, number, batch)
            if found is None:
                raise RunError(f"{self._parts.folder}: embeddings that were just saved are gone")
            made[batch] = found[0]
            formats.update(dict.fromkeys(batch, found[1]))
        request, is_guided = group.request, group.plan.workload.guidance_passes == 2
        negatives: torch.Tensor | None = None
        if job.request == replace(request, caption_upsample_temperature=None):
            batches = prompt_batches(request.prompts, job.plan.stage("encode").batch_size)
            prompts = torch.cat([made[batch] for batch in batches])
            if is_guided:
                negatives = torch.cat([made[batch] for batch in negatives_of(batches, request.negative_prompt)])
        else:
            rows = {text: tensor[row] for batch, tensor in made.items() for row, text in enumerate(batch)}
            prompts = torch.stack([rows[text] for text in request.prompts])
            if is_guided:
                negatives = torch.stack([rows[request.negative_prompt or ""]] * len(request.prompts))
        return prompts, negatives, [formats[text] for text in request.prompts]

    # ----------------------------------------------------------------------------------------------------- denoise

    def _denoise(self) -> None:
        for number, group in enumerate(self.manifest.groups):
            pending = self.manifest.pending_batches(number)
            if pending:
                self._denoise_from(number, group, pending[0])

    def _denoise_from(self, number: int, group: Group, first: int) -> None:
        """All batches of a group from the first that is not done; those after it that are done change nothing."""
        prompts, negatives, formats = self._embeddings(group)
        repeats = group.request.num_images_per_prompt

        def keep(batch: int, latents: torch.Tensor, plan: Plan) -> None:
            images = group.batches[batch]
            texts = tuple(formats[group.images.index(at) // repeats] for at in images)
            name = self._parts.put_latents(number, batch, Denoised(latents, plan, texts, versions()))
            manifest = replace(self.manifest, stopped=None)
            for at in images:
                if manifest.images[at].state == "pending":
                    manifest = manifest.with_image(at, replace(manifest.images[at], state="latents", latents=name))
            self._keep(manifest)

        progress = self._progress(number, group, first)
        inputs = Inputs(
            prompt_embeds=prompts,
            negative_prompt_embeds=negatives,
            references=load_references(group.request.references),
            progress=progress,
            result="packed_latents",
            on_batch=keep,
            interruption=self._interruption,
        )
        seeds = self._seeds(group)
        try:
            made = self._engine.run(group.request, group.plan, inputs, seeds)
        except Interrupted:
            if progress.latents is not None:
                self._parts.put_under_way(progress.latents, progress.step, progress.kept)
                stopped = StoppedBatch(number, len(progress.finished), progress.step)
                self._keep(replace(self.manifest, stopped=stopped))
            raise
        self._reports.setdefault(number, []).append(made.report)

    def _progress(self, number: int, group: Group, first: int) -> Progress:
        """Where to go on. What stands for batches that are done is not looked at."""
        request, model = group.request, self._engine.source.spec
        tokens = request.height // model.size_multiple * (request.width // model.size_multiple)
        dtype = DTYPES[group.plan.stage("denoise").compute_dtype]
        done = [
            torch.zeros(len(batch), tokens, model.transformer.in_channels, dtype=dtype)
            for batch in group.batches[:first]
        ]
        stopped = self.manifest.stopped
        if stopped is not None and (stopped.group, stopped.batch) == (number, first):
            found = self._parts.under_way(stopped.step)
            if found is not None:
                latents, kept = found
                return Progress(done, latents.to(self._engine.machine.device_name), stopped.step, saved=kept)
        return Progress(done)

    # ------------------------------------------------------------------------------------------------------ decode

    def _decode(self) -> None:
        for number, group in enumerate(self.manifest.groups):
            waiting = [at for at in group.images if self.manifest.images[at].state == "latents"]
            if waiting:
                self._decode_images(number, group, waiting)

    def _decode_images(self, number: int, group: Group, waiting: list[int]) -> None:
        batch_of = {at: batch for batch in group.batches for at in batch}
        names = dict.fromkeys(self.manifest.images[at].latents or "" for at in waiting)
        found = {name: self._parts.latents(name) for name in names}
        made_by: list[tuple[Denoised, int]] = []
        for at in waiting:
            denoised = found[self.manifest.images[at].latents or ""]
            if denoised is None:
                raise RunError(f"{self._parts.folder}: latents that were there are gone; the same command makes them")
            made_by.append((denoised, batch_of[at].index(at)))

        def save(index: int, picture: torch.Tensor, plan: Plan) -> None:
            at, (denoised, row) = waiting[index], made_by[index]
            image = self.manifest.images[at]
            record = ImageRecord(None, image.seed, self.manifest.lines[image.line].prompt)
            if group.is_upsampled:
                number_in = group.images.index(at) // group.request.num_images_per_prompt
                made, first = group.request.prompts[number_in], self._seeds(group)[0]
                record = replace(record, upsampled_prompt=made, upsample_seed=first)
            texts = self._texts(group, at, denoised, row, plan, record) if self._hooks.metadata else {}
            path, digest = self._parts.put_picture(png_bytes(to_pil(picture), texts), self._file(image))
            name = path.relative_to(self._path.parent) if path.is_relative_to(self._path.parent) else path
            done = replace(image, path=str(name), state="done", latents=None, sha256=digest)
            self._keep(self.manifest.with_image(at, done))
            self._made.setdefault(number, []).append(replace(record, path=str(path)))
            self._hooks.saved(path, image.seed)

        inputs = Inputs(
            packed=torch.cat([denoised.latents[row : row + 1] for denoised, row in made_by]),
            on_picture=save,
            keeps_pictures=False,
            interruption=self._interruption,
        )
        seeds = self._seeds(group)
        try:
            made = self._engine.run(group.request, group.plan, inputs, seeds)
        except DecodeFailed as failed:  # its latents are in the folder of parts
            cause = failed.__cause__
            raise (cause if isinstance(cause, Exception) else failed) from failed
        self._reports.setdefault(number, []).append(made.report)

    def _texts(
        self, group: Group, at: int, denoised: Denoised, row: int, plan: Plan, record: ImageRecord
    ) -> dict[str, str]:
        elsewhere = {"encode": self.manifest.encodes[group.encode].plan.stage("encode"), "decode": plan.stage("decode")}
        stages = tuple(elsewhere.get(stage.stage, stage) for stage in denoised.plan.stages)
        whole, position = replace(denoised.plan, stages=stages), group.images.index(at)
        texts = describe(group.request, whole, record, denoised.versions, position)
        return texts | {"text_weight_format": denoised.text_formats[row]}
