"""What is printed while stages run."""

from __future__ import annotations

import io

from rich.console import Console

from lowmem_flux2.console import ConsoleObserver


def test_a_warning_is_one_line_and_as_it_is() -> None:
    out = io.StringIO()
    text = "/cache/[bold]/prepared/transformer-int8-bf16-0123456789abcdef/block-002.bin is damaged: prepared anew"
    ConsoleObserver(Console(file=out, width=40), quiet=True).event(text)
    assert out.getvalue() == f"warning: {text}\n"
