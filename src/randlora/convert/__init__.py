"""Adapters as something else: merged weights."""

from randlora.convert.merged import save_merged

__all__ = ["save_merged"]
