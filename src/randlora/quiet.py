"""What libraries say of optional packages while they are imported, which is of no use to whoever imports this one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that speak of kernels for other machines when PEFT looks which quantisations there are."""


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
