"""Every error that lowmem_flux2 raises on purpose, and the exit code each one gives the command line.

    LowMemFlux2Error
    ├── UsageError                2    the request, a flag or a file of the user's cannot be honoured
    │   ├── ProfileError          2    a profile TOML that is wrong: file, key and line
    │   ├── PlanMismatch          2    --plan with another request, model or hardware
    │   ├── ManifestMismatch      2    a batch's manifest of another prompt file, other options or another model
    │   └── NotExecutable         2    a plan that this version can make but not carry out
    ├── DoesNotFit                3    no plan fits VRAM, RAM or disk: shortfall and what would fit
    ├── CheckpointError           4    the model files
    │   ├── CheckpointMissing     4    not found: folder, file, hub id, offline
    │   ├── CheckpointAccess      4    found, but no token, no access, or licence not accepted
    │   └── CheckpointBroken      4    truncated, an LFS pointer, HTML, a missing key, parts that do not belong together
    ├── RunError                  5    failed while running
    │   ├── NonFiniteLatents      5    NaN or infinity: the step and block where it appeared
    │   └── DecodeFailed              as its cause: latents are done, and kept in it, but not decoded
    └── Interrupted             130    Ctrl-C

Anything else that escapes is a defect of ours and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LowMemFlux2Error(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 5


class UsageError(LowMemFlux2Error):
    """The request cannot be honoured as written; nothing heavy has started."""

    exit_code = 2


class ProfileError(UsageError):
    """A hardware profile that is wrong; the message names file, key and line."""


class PlanMismatch(UsageError):
    """A plan file made for another request, model or hardware; the message shows the difference."""


class ManifestMismatch(UsageError):
    """A batch's manifest that was begun with something else; the message shows the difference and the remedy."""


class NotExecutable(UsageError):
    """A plan that needs what this version cannot carry out yet; the message lists what."""


class DoesNotFit(LowMemFlux2Error):
    """No plan fits.

    Args:
        stage: encode, denoise or decode.
        resource: vram, ram, or pinnable ram (a plan that was to pin more than may be pinned).
        needed_bytes: the least that any plan of this stage needs of the resource.
        available_bytes: what there is, after reserves and the caller's cap.
        closest: commands (or changes) with their peaks that would fit, best first.
    """

    exit_code = 3

    def __init__(
        self, stage: str, resource: str, needed_bytes: int, available_bytes: int, closest: Sequence[str] = ()
    ) -> None:
        from lowmem_flux2.units import format_bytes

        self.stage = stage
        self.resource = resource
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.closest = tuple(closest)
        short = format_bytes(needed_bytes - available_bytes)
        lines = [
            f"does not fit: the {stage} stage needs at least {format_bytes(needed_bytes)} of {resource.upper()}, "
            f"{format_bytes(available_bytes)} is available ({short} short)."
        ]
        if self.closest:
            lines.append("What would fit:")
            for (
                line
            ) in self.closest:  # notes below a command, not behind it: not every shell takes comments when pasted
                command, _, notes = line.partition("   # ")
                lines += [f"  {command}", *([f"      {notes}"] if notes else [])]
        super().__init__("\n".join(lines))


class CheckpointError(LowMemFlux2Error):
    """The model's files are missing, barred or broken."""

    exit_code = 4


class CheckpointMissing(CheckpointError):
    """Not found: a folder, a file in it, or a hub id while offline."""


class CheckpointAccess(CheckpointError):
    """Exists on the hub, but this user may not read it: no token, no access, or the licence is not accepted."""


class CheckpointBroken(CheckpointError):
    """Found but unusable: truncated, not a safetensors file, a config without a needed key, mismatched parts."""


class RunError(LowMemFlux2Error):
    """Failed while running; the message names the stage and what to do."""

    exit_code = 5


class NonFiniteLatents(RunError):
    """NaN or infinity in the latents: a black picture is never reported as success."""


class DecodeFailed(RunError):
    """No picture could be made of latents that are done.

    Args:
        cause: what went wrong; its exit code is this one's.
        latents: a ``runtime.latents_file.SavedLatents``: ``Engine.generate(from_latents=...)`` takes it.
        saved_in: the file that the run had saved them in already, if that was asked for.
    """

    def __init__(self, cause: Exception, latents: Any, saved_in: Path | None = None) -> None:
        super().__init__(str(cause))
        self.exit_code = cause.exit_code if isinstance(cause, LowMemFlux2Error) else RunError.exit_code
        self.latents = latents
        self.saved_in = saved_in


class Interrupted(LowMemFlux2Error):
    """Stopped by Ctrl-C while running, or as a ``runtime.interruption.Interruption`` asked.

    Args:
        run: a ``runtime.interrupted_file.InterruptedRun`` where denoising had begun, which
            ``Engine.generate(from_latents=...)`` goes on with; None where there is nothing to keep.
    """

    exit_code = 130

    def __init__(self, message: str, run: Any = None) -> None:
        super().__init__(message)
        self.run = run
