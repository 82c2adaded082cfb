"""The notebook of examples/ runs from its first cell to its last."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "full_rank.ipynb"
SIZE, SMALL = "train=1600, test=400", "train=64, test=16"


def test_it_runs_and_holds_what_a_run_printed(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kept = [kinds(cell) for cell in cells]
    assert sum(SIZE in cell.source for cell in cells) == 1
    for cell in cells:
        cell.source = cell.source.replace(SIZE, SMALL)
    NotebookClient(notebook, timeout=300).execute()
    assert [kinds(cell) for cell in cells][1:] == kept[1:]  # imports warn of what a machine lacks


def kinds(cell):
    return [output.output_type for output in cell.outputs if output.get("name") != "stderr"]
