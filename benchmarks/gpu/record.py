"""The record of a part: one JSON file, whole after every case, from which a later call goes on. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowmem_flux2.errors import UsageError
from lowmem_flux2.report import write_atomically

RAN = "ran"
DOES_NOT_FIT = "does not fit"
OUT_OF_MEMORY = "out of memory"
KILLED_FOR_RAM = "killed for RAM"
TIMED_OUT = "timed out"
FAILED = "failed"
CRASHED = "crashed"
CUT_SHORT = "cut short"
FINAL = frozenset({RAN, DOES_NOT_FIT, OUT_OF_MEMORY, KILLED_FOR_RAM, TIMED_OUT})
"""Results. The others are trouble of the suite's own, and such cases are run again."""


def record_path(out: Path, machine: str, part: str) -> Path:
    return out / f"{machine}-{part}.json"


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases on record; none without a record.

    Raises:
        UsageError: not a record.
    """
    if not path.exists():
        return []
    try:
        cases: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a record of this suite ({error!r}); move it away") from None
    return cases


@dataclass(slots=True)
class Record:
    """A part's cases, in the order in which they were run.

    Args:
        about: machine, versions and options; those of the latest call.
    """

    path: Path
    about: Mapping[str, Any]
    cases: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any]) -> Record:
        """Go on from what is there."""
        return cls(path, about, read_cases(path))

    def is_final(self, name: str) -> bool:
        return any(case["case"] == name and case["status"] in FINAL for case in self.cases)

    def add(self, name: str, status: str, result: Mapping[str, Any]) -> None:
        """Put a case on record in place of an earlier try, and write the file."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.cases = [case for case in self.cases if case["case"] != name]
        self.cases.append({"case": name, "status": status, "date": now, **result})
        self.write()

    def write(self, **more: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({**self.about, **more, "cases": self.cases}, indent=1) + "\n")

    @property
    def missed(self) -> list[str]:
        """Cases that ran and did not reach their goal."""
        return [case["case"] for case in self.cases if case.get("met") is False]
