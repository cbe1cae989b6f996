"""Parts of a batch that is being made: embeddings, latents denoised or under way; a folder of files, each whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.batches import Batch
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.runtime.checked import Damaged, read_checked, write_checked
from lowmem_flux2.runtime.newfile import write_new

UNDER_WAY, LOCK, KEPT = "under_way.safetensors", "lock", "kept."


@dataclass(frozen=True, slots=True)
class Denoised:
    """A denoised batch: packed latents (images, tokens, channels) on the host, and how they were made.

    Args:
        text_formats: of the encoder that each image's prompt went through.
    """

    latents: torch.Tensor
    plan: Plan
    text_formats: tuple[str, ...]
    versions: Mapping[str, str]


class Parts:
    """The folder of parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder is there, and no other process works in it.

        Raises:
            UsageError: another one does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as file:
            if os.name != "nt":
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UsageError(f"{self.folder}: another process is making this batch; wait for it") from None
            yield

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------- embeddings

    def put_embeddings(self, job: int, number: int, batch: Batch, embeddings: torch.Tensor, weight_format: str) -> None:
        texts = {"batch": json.dumps(batch), "weight_format": weight_format}
        self._write(f"embeddings_{job}_{number}.safetensors", {"embeddings": embeddings}, texts)

    def embeddings(self, job: int, number: int, batch: Batch) -> tuple[torch.Tensor, str] | None:
        """(prompts, tokens, width) of a batch and the encoder's weight format; None where they are not there, whole."""
        found = self._read(f"embeddings_{job}_{number}.safetensors")
        if found is None or found[1].get("batch") != json.dumps(batch):
            return None
        return found[0]["embeddings"], found[1]["weight_format"]

    # ---------------------------------------------------------------------------------------------------- latents

    def put_latents(self, group: int, number: int, done: Denoised) -> str:
        """Returns the file's name."""
        name = f"latents_{group}_{number}.safetensors"
        texts = {
            "plan": json.dumps(done.plan.to_json()),
            "text_formats": json.dumps(done.text_formats),
            "versions": json.dumps(dict(done.versions)),
        }
        self._write(name, {"latents": done.latents}, texts)
        return name

    def latents(self, name: str) -> Denoised | None:
        """None where they are not there, whole."""
        found = self._read(name)
        if found is None:
            return None
        tensors, texts = found
        plan = Plan.from_json(json.loads(texts["plan"]), name)
        return Denoised(
            tensors["latents"], plan, tuple(json.loads(texts["text_formats"])), json.loads(texts["versions"])
        )

    def put_under_way(self, latents: torch.Tensor, step: int, kept: Mapping[str, torch.Tensor]) -> None:
        tensors = {"latents": latents, **{f"{KEPT}{name}": tensor for name, tensor in kept.items()}}
        self._write(UNDER_WAY, tensors, {"step": str(step)})

    def under_way(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        """Packed latents of the stopped batch, and what its step cache keeps; None where they are not there, whole, or
        of another step."""
        found = self._read(UNDER_WAY)
        if found is None or found[1].get("step") != str(step):
            return None
        latents = found[0].pop("latents")
        return latents, {name.removeprefix(KEPT): tensor for name, tensor in found[0].items()}

    # --------------------------------------------------------------------------------------------------- pictures

    def put_picture(self, made: bytes, path: Path) -> tuple[Path, str]:
        """Write a picture under its name, or find it there; returns where it is, and its SHA-256.

        A process may have been killed after it wrote the picture, and before it said so. A file with other bytes is the
        user's, and is not touched: then the picture takes the next free name.
        """
        digest = hashlib.sha256(made).hexdigest()
        with suppress(OSError):
            if path.stat().st_size == len(made) and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                return path, digest
        return write_new(path, lambda file: file.write(made), temporary_in=self.folder), digest

    # -----------------------------------------------------------------------------------------------------------

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
        temporary = self.folder / f".{name}.tmp"
        with temporary.open("wb") as file:
            write_checked(file, {key: tensor.to("cpu").contiguous() for key, tensor in tensors.items()}, texts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        try:
            return read_checked(self.folder / name)
        except (OSError, Damaged):
            return None
