"""Silence for libraries' messages about optional packages, which are useless to a user of this package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that mention kernels of other machines when PEFT looks for quantisation packages."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Let loggers report critical messages only, within the context."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
