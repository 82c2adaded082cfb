import numpy as np
from benchmarks.picture import AXES, STYLES, draw
from matplotlib import image


def test_the_picture_is_a_png_of_the_promised_width(tmp_path):
    rows = [
        {"method": method, "tokens": x, "hidden": x, "layers": x, "µs per token": 10 / x, "× frozen": 1.5, "seconds": x}
        for method in STYLES
        for x in (1, 2, 4)
    ]
    path = tmp_path / "new" / "scaling.png"
    draw(path, {quantity: rows for quantity in AXES})
    pixels = image.imread(path)
    assert pixels.shape[1] == 2080
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
