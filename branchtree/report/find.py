"""The runs of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from branchtree.errors import OutputError
from branchtree.report.read import Run, read_run
from branchtree.run.directory import METRICS, RunDirectory


def find_runs(folder: Path) -> list[Run]:
    """Return the runs at any depth of a folder, those first that wrote last; a run without an iteration is left out.

    Raises OutputError if the folder is none, or if a run in it cannot be read.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: is no folder; give the one that runs lie in")
    written: list[tuple[float, Path]] = []
    for root, folders, names in os.walk(folder):
        path = Path(root)
        if RunDirectory(path).recipe_file.name in names and METRICS in names:
            folders.clear()  # what lies in a run is its own
            written.append(((path / METRICS).stat().st_mtime, path))
    return [read_run(path) for _, path in sorted(written, reverse=True)]
