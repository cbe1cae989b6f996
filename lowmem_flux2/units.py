"""Parse and print bytes and seconds, check numbers. Sizes are int bytes everywhere else; text exists only at the edges.

"GiB" is 2^30 and "GB" is 10^9 when parsed; printed sizes are always binary, so that they compare with what
``nvidia-smi`` and the allocator report.
"""

from __future__ import annotations

import math
import operator
import re
from typing import SupportsFloat, SupportsIndex

from lowmem_flux2.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_BYTES = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")


def whole_number(name: str, given: SupportsIndex) -> int:
    """A Python int, of numpy's too. Raises UsageError: anything else, 2.0 included."""
    try:
        return operator.index(given)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {given!r}") from None


def real_number(name: str, given: SupportsFloat) -> float:
    """A Python float. Raises UsageError: no number, or one as text."""
    if isinstance(given, str | bytes) or not hasattr(given, "__float__"):
        raise UsageError(f"{name} must be a number, not {given!r}")
    return float(given)


def parse_bytes(text: str) -> int:
    """Return bytes for text such as ``8GiB``, ``512 MiB``, ``12GB`` or ``1048576``.

    Raises:
        UsageError: not a number with a known unit, or not positive.
    """
    match = _BYTES.fullmatch(text)
    factor = _FACTORS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is not a size: write for example 8GiB, 512MiB or 12GB")
    exact = float(match["number"]) * factor
    if math.isinf(exact):
        raise UsageError(f"{text[:20]!r}... is not a size: it is beyond any memory")
    value = round(exact)
    if value <= 0:
        raise UsageError(f"{text!r} is not a size: it must be greater than zero")
    return value


def format_bytes(size_bytes: float) -> str:
    """``format_bytes(1610612736) == '1.50 GiB'``; MiB below 1 GiB, KiB below 1 MiB."""
    magnitude = abs(size_bytes)
    if round(magnitude / MIB) >= GIB // MIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if round(magnitude / KIB) >= MIB // KIB:
        return f"{size_bytes / MIB:.0f} MiB"
    return f"{size_bytes / KIB:.0f} KiB"


def format_seconds(time_s: float) -> str:
    """``0.042 s``, ``4.2 s``, ``1 min 05 s``, ``2 h 03 min``."""
    if not math.isfinite(time_s):
        return "never"
    if round(time_s, 3) < 1:
        return f"{time_s:.3f} s"
    if round(time_s, 1) < 60:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
