import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from branchtree.data.prompts import load_conditions

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "recipes/prompts"
SETS = {"train": 24, "heldout": 8}
DIRECTIONS = {"left", "right", "up", "down"}


def rows(name: str, folder: Path = PROMPTS) -> list[dict[str, str]]:
    lines = (folder / f"scenes_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("build_scenes")


@pytest.mark.parametrize("name", SETS)
def test_every_line_names_a_whole_picture_of_the_recipes_size(name: str) -> None:
    conditions = load_conditions(str(PROMPTS / f"scenes_{name}.jsonl"), "prompt", "train")
    assert len(conditions) == SETS[name]
    for condition in conditions:
        assert condition.image is not None
        with Image.open(condition.image) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (640, 400))


def test_no_prompt_and_no_picture_comes_twice() -> None:
    both = [row for name in SETS for row in rows(name)]
    assert len({row["prompt"] for row in both}) == len(both)
    digests = {hashlib.sha256((PROMPTS / row["image"]).read_bytes()).digest() for row in both}
    assert len(digests) == len(both)


def test_no_two_pictures_show_nearly_the_same() -> None:
    small = [
        np.asarray(Image.open(PROMPTS / row["image"]).resize((32, 20)), dtype=np.float64)
        for name in SETS
        for row in rows(name)
    ]
    apart = [np.abs(one - other).mean() for place, one in enumerate(small) for other in small[:place]]
    assert min(apart) > 8


def test_about_half_of_the_prompts_name_a_direction() -> None:
    words = [set(row["prompt"].lower().strip(".").split()) for row in rows("train")]
    share = sum(bool(one & DIRECTIONS) for one in words) / len(words)
    assert 0.4 <= share <= 0.75
    assert set().union(*words) >= DIRECTIONS


def test_pictures_stay_small_and_none_is_left_over() -> None:
    files = set((PROMPTS / "scenes").iterdir())
    assert files == {PROMPTS / row["image"] for name in SETS for row in rows(name)}
    assert sum(file.stat().st_size for file in files) < 900_000


def test_building_again_gives_the_same(script: ModuleType, tmp_path: Path) -> None:
    """Pictures may differ by what another JPEG encoder does: two of 255 levels on average."""
    for name, scenes in (("train", script.TRAIN), ("heldout", script.HELD_OUT)):
        assert [scene.prompt for scene in scenes] == [row["prompt"] for row in rows(name)]
        script.write_set(tmp_path, name, scenes[:2])
        built = rows(name, tmp_path)
        assert built == rows(name)[:2]
        for row in built:
            again, committed = pixels(tmp_path / row["image"]), pixels(PROMPTS / row["image"])
            assert np.abs(again - committed).mean() <= 2
