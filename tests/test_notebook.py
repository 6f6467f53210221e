"""The notebook runs from its first cell to its last."""

import base64
import io

import nbclient
import nbformat
import numpy as np
from commands import COMPILATION, ROOT
from PIL import Image

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def pictures(cell):
    """The PNGs that a cell shows."""
    found = [output["data"]["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) for data in found]


def test_it_trains_samples_and_plots(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", COMPILATION)  # and one device
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # the same cells, fewer steps
        cell.source = cell.source.replace('num_steps=1000"', 'num_steps=40", "--config.optim.warmup_steps=10"')
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    text = "\n".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Next             python -m speedit_jax.sample" in text and "DiT-tiny/2 speedit step 40" in text
    shown = [picture for cell in notebook.cells for picture in pictures(cell)]
    assert len(shown) == 2 and all(picture.std() > 10 for picture in shown)
    error = float(text.rsplit("at t = 500: ", 1)[1].split()[0])
    assert 0 < error < 1, "better than predicting no noise at all"


def test_what_is_kept_of_its_output_is_whole():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
