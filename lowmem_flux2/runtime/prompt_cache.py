"""The prompt cache: embeddings of prompts on disk, so that a repeated prompt loads no text encoder.

    CACHE/prompts/<key>.safetensors     one batch of prompts, as it went through the encoder

A batch is kept whole, because who else is in it decides how kernels round: a hit is equal, bit for bit, to encoding the
same batch again. The key covers all that decides bits: the encoder's and tokenizer's files, weight format, compute
dtype, tapped layers, text length, the prompts in their order, the device with its settings, and the versions of the
libraries. Files are replaced whole, so processes may share the folder; the least recently used leave when it is full.
No trouble with the disk fails a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from lowmem_flux2.errors import CheckpointError
from lowmem_flux2.planning.batches import Batch
from lowmem_flux2.planning.headers import read_header
from lowmem_flux2.planning.job import with_cached
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.runtime.cache import prompt_files, prompts_folder
from lowmem_flux2.runtime.checked import Damaged, read_checked, write_checked
from lowmem_flux2.runtime.device import arithmetic_of, torch_device
from lowmem_flux2.runtime.inputs import Inputs, batches_to_encode
from lowmem_flux2.runtime.store import entry_of

SCHEMA = 1
"""Raised whenever ``runtime.encode`` computes other bits from the same input."""
LIBRARIES = ("torch", "transformers", "tokenizers", "diffusers")
"""What computes the embeddings, makes the tokens, and holds dev's system message."""
HEADER_MOST_BYTES = 512
"""Of an entry's file, beside its tensor."""
ABANDONED_S = 3600
"""A temporary file as old as this was left by a process that was killed."""


def encoder_identity(folder: Path, model: ModelSpec, plan: Plan, device: torch.device) -> str:
    """Hex digest of all that decides an embedding's bits, the prompts apart. Reads headers and the tokenizer's files.

    Raises:
        CheckpointError, OSError: the encoder's files cannot be read.
    """
    stage = plan.stage("encode")
    decides = {
        "schema": SCHEMA,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "arithmetic": arithmetic_of(device),
        "encoder": entry_of(folder, "text_encoder", stage.weight_format, stage.compute_dtype).name,
        "weight_format": stage.weight_format,
        "form": model.form,
        "out_layers": model.text_encoder.out_layers,
        "length": plan.workload.text_tokens,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for path in sorted((folder / "tokenizer").iterdir()):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


class PromptCache:
    """What one encoder, as it computes here, made of batches of prompts.

    Args:
        cache: the cache folder.
        limit_bytes: of all entries, whichever encoder made them.
        identity: see ``encoder_identity``.
        event: told, at most once, of a disk that cannot be used, and of each damaged entry.
    """

    def __init__(self, cache: Path, limit_bytes: int, identity: str, event: Callable[[str], None]) -> None:
        self._cache = cache
        self._limit_bytes = limit_bytes
        self._identity = identity
        self._event = event
        self._has_failed = False

    @classmethod
    def of(
        cls,
        source: ModelSource,
        plan: Plan,
        device: torch.device,
        cache: Path,
        limit_bytes: int,
        event: Callable[[str], None],
    ) -> PromptCache:
        """The cache for the encoder of a model with weights, as the plan runs it."""
        assert source.folder is not None
        return cls(cache, limit_bytes, encoder_identity(source.folder, source.spec, plan, device), event)

    def holds(self, batch: Batch) -> bool:
        """Whether there is an entry of the right length; its bytes are not looked at."""
        try:
            read_header(self._path(batch))
        except CheckpointError:
            return False
        return True

    def get(self, batch: Batch) -> torch.Tensor | None:
        """The batch's embeddings (prompts, tokens, width), or None; a damaged entry is dropped."""
        path = self._path(batch)
        try:
            tensors, _ = read_checked(path)
            found = tensors["embeddings"]
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed(error)
            return None
        except (Damaged, KeyError):
            self._event(f"prompt cache: {path.name} was damaged: dropped, its prompts are encoded again")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # on a read-only disk the order of use is not kept
            os.utime(path)
        return found

    def put(self, batch: Batch, embeddings: torch.Tensor) -> None:
        """Keep a batch; does nothing where it is too large, or the disk cannot take it."""
        size_bytes = embeddings.nbytes + HEADER_MOST_BYTES
        if self._has_failed or size_bytes > self._limit_bytes:
            return
        folder = prompts_folder(self._cache)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._make_room(folder, size_bytes)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp", delete=False) as file:
                try:
                    write_checked(file, {"embeddings": embeddings.contiguous()}, {})
                    file.flush()
                    os.fsync(file.fileno())
                    Path(file.name).replace(self._path(batch))
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            self._failed(error)

    def _path(self, batch: Batch) -> Path:
        key = hashlib.sha256(json.dumps([self._identity, *batch]).encode()).hexdigest()[:32]
        return prompts_folder(self._cache) / f"{key}.safetensors"

    def _make_room(self, folder: Path, size_bytes: int) -> None:
        """Drop the least recently used entries until ``size_bytes`` more are within the limit.

        Another process may do the same at the same time: what is gone already is passed over.
        """
        for left in folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    left.unlink()
        entries = prompt_files(self._cache)
        total = sum(entry.size_bytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.used_at):
            if total + size_bytes <= self._limit_bytes:
                return
            entry.path.unlink(missing_ok=True)
            total -= entry.size_bytes

    def _failed(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._event(f"prompt cache: {prompts_folder(self._cache)} cannot be used ({error}); going on without it")


def with_known_prompts(
    prompts: PromptCache, source: ModelSource, plan: Plan, request: Request, inputs: Inputs
) -> tuple[Plan, Inputs]:
    """Take from the cache what it holds, and have it keep what the encoder will make; the plan counts on both."""
    batches = batches_to_encode(request, plan, inputs)
    found = {batch: prompts.get(batch) for batch in dict.fromkeys(batches) if batch not in inputs.known}
    known = {batch: embeddings for batch, embeddings in found.items() if embeddings is not None}
    weight_format, told = plan.stage("encode").weight_format, inputs.on_encoded
    if told is not None:
        for batch, embeddings in known.items():
            told(batch, embeddings, plan)

    def keep(batch: Batch, embeddings: torch.Tensor, carried_out: Plan) -> None:
        if carried_out.stage("encode").weight_format == weight_format:
            prompts.put(batch, embeddings)
        if told is not None:
            told(batch, embeddings, carried_out)

    expected = with_cached(plan, source, sum(batch in known for batch in batches))
    return expected, replace(inputs, known={**inputs.known, **known}, on_encoded=keep)


def expecting_cached(plan: Plan, source: ModelSource, request: Request, device_name: str, cache: Path) -> Plan:
    """The plan that counts on what the cache seems to hold, for people to read before it is carried out."""
    if source.folder is None:
        return plan
    prompts = PromptCache.of(source, plan, torch_device(device_name), cache, 0, lambda _: None)
    return with_cached(plan, source, sum(prompts.holds(batch) for batch in batches_to_encode(request, plan)))
