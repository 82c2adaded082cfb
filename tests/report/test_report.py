import numpy as np
import pytest
from matplotlib import image

from randlora.report.figures import demo_figure
from randlora.report.statistics import wilson_interval
from randlora.report.table import Row, markdown_table


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (811, 1000, 0.7855, 0.8341)],
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_no_proportion(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes in {trials}"):
        wilson_interval(successes, trials)


def test_the_table_says_what_was_measured():
    row = Row("RandLoRA", 328_322, 811, 1000, 0.4321, 1_410_000_000, 1_323_680)
    table = markdown_table([row]).splitlines()
    assert len(table) == 3
    assert table[2] == "| RandLoRA | 328,322 | 81.1% (78.6–83.4) | 0.43 | 1.4 GB | 1.3 MB |"
    assert len({line.count("|") for line in table}) == 1


def test_the_picture_is_a_png_of_the_promised_size(tmp_path):
    path = tmp_path / "demo.png"
    losses = {"RandLoRA": np.linspace(1, 0.5, 50), "head alone": np.full(50, 0.7)}
    spectra = {"RandLoRA": np.geomspace(1, 0.1, 32), "LoRA": [1.0, 0.5, *[1e-9] * 30]}
    demo_figure(path, losses, spectra, "layer")
    pixels = image.imread(path)
    assert pixels.shape[:2] == (672, 1600)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
