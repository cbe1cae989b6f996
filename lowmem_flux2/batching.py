"""``lowmem-flux2 generate --prompt-file``: a batch of prompts with a manifest, begun or gone on with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group as Lines
from rich.console import RenderableType

from lowmem_flux2.arguments import Asked, after, check_nothing_is_chosen
from lowmem_flux2.batch_request import BatchRequest, batch_request, free_paths, manifest_of
from lowmem_flux2.errors import Interrupted, LowMemFlux2Error, NotExecutable, UsageError
from lowmem_flux2.flags import FitFlags, RequestFlags
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.job import plan_job, replay
from lowmem_flux2.planning.plan import Plan, read_plan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.preparing import prepared_of
from lowmem_flux2.report import write_report
from lowmem_flux2.runtime.manifest import Manifest, manifest_path, read_manifest, write_manifest
from lowmem_flux2.runtime.picture import OutputPattern, check_writable
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.runtime.versions import versions

if TYPE_CHECKING:
    from lowmem_flux2.generating import Output


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a batch is kept on disk, and where.

    Args:
        manifest: what ``--manifest`` was given; None for the name that follows from the pictures'.
        metadata: whether pictures say how they were made.
        cache: the cache folder.
    """

    pattern: OutputPattern
    manifest: Path | None
    metadata: bool
    cache: Path


@dataclass(frozen=True, slots=True)
class Started:
    """A batch, planned or read from its manifest, of which nothing is loaded yet."""

    asked: Asked
    manifest: Manifest
    path: Path
    is_new: bool

    @property
    def is_done(self) -> bool:
        """Whether every image is done, and its file is there."""
        images = self.manifest.images
        return all(image.state == "done" and (self.path.parent / image.path).exists() for image in images)

    def explained(self) -> RenderableType:
        """The plan of each group that has something left to do, and how far the batch is."""
        manifest = self.manifest
        shown: list[RenderableType] = []
        for number, group in enumerate(manifest.groups):
            left = sum(manifest.images[at].state != "done" for at in group.images)
            if left:
                if len(manifest.groups) > 1:
                    shown.append(
                        f"\n{number + 1} of {len(manifest.groups)}: {len(group.images)} images, {left} to make"
                    )
                shown.append(explain(group.plan, self.asked.source.spec))
        total = len(manifest.images)
        if self.is_done:
            return f"all {total} images are done, nothing is left to make or measure: {self.path}"
        if not self.is_new:
            shown.append(
                f"{self.path}: {manifest.count('done')} of {total} images are done, "
                f"{manifest.count('latents')} wait to be decoded"
            )
        return Lines(*shown)

    def carry_out(self, running: Running, output: Output) -> None:
        """Make what is missing. Imports torch.

        Raises:
            Interrupted: says how to go on.
            LowMemFlux2Error: the same, whatever went wrong.
        """
        from lowmem_flux2.console import ConsoleObserver
        from lowmem_flux2.runtime.batch_run import BatchHooks, BatchRun
        from lowmem_flux2.runtime.download import with_weights
        from lowmem_flux2.runtime.engine import Engine
        from lowmem_flux2.runtime.interruption import Interruption

        missing = {text for group in self.manifest.groups for text in group.plan.not_executable}
        if missing:
            raise NotExecutable(f"no plan that this version can carry out fits: {'; '.join(sorted(missing))}")

        def saved(path: Path, seed: int) -> None:
            output.out.print(f"{path}   seed {seed}", soft_wrap=True)

        source = with_weights(self.asked.source, offline=running.offline)
        if self.is_new:
            write_manifest(self.manifest, self.path)
        with ConsoleObserver(output.err, output.quiet) as observer, Interruption().on_sigint() as interruption:
            engine = Engine.of(source, self.asked.machine, self.asked.selection, running, observer)
            hooks = BatchHooks(observer.event, saved, output.show_upsampled, output.metadata)
            run = BatchRun(self.manifest, self.path, engine, interruption, hooks)
            try:
                run.run()
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted(f"interrupted: {self._how_far(run.manifest, output.again)}") from None
            except UsageError:
                raise
            except LowMemFlux2Error as error:
                error.args = (f"{error}\n{self._how_far(run.manifest, output.again)}",)
                raise
        for number, report in enumerate(run.reports, 1):
            if not output.quiet:
                output.out.print(report.table())
            if output.report is not None:
                several = len(run.reports) > 1
                name = f"{output.report.stem}_{number}{output.report.suffix}" if several else output.report.name
                write_report(report, output.report.with_name(name))

    def _how_far(self, manifest: Manifest, again: str) -> str:
        done, waiting, total = manifest.count("done"), manifest.count("latents"), len(manifest.images)
        under_way = f", {manifest.stopped.step} steps of the next batch" if manifest.stopped is not None else ""
        return (
            f"{done} of {total} images are done, {waiting} denoised{under_way}: {self.path}; this goes on there:\n"
            f"  {again}"
        )


def start(
    flags: RequestFlags,
    fit: FitFlags,
    selection: Selection,
    seed: int | None,
    kept: Kept,
    plan: Path | None,
) -> Started:
    """Begin a batch, or go on with the one whose manifest is there. Loads nothing, writes nothing.

    Raises:
        UsageError: a line that cannot be honoured.
        ManifestMismatch: the manifest is of something else.
        DoesNotFit: a group of lines has no plan.
    """
    assert flags.prompt_file is not None
    path = kept.manifest or manifest_path(str(kept.pattern), flags.prompt_file)
    check_writable("--manifest", path)
    typed = {"--output": str(kept.pattern), **({} if kept.metadata else {"--no-metadata": "given"})}
    replayed: Plan | None = None
    if plan is not None:
        replayed = read_plan(plan)
        check_nothing_is_chosen(selection)
        flags, typed = after(flags, replayed), {**typed, "--plan": replayed.digest}
    batch = batch_request(flags, fit, selection, seed, typed, kept.cache)
    if path.exists():
        return _gone_on_with(batch, path)
    model = batch.asked.source.spec.name
    names = [kept.pattern.path(seed=each, index=index, model=model) for index, each in enumerate(batch.seeds)]
    paths = free_paths(names, path.parent)
    if replayed is not None:
        if len(batch.groups) > 1:
            raise UsageError("--plan is of one size and number of steps: the prompt file asks for several")
        asked = batch.asked
        made = replay(replayed, asked.source, asked.machine, asked.request, plan or "", selection)
        return Started(asked, manifest_of(batch, lambda _: made, paths, versions()), path, True)
    ready = prepared_of(batch.asked.source, kept.cache)

    def planned(asked: Asked) -> Plan:
        return plan_job(asked.source, asked.machine, asked.request, asked.selection, running=True, prepared=ready)

    return Started(batch.asked, manifest_of(batch, planned, paths, versions()), path, True)


def _gone_on_with(batch: BatchRequest, path: Path) -> Started:
    """The manifest's own plans and seeds, if it is of the same batch and the plans fit this machine now."""
    manifest, asked = read_manifest(path), batch.asked
    manifest.check(batch.lines, batch.options, [group.asked.request for group in batch.groups], path)
    groups = []
    for group in manifest.groups:
        if any(manifest.images[at].state != "done" for at in group.images):
            made = replay(group.plan, asked.source, asked.machine, group.request, path, asked.selection)
            group = replace(group, plan=made)
        groups.append(group)
    return Started(asked, replace(manifest, groups=tuple(groups)), path, False)
