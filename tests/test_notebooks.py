"""The notebooks of the documentation: their own cells run, with few steps; what they show is their output."""

import os
import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: notebooks are not run")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: notebooks are not run")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: notebooks are not run")

REPO = pathlib.Path(__file__).resolve().parent.parent
ABLATION = REPO / "docs" / "notebooks" / "reward_ablation.ipynb"


def shown(notebook, kind):
    """Everything of one type that the cells display."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output["data"][kind] for output in outputs if kind in output.get("data", {}))


def rows(table):
    """The first column of a Markdown table."""
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]


def test_the_reward_ablation_runs(tmp_path):
    notebook = nbformat.read(ABLATION, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    alone = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")  # what a laptop has
    env = {"GTALIGN_NOTEBOOK": "seconds", "GTALIGN_WORKDIR": str(tmp_path), "XLA_FLAGS": alone}
    env["PYTHONPATH"] = str(REPO)
    client.execute(env={**os.environ, **env})
    made = shown(notebook, "text/markdown")
    assert rows(made)[:3] == ["", "sft", "user"]
    assert "<svg" in shown(notebook, "image/svg+xml")
    assert (tmp_path / "runs" / "start" / "summary.json").is_file()
    assert rows(made) == rows(shown(nbformat.read(ABLATION, as_version=4), "text/markdown"))


def test_what_the_site_shows_was_printed_by_these_cells_in_their_order():
    cells = [cell for cell in nbformat.read(ABLATION, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
