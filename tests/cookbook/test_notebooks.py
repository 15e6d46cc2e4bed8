"""Every cookbook notebook runs from top to bottom and ends with the result it promises."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

COOKBOOK = Path(__file__).parents[2] / "cookbook"
NOTEBOOKS = sorted(COOKBOOK.glob("*.ipynb"))


def last_table(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The cells of the Markdown table that the last cell shows, header first."""
    [output] = notebook.cells[-1].outputs
    lines = output.data["text/markdown"].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def check_quickstart(notebook: nbformat.NotebookNode) -> None:
    header, *rows = last_table(notebook)
    assert header == ["question", "outcome", "harm", "after", "what came out"]
    assert len(rows) == 5
    for _, outcome, harm, after, text in rows:
        assert outcome in ("passed", "detoxified", "withheld")
        assert re.fullmatch(r"[01]\.\d\d", harm)
        assert bool(after) == (outcome != "passed")
        assert text
    assert rows[0][1] == "passed"


def check_calibrate(notebook: nbformat.NotebookNode) -> None:
    header, *rows = last_table(notebook)
    assert header == ["detector", "threshold", "safe answers flagged", "harmful answers found"]
    assert [name for name, *_ in rows] == ["shipped", "calibrated"]
    counts = []
    for _, threshold, *shares in rows:
        assert 0 < float(threshold) < 1
        assert all(re.fullmatch(r"\d+ of 12", share) for share in shares)
        flagged, found = (int(share.removesuffix(" of 12")) for share in shares)
        assert flagged < found <= 12
        counts.append((flagged, found))
    assert rows[0][1] != rows[1][1]
    # A calibration keeps the order of the scores, so that both counts move the same way, if they move.
    changes = [after - before for before, after in zip(*counts, strict=True)]
    assert min(changes) >= 0 or max(changes) <= 0


async def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs all cells in `folder` with the interpreter of this test, over sockets that are files."""
    with TemporaryDirectory() as sockets:  # a short path: names of such sockets have at most about 100 characters
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            transport="ipc",
            ip=f"{sockets}/kernel",
        )
        place = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, km=manager, startup_timeout=120, timeout=240, resources=place)
        await client.async_execute(cleanup_kc=True)


CHECKS = {"01_quickstart": check_quickstart, "02_calibrate": check_calibrate}


def test_every_notebook_has_a_check():
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_shows_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not re.search(r"/home/|/root/|/Users/|/tmp/", path.read_text(encoding="utf-8"))
    CHECKS[path.stem](notebook)


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
async def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    await execute(notebook, tmp_path)
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert streams == []
    CHECKS[path.stem](notebook)
    assert list(tmp_path.iterdir()) == []
