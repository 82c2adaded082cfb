"""Numbers as text for people."""

from __future__ import annotations


def byte_text(count: float) -> str:
    """Return a number of bytes as text in B, kB, MB or GB, which are powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
