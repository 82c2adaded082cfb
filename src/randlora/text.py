"""Numbers as people read them."""

from __future__ import annotations


def byte_text(count: float) -> str:
    """Return bytes in powers of a thousand, as files are counted."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
