"""The growth of a step's time with tokens, hidden size and number of layers, with a picture.

The vocabulary is small, so that its product does not hide the cost of the layers.
"""

from collections.abc import Iterator
from typing import Any

from .comparison import Comparison
from .methods import DENSE, FROZEN, FULL, LORA, PEFT_DENSE, VERY_SPARSE
from .models import Llama
from .picture import draw
from .record import RESULTS

COLUMNS = ("hidden", "layers", "tokens", "method", "seconds", "× frozen", "floor", "µs per token")
METHODS = (FROZEN, LORA, PEFT_DENSE, DENSE, VERY_SPARSE, FULL)
HIDDEN, LAYERS, TOKENS = 1024, 2, 1024  # sizes of the quantities that do not grow
PICTURE = RESULTS.parents[1] / "docs" / "images" / "scaling.png"

Point = tuple[int, int, int]
"""Hidden size, layers, tokens."""

SWEEPS: dict[str, list[Point]] = {
    "tokens": [(HIDDEN, LAYERS, tokens) for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "hidden": [(hidden, LAYERS, TOKENS) for hidden in (256, 512, 1024, 1536, 2048)],
    "layers": [(HIDDEN // 2, layers, TOKENS) for layers in (1, 2, 4, 8)],
}
QUICK: dict[str, list[Point]] = {
    "tokens": [(128, 1, tokens) for tokens in (32, 64, 128)],
    "hidden": [(hidden, 1, 64) for hidden in (64, 128)],
    "layers": [(128, layers, 64) for layers in (1, 2)],
}


def run(quick: bool) -> Iterator[dict[str, Any]]:
    sweeps = QUICK if quick else SWEEPS
    measured: dict[Point, list[dict[str, Any]]] = {}
    for point in dict.fromkeys(point for points in sweeps.values() for point in points):
        measured[point] = list(measure(*point, rounds=2 if quick or point[2] > 2048 else 3))
        yield from measured[point]
    rows = {axis: [row for point in points for row in measured[point]] for axis, points in sweeps.items()}
    draw(RESULTS / "scaling-quick.png" if quick else PICTURE, rows)


def measure(hidden: int, layers: int, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row for each method, for a Llama of the usual proportions."""
    heads = max(1, hidden // 64)
    architecture = Llama(hidden, hidden * 11 // 4, layers, heads, vocab=2048)
    for row in Comparison(architecture, tokens, rounds, methods=METHODS).run():
        yield {"hidden": hidden, "layers": layers, **row, "µs per token": 1e6 * row["seconds"] / tokens}
