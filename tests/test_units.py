"""Sizes and times, from text and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_flux2.errors import UsageError
from lowmem_flux2.units import GIB, KIB, MIB, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("12GB", 12 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        ("0.1KiB", 102),
        ("1048576", MIB),
        ("7b", 7),
        ("2TiB", 2048 * GIB),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "8 GiBs", "8G", "-1GiB", "0", "0 GiB", "0.1b", "1e9", "1,5GiB", "inf", "nan", "9" * 400, "8 Gb/s"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 KiB"),
        (512, "0 KiB"),
        (10 * KIB, "10 KiB"),
        (MIB - 1, "1 MiB"),
        (300 * MIB, "300 MiB"),
        (GIB - 1, "1.00 GiB"),
        (1610612736, "1.50 GiB"),
        (-2 * GIB, "-2.00 GiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(min_value=KIB, max_value=1 << 45))
def test_a_printed_size_parses_back_within_its_last_digit(size: int) -> None:
    unit = GIB / 100 if size >= GIB - MIB // 2 else MIB if size >= MIB - KIB // 2 else KIB
    assert abs(parse_bytes(format_bytes(size)) - size) <= unit / 2 + 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.000 s"),
        (0.042, "0.042 s"),
        (0.9999, "1.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (float("inf"), "never"),
        (float("nan"), "never"),
    ],
)
def test_times_are_printed(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
