"""Runs every notebook of notebooks/ from top to bottom, on the CPU; a cell that raises fails the run.

    .venv/bin/python tools/run_notebooks.py [FOLDER]     keep the executed copies, with outputs, in FOLDER

The notebooks themselves are not changed.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECONDS_A_NOTEBOOK = 300


def run(path: pathlib.Path, kept: pathlib.Path | None) -> bool:
    """Executes one notebook in a fresh kernel; returns whether every cell ran."""
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_A_NOTEBOOK,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    error = None
    try:
        client.execute()
    except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.CellTimeoutError) as raised:
        error = raised
    if kept is not None:
        nbformat.write(notebook, kept / path.name)
    verdict = "failed" if error else "passed"
    print(f"{path.relative_to(ROOT)} {verdict} in {time.monotonic() - started:.0f} s", flush=True)
    if error:
        print(error)
    return error is None


def main() -> int:
    """Executes all notebooks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="where to keep what the notebooks print")
    kept = parser.parse_args().folder
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        # Kernels write connection files and profiles; these are kept apart from the user's own.
        for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            os.environ[name] = scratch
        results = [run(path, kept) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
