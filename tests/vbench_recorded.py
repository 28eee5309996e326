"""What VBench's own code said of random weights, as scripts/record_vbench.py recorded it, and those weights."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def recorded(name: str) -> Any:
    """The content of one of the recorded files."""
    return json.loads((ROOT / "tests" / "data" / "rewards" / f"vbench_{name}.json").read_text(encoding="utf-8"))


@functools.cache
def recorder() -> ModuleType:
    """The script, whose functions say what the weights and frames were."""
    spec = importlib.util.spec_from_file_location("record_vbench", ROOT / "scripts" / "record_vbench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
