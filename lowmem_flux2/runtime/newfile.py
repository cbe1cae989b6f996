"""Files of the user's: written whole or not at all, and never over one that is there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_new(path: Path, write: Callable[[BinaryIO], object], temporary_in: Path | None = None) -> Path:
    """Write a file under the first free name: ``name.png``, ``name_2.png``, ``name_3.png``...

    Args:
        temporary_in: folder of the same file system for the temporary file, if not the path's own.

    Returns:
        The path that was taken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (temporary_in or path.parent) / f".{os.getpid()}-{threading.get_ident()}{path.suffix}.tmp"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        number = 1
        while True:
            target = path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
            try:
                os.link(temporary, target)  # fails if it exists, also against another process at the same moment
                return target
            except FileExistsError:
                number += 1
            except OSError:  # a file system without hard links
                try:
                    target.touch(exist_ok=False)  # claims the name
                except FileExistsError:
                    number += 1
                    continue
                try:
                    temporary.replace(target)
                except BaseException:
                    target.unlink()
                    raise
                return target
    finally:
        temporary.unlink(missing_ok=True)
