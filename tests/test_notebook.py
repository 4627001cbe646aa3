"""The notebook is its source's, holds no outputs, and runs from top to bottom on a shrunk config."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "colab" / "quickstart.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_its_source(notebook):
    made = jupytext.read(SOURCE)
    cells = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in made.cells]
    stored = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
    assert stored == cells, "run `make notebook`"
    assert notebook.metadata.accelerator == made.metadata.accelerator == "GPU"


def test_notebook_source_holds_no_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "clear the outputs, then run `make notebook`"


def with_parameters(notebook: nbformat.NotebookNode, **values: str) -> nbformat.NotebookNode:
    """The notebook with a cell that sets `values` after the one tagged `parameters`."""
    changed = copy.deepcopy(notebook)
    [index] = [i for i, cell in enumerate(changed.cells) if "parameters" in cell.metadata.get("tags", [])]
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    changed.cells.insert(index + 1, nbformat.v4.new_code_cell(source))
    return changed


def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a first user has
    # The kernel of this very environment, whatever kernels the user has installed.
    kernels = tmp_path / "kernels" / "python3"
    kernels.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernels / "kernel.json").write_text(repr(spec).replace("'", '"'))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = with_parameters(notebook, config="configs/quickstart.py:tiny", workdir=str(tmp_path / "run"))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3, "the loss curves, the samples and the image that is asked about"
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Training will run on" in text
    assert (tmp_path / "run" / "report.json").is_file()
