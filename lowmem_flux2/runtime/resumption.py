"""Going on with saved latents: the plan, and the job, of a run that was interrupted or not decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowmem_flux2.planning.job import Machine, plan_job, replay
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import Selection
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.runtime.generation import GenerationJob
from lowmem_flux2.runtime.images import OutputType
from lowmem_flux2.runtime.inputs import Inputs
from lowmem_flux2.runtime.interrupted_file import InterruptedRun
from lowmem_flux2.runtime.latents_file import SavedLatents


@dataclass(frozen=True, slots=True)
class Resumption:
    """What is gone on with, and what to call it in messages."""

    saved: SavedLatents | InterruptedRun
    name: str

    def plan(self, source: ModelSource, machine: Machine, selection: Selection) -> Plan:
        """The plan that decodes saved latents: the decode stage alone, in the dtype that they were made in.

        Of an interrupted run, its own plan.
        """
        origin = self.saved.origin
        if isinstance(self.saved, InterruptedRun):
            plan = replay(origin.plan, source, machine, origin.request, self.name, selection)
            return replace(plan, format_changes=origin.plan.format_changes)
        return plan_job(
            source,
            machine,
            origin.request,
            origin.selection(selection, machine.hardware),
            running=True,
            decode_images=len(self.saved.latents),
        )

    def job(self, plan: Plan, output_type: OutputType, hooks: Inputs) -> GenerationJob:
        """What is left to be made.

        Args:
            hooks: ``on_picture``, ``hook`` and ``interruption``; all else is the latents' own.
        """
        origin = self.saved.origin
        if isinstance(self.saved, InterruptedRun):
            inputs = replace(
                self.saved.inputs, on_picture=hooks.on_picture, hook=hooks.hook, interruption=hooks.interruption
            )
            job = GenerationJob(origin.request, plan, inputs, origin.images, output_type, interrupted=self.saved)
        else:
            inputs = replace(hooks, packed=self.saved.latents)
            job = GenerationJob(origin.request, plan, inputs, origin.images, output_type, resumed=self.saved)
        return replace(job, resumed_name=self.name)
