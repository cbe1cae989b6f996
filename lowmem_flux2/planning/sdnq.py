"""How SDNQ has stored a weight: from the config beside it, as sdnq 0.2.8 has it (``utils.get_quant_kwargs``).

sdnq itself imports torch, which planning does not; tests compare what is told here with what it saves. Its values are
decoded by its own function, in `runtime.decoding`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from lowmem_flux2.errors import CheckpointBroken

METHOD: Final = "sdnq"
AIDS: Final = (
    *("scale", "scale_2", "scale_zero_point", "zero_point", "zero_point_scale", "zero_point_2"),
    *("svd_up", "svd_down"),
)
"""Beside a weight, after its owner's name (``sdnq_keys``)."""
_CONFIG: Final = "config.json"
_DEFAULTS: Final[Mapping[str, Any]] = {
    **{"weights_dtype": "int8", "scale_dtype": None, "zero_point_dtype": None, "group_size": 0},
    **{"use_codebook": False, "use_hadamard": False, "hadamard_group_size": 256},
}
"""Configs of earlier versions lack some."""
_ROOTS: Final = ("model.language_model.", "language_model.model.", "model.")
"""What releases of transformers put before a text decoder's names."""


@lru_cache(maxsize=8)
def _config(folder: Path, stamp: tuple[int, int]) -> Mapping[str, Any] | None:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return config if isinstance(config, dict) and config.get("quant_method") == METHOD else None


def config_beside(file: Path) -> Mapping[str, Any] | None:
    """SDNQ's config in the folder of a weight file; None where there is none, or of another method."""
    try:
        at = (file.parent / _CONFIG).stat()
    except OSError:
        return None
    return _config(file.parent, (at.st_mtime_ns, at.st_size))


def settings_of(config: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    """The config as it goes for the weight of this stored name.

    Raises:
        CheckpointBroken: scales that are quantized themselves.
    """
    names = list(_names(name))
    found = {**_DEFAULTS, **config}
    for pattern, own in (config.get("modules_quant_config") or {}).items():
        if _goes_for([pattern], names):
            found |= own
            break
    found["weights_dtype"] = _type(str(found["weights_dtype"]), names, config.get("modules_dtype_dict"))
    for key in ("scale_dtype", "zero_point_dtype"):
        if found[key] not in (None, "none"):
            raise CheckpointBroken(
                f"{file}: {name!r} is quantized by SDNQ with {key} {found[key]!r}; scales that are quantized too are "
                "not read here, nor loaded again by sdnq 0.2.8 itself"
            )
    return found


def bits_of(kind: str) -> int:
    """Bits of a value: ``uint4`` 4, ``float8_e4m3fn`` 8, ``fp6`` 6."""
    number = re.search(r"\d+", kind)
    return int(number[0]) if number else 1  # bool


def hadamard_size(settings: Mapping[str, Any], columns: int) -> int:
    """Columns that are rotated together (``get_hadamard_group_size``); 0 where none are."""
    if not settings["use_hadamard"]:
        return 0
    size = 1 << (min(columns, settings["hadamard_group_size"]) - 1).bit_length()
    while columns % size:
        size //= 2
    return size if size >= 4 else 0


def _type(kind: str, names: Collection[str], types: Mapping[str, Any] | None) -> str:
    """``get_minimum_dtype``: the first entry that goes for the weight; ``minimum_6bit`` only raises what is less."""
    for key, patterns in (types or {}).items():
        if not _goes_for([patterns] if isinstance(patterns, str) else patterns, names):
            continue
        if not (key.startswith("minimum") or key.endswith(("bit", "bits"))):
            return str(key)
        least = bits_of(key)
        if bits_of(kind) < least:
            return f"{'uint' if 'uint' in key or least <= 4 else 'int'}{least}"
        return kind
    return kind


def _goes_for(patterns: Collection[str], names: Collection[str]) -> bool:
    """``check_param_name_in``: a whole name, one of its parts, its beginning after a dot, or a pattern with stars."""
    for pattern in patterns:
        for name in names:
            if pattern.startswith("."):
                found = name.startswith(pattern[1:])
            else:
                stars = pattern.replace(".*", "\\.*").replace("*", ".*") if "*" in pattern else "$^"
                found = name == pattern or pattern in name.split(".") or re.match(stars, name) is not None
            if found:
                return True
    return False


def _names(name: str) -> Iterator[str]:
    """A stored name, and the names that other releases of transformers give to the same tensor of a text decoder."""
    yield name
    tail = re.search(r"(?:layers\.\d+\.|embed_tokens\.).*", name)
    if tail and "vision" not in name and "transformer_blocks" not in name:
        yield from (root + tail[0] for root in _ROOTS)
