"""``lowmem-flux2 generate``, after planning: run the plan, save each picture, report. Imports torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from lowmem_flux2.arguments import Asked, check_nothing_is_chosen
from lowmem_flux2.console import ConsoleObserver
from lowmem_flux2.errors import DecodeFailed, Interrupted, LowMemFlux2Error, RunError, UsageError
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.job import Machine
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import ModelSource, resolve_model
from lowmem_flux2.report import ImageRecord, write_report
from lowmem_flux2.runtime.engine import Engine, Generation
from lowmem_flux2.runtime.images import to_pil
from lowmem_flux2.runtime.inputs import Inputs
from lowmem_flux2.runtime.interrupted_file import SUFFIX as INTERRUPTED
from lowmem_flux2.runtime.interrupted_file import InterruptedRun, read_saved
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.latents_file import SUFFIX, LatentImage, Origin, SavedLatents
from lowmem_flux2.runtime.picture import OutputPattern, describe, save_png
from lowmem_flux2.runtime.reference_images import load_references
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.runtime.versions import versions
from lowmem_flux2.runtime.vision import seen_of


@dataclass(frozen=True, slots=True)
class Output:
    """What is written and printed.

    Args:
        goes_on: flags of the command that goes on with an interrupted run.
        decodes: of the one that decodes denoised latents.
        again: the command line that does the same.
    """

    pattern: OutputPattern
    report: Path | None
    save_latents: Path | None
    metadata: bool
    quiet: bool
    out: Console
    err: Console
    goes_on: tuple[str, ...] = ()
    decodes: tuple[str, ...] = ()
    again: str = ""

    def show_upsampled(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.out.print(f"upsampled prompt: {prompt}", soft_wrap=True, markup=False)

    def finish(self, made: Generation, saved: Sequence[ImageRecord]) -> None:
        """Print what was measured.

        Raises:
            RunError: the latents were to be saved, and could not be.
        """
        if made.latents_file is not None:
            self.out.print(f"{made.latents_file}   latents", soft_wrap=True)
        report = replace(made.report, images=tuple(saved))
        if not self.quiet:
            self.out.print(report.table())
        if self.report is not None:
            write_report(report, self.report)
        if self.save_latents is not None and made.latents_file is None:
            raise RunError(f"the pictures are done, but the latents could not be saved in {self.save_latents}")

    def keep(self, failed: DecodeFailed, model: str) -> str:
        """Save the latents of a run whose decoding failed beside its pictures; returns what to tell the user."""
        latents: SavedLatents = failed.latents
        file = failed.saved_in
        if file is None:
            try:
                file = latents.save(self._beside(latents.origin.images[0], model, SUFFIX))
            except OSError as error:
                return f"the denoised latents could not be saved either: {error}"
        resume = self._resume(file, self.decodes)
        elsewhere = "" if latents.origin.plan.hardware.device == "cpu" else "   # or with --device cpu"
        return f"the denoised latents are saved in {file}; this decodes them:\n  {resume}{elsewhere}"

    def keep_run(self, stopped: Interrupted, model: str) -> Interrupted:
        """Save what an interrupted run goes on with; returns the same, telling how to go on."""
        run: InterruptedRun | None = stopped.run
        if run is None:
            return Interrupted(f"interrupted before the first step; this begins again:\n  {self.again}")
        try:
            file = run.save(self._beside(run.origin.images[0], model, INTERRUPTED))
        except OSError as error:
            return Interrupted(f"interrupted, and the latents could not be saved: {error}")
        done = f"{run.step} of {run.origin.request.num_inference_steps} steps"
        if run.finished is not None:
            done = f"{len(run.finished)} of {len(run.noise)} images and {done} of the next"
        return Interrupted(
            f"interrupted after {done}, saved in {file}; this goes on there:\n  {self._resume(file, self.goes_on)}"
        )

    def _beside(self, image: LatentImage, model: str, suffix: str) -> Path:
        picture = self.pattern.path(seed=image.seed or 0, index=image.index, model=model)
        return picture.with_name(picture.stem + suffix)

    def _resume(self, file: Path, flags: Sequence[str]) -> str:
        return shlex.join(["lowmem-flux2", "generate", "--from-latents", str(file), "-o", str(self.pattern), *flags])


def carry_out(asked: Asked, made: Plan, running: Running, seeds: list[int], output: Output) -> None:
    """Carry the plan out, save each picture when it is decoded, print the report.

    Raises:
        RunError: where the latents were saved, if they could not be decoded.
        Interrupted: by Ctrl-C; says how to go on.
    """
    request = asked.request
    saved: list[ImageRecord] = []

    upsampled: list[str] = []

    def show(prompts: tuple[str, ...]) -> None:
        upsampled.extend(prompts)
        output.show_upsampled(prompts)

    def save(index: int, picture: torch.Tensor, carried_out: Plan) -> None:
        number = index // request.num_images_per_prompt
        record = ImageRecord(None, seeds[index], request.prompts[number])
        if upsampled:
            record = replace(record, upsampled_prompt=upsampled[number], upsample_seed=seeds[0])
        texts = describe(request, carried_out, record, versions(), index) if output.metadata else {}
        path = save_png(to_pil(picture), output.pattern.path(seed=seeds[index], index=index, model=made.model), texts)
        saved.append(replace(record, path=str(path)))
        output.out.print(f"{path}   seed {seeds[index]}", soft_wrap=True)

    with ConsoleObserver(output.err, output.quiet) as observer, Interruption().on_sigint() as interruption:
        engine = Engine.of(asked.source, asked.machine, asked.selection, running, observer)
        pictures = load_references(request.references)
        inputs = Inputs(
            on_picture=save,
            on_upsampled=show,
            interruption=interruption,
            references=pictures,
            seen=seen_of(request),
        )
        try:
            result = engine.run(request, made, inputs, seeds, save_latents=output.save_latents)
        except Interrupted as stopped:
            raise output.keep_run(stopped, made.model) from stopped
        except DecodeFailed as failed:
            raise _with_remedy(failed, output.keep(failed, made.model)) from failed
    output.finish(result, saved)


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the model of saved latents is, as typed; None takes what the file says, or what belongs to that.

    Args:
        cache: the cache folder, where a single file's parts are assembled.
    """

    model: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    cache: Path | None = None

    def resolve(self, origin: Origin, offline: bool) -> ModelSource:
        return resolve_model(
            self.model or origin.model,
            revision=origin.revision if self.model is None else None,
            offline=offline,
            text_encoder=self.text_encoder,
            vae=self.vae,
            tokenizer=self.tokenizer,
            cache=self.cache,
        )


