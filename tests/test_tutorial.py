"""The tutorial notebook, run from top to bottom in a kernel of its own."""

import os
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path("docs/tutorial.ipynb")


def shown(cell):
    """All text that a cell's outputs show."""
    parts = [
        str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", "")) for out in cell.get("outputs", [])
    ]
    return "\n".join(parts)


def test_tutorial__is_kept_with_its_outputs_and_names_no_place_of_the_machine_it_ran_on():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and sum(bool(cell.outputs) for cell in code) >= 7
    told = "\n".join(map(shown, code))
    assert "eval/knn_top1" in told and not any(word in told for word in ("/tmp", "/home", "/work", "/root", "Error"))


@pytest.fixture
def short_folder():
    """A folder of a short name: Ray's sockets lie in it, whose paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="amt-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_tutorial__runs_from_top_to_bottom(monkeypatch, short_folder):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    monkeypatch.setenv("IPYTHONDIR", short_folder)
    monkeypatch.setenv("TMPDIR", short_folder)  # where the notebook puts its runs
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": TUTORIAL.parent}}
    )
    client.execute()
    table = shown(notebook.cells[-3])
    assert "random" in table and table.count("amt") == 2
