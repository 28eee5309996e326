"""Train a recipe's small version on the pretended GPU and print what was counted.

PYTHONPATH=tests python -m pretend_gpu RECIPE [cuda|cuda:0] [key=value ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml

from branchtree import train
from pretend_gpu import pretend_gpu


def main(recipe: str, device: str = "cuda", *words: str) -> None:
    """Train and print."""
    overrides = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    with tempfile.TemporaryDirectory() as folder, pretend_gpu(device) as counts:
        result = train(recipe, overrides, smoke=True, output=Path(folder) / "run")
        print(f"{result.iterations} iterations\n{counts.table()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