def go_on(
    file: Path, parts: Parts, machine: Machine, selection: Selection, running: Running, output: Output, dry: bool
) -> None:
    """Go on with the latents of an earlier run to its pictures, with all that they say of themselves.

    Args:
        dry: plan and explain only.

    Raises:
        UsageError: the file is not there, or is of another model.
        RunError: it could not be decoded; the file is left as it is.
        Interrupted: by Ctrl-C; says how to go on.
    """
    latents = read_saved(file)
    origin = latents.origin
    if isinstance(latents, InterruptedRun):
        check_nothing_is_chosen(selection, "--from-latents goes on with the run's own plan")
    elif output.save_latents is not None:
        raise UsageError(f"--save-latents: {file} has them already: leave it out")
    try:
        source = parts.resolve(origin, running.offline)
    except LowMemFlux2Error as error:
        raise UsageError(f"{file}: {error}; give the model that made the latents with -m") from error
    saved: list[ImageRecord] = []

    def save(row: int, picture: torch.Tensor, carried_out: Plan) -> None:
        image = origin.images[row]
        record = image.record()
        texts = {}
        if output.metadata:
            whole = carried_out if isinstance(latents, InterruptedRun) else origin.with_decode(carried_out)
            texts = describe(origin.request, whole, record, origin.versions, image.index)
            if origin.versions != versions():
                texts["resumed_with" if isinstance(latents, InterruptedRun) else "decoded_with"] = " ".join(
                    f"{name}=={version}" for name, version in versions().items()
                )
        name = output.pattern.path(seed=image.seed or 0, index=image.index, model=origin.plan.model)
        path = save_png(to_pil(picture), name, texts)
        saved.append(replace(record, path=str(path)))
        output.out.print(f"{path}   seed {image.seed}", soft_wrap=True)

    with ConsoleObserver(output.err, output.quiet) as observer, Interruption().on_sigint() as interruption:
        engine = Engine.of(source, machine, selection, running, observer)
        if dry or not output.quiet:
            output.out.print(explain(engine.plan_resume(latents, str(file)), source.spec))
        if dry:
            return
        try:
            hooks = Inputs(on_picture=save, interruption=interruption)
            result = engine.resume(latents, str(file), hooks=hooks, save_latents=output.save_latents)
        except Interrupted as stopped:
            raise output.keep_run(stopped, origin.plan.model) from stopped
        except DecodeFailed as failed:
            remedy = f"the latents are still in {file}"
            if isinstance(latents, InterruptedRun):
                remedy = output.keep(failed, origin.plan.model)
            raise _with_remedy(failed, remedy) from failed
    output.finish(result, saved)


def _with_remedy(failed: DecodeFailed, remedy: str) -> RunError:
    """The same failure, with what to do about it; its exit code stays."""
    error = RunError(f"{failed}\n{remedy}")
    error.exit_code = failed.exit_code
    return error
