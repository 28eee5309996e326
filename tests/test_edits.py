"""The drawn pictures and instructions that image-editing recipes are tried on."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from branchtree.data.prompts import load_conditions

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "recipes/prompts"
SETS = {"train": 12, "heldout": 6}
SIZES = {(128, 128), (160, 96), (96, 160)}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("build_edits")


@pytest.mark.parametrize("name", SETS)
def test_every_line_names_a_picture_of_one_of_three_shapes(name: str) -> None:
    conditions = load_conditions(str(PROMPTS / f"edits_{name}.jsonl"), "prompt", "train")
    assert len(conditions) == SETS[name]
    found = set()
    for condition in conditions:
        [path] = condition.images
        with Image.open(path) as image:
            found.add(image.size)
            assert image.format == "PNG" and len(image.convert("RGB").getcolors() or ()) > 2
        assert path.stat().st_size < 2000
    assert found == SIZES


def test_the_files_are_those_that_the_script_draws(script: ModuleType, tmp_path: Path) -> None:
    for name in SETS:
        script.write_set(tmp_path, name)
        listed = f"edits_{name}.jsonl"
        assert (tmp_path / listed).read_bytes() == (PROMPTS / listed).read_bytes()
    drawn = sorted(path.name for path in (tmp_path / "edits").iterdir())
    assert drawn == sorted(path.name for path in (PROMPTS / "edits").iterdir())
    for name in drawn:  # the bytes follow from the version of zlib, too
        with Image.open(tmp_path / "edits" / name) as ours, Image.open(PROMPTS / "edits" / name) as theirs:
            assert ours.convert("RGB").tobytes() == theirs.convert("RGB").tobytes()
