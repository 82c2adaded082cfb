"""Pictures of runs, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from randlora.tuner.files.atomic import write_atomically

# Okabe and Ito's colours can be told apart with most kinds of colour-blindness. Line styles repeat the distinction.
_STYLES: dict[str, tuple[str, Any]] = {
    "RandLoRA": ("#D55E00", "-"),
    "RandLoRA, structured": ("#CC79A7", (0, (6, 1, 1, 1, 1, 1))),
    "LoRA": ("#0072B2", "--"),
    "full fine-tuning": ("#009E73", "-."),
    "head alone": ("#7A7A7A", ":"),
}
_SMOOTHING = 0.9  # weight of the previous mean in the running mean


def demo_figure(
    path: Path, losses: Mapping[str, Sequence[float]], spectra: Mapping[str, Sequence[float]], module: str
) -> None:
    """Write loss curves beside the singular values of one layer's update, as a PNG of 1,600 pixels' width.

    Args:
        path: the file to write.
        losses: training loss of each step, by method.
        spectra: singular values of ΔW, largest first, by method.
        module: name of the layer with this ΔW.
    """
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_losses(left, losses)
        _draw_spectra(right, spectra, module)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    for method, values in losses.items():
        color, style = _STYLES[method]
        axes.plot(range(1, len(values) + 1), _smooth(values), color=color, linestyle=style, linewidth=2, label=method)
    axes.set_title("Training loss (running mean)", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_spectra(axes: Axes, spectra: Mapping[str, Sequence[float]], module: str) -> None:
    floor = 1e-6  # of the largest value; smaller values are rounding errors of float32
    for method, values in spectra.items():
        color, style = _STYLES[method]
        shares = [value / values[0] for value in values]
        kept = [share for share in shares if share > floor]
        axes.plot(range(1, len(kept) + 1), kept, color=color, linestyle=style, linewidth=2, label=method)
        if len(kept) < len(shares) / 2:
            axes.plot([len(kept)] * 2, [kept[-1], floor], color=color, linestyle=style, linewidth=2)
            axes.annotate(
                f"{method}: zero after {len(kept)}",
                (len(kept), floor * 4),
                xytext=(12, 0),
                textcoords="offset points",
                color=color,
            )
    axes.set_yscale("log")
    axes.set_ylim(floor, 2)
    axes.set_title(f"Singular values of ΔW ({module})", loc="left")
    axes.set_xlabel("index")
    axes.set_ylabel("relative to the largest")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.12))


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential running mean, corrected for its start at zero."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smoothed.append(mean / (1 - _SMOOTHING**count))
    return smoothed
