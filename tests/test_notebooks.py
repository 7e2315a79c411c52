"""The notebooks, stored without results, and the documents: their code runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def clean_kernel(directory: Path) -> AsyncKernelManager:
    """A kernel of this very interpreter, whatever kernels the user has installed."""
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "test", "language": "python"}
    folder = directory / "kernels" / "test"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(
        kernel_dirs=[str(folder.parent)], ensure_native_kernel=False
    )
    return AsyncKernelManager(kernel_name="test", kernel_spec_manager=specs)


def clean_environment() -> dict[str, str]:
    """This process's environment, without an instruction set of the user's choice."""
    return {name: value for name, value in os.environ.items() if name != "KTJAX_ISA"}


def test_both_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["01_explore_experts", "02_train_lora"]


@by_name
def test_stored_without_results(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


@by_name
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        km=clean_kernel(tmp_path),
        timeout=240,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    # Without the user's IPython start-up files.
    environment = clean_environment() | {"IPYTHONDIR": str(tmp_path / "ipython")}
    client.execute(env=environment)  # raises with the cell's traceback
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    warnings = [out.text for out in outputs if out.get("name") == "stderr"]
    assert not warnings
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 3


@pytest.mark.parametrize("name", ["README.md", "docs/training.md"])
def test_code_of_documents_runs(name, tmp_path):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    # One program: later blocks use what earlier ones define.
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
