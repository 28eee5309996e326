"""Datasets of the hub as prompts: from repositories as they lie on a disk, which the same library reads offline."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from PIL import Image

from branchtree.data.prompts import load_conditions, training_conditions
from branchtree.errors import DataError
from branchtree.planning.plan import plan_recipe
from branchtree.recipe import load_recipe
from branchtree.recipe.build import make_model
from branchtree.studies.common.subject import Subject
from branchtree.studies.evaluate.request import EvaluationChoices, make_evaluation_request
from branchtree.training.inputs import read_inputs

datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
# Pictures and what people said of them
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(level: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("L", (4, 4), level).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{level}.png"}


def publish(folder: Path, features: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Write a dataset's repository, parquet files and a card with its splits; returns the name for ``data.prompts``."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    for split in ("train", "test"):
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return f"hub:{folder}"


BROKEN = {"bytes": b"no picture at all", "path": None}
PICTURES = {
    "one picture": (datasets.Image(), png(3)),
    "a picture that cannot be decoded": (datasets.Image(), BROKEN),
    "pictures": ([datasets.Image()], [png(1), BROKEN]),
    "pictures beside their ranks": ({"picture": datasets.Image(), "rank": datasets.Value("int32")}, None),
}


@pytest.mark.parametrize("key", ["image", "last_image", "video", "jpg"])
@pytest.mark.parametrize("kind", PICTURES)
def test_columns_of_pictures_are_neither_decoded_nor_in_the_way(kind: str, key: str, tmp_path: Path) -> None:
    feature, value = PICTURES[kind]
    value = {"picture": BROKEN, "rank": 1} if value is None else value
    name = publish(
        tmp_path / "set",
        {"prompt": datasets.Value("string"), key: feature, "score": datasets.Value("float32")},
        [{"prompt": "a cat", key: value, "score": 0.5}, {"prompt": "a dog", key: None, "score": 1.0}],
    )
    for media in ((), ("image", "last_image", "video")):
        first, second = load_conditions(name, "prompt", "train", media=media)
        assert (first.prompt, first.image, first.last_image, first.video) == ("a cat", None, None, None)
        assert (first.metadata, second.metadata) == ({"score": 0.5}, {"score": 1.0})


LISTED = {"prompt": datasets.Value("string"), "image": [datasets.Value("string")], "rank": [datasets.Value("int32")]}
NAMED = {"prompt": datasets.Value("string"), "image": datasets.Value("string")}


@pytest.mark.parametrize(
    ("features", "row"),
    [
        (LISTED, {"prompt": "a handwritten seven", "image": ["a.jpg", "b.jpg"], "rank": [1, 0]}),
        (NAMED, {"prompt": "a handwritten seven", "image": "a.jpg"}),
    ],
    ids=["lists of names", "names"],
)
def test_media_that_the_model_does_not_take_are_ignored(
    features: dict[str, Any], row: dict[str, Any], tmp_path: Path
) -> None:
    name = publish(tmp_path / "set", features, [row])
    recipe = load_recipe("quickstart", {"data.prompts": name, "evaluation.prompts": name, "batch.prompts": 1})
    inputs = read_inputs(recipe)
    assert [condition.image for condition in (*inputs.conditions, *inputs.held_out_conditions)] == [None, None]
    assert plan_recipe(recipe).rollout_rows == 203
    assert [one.prompt for one in make_evaluation_request(Subject(recipe), EvaluationChoices()).conditions] == [
        row["prompt"]
    ]
    with pytest.raises(DataError, match="row 1: image"):
        load_conditions(name, "prompt", "train")  # for a model that looks at images


def test_a_video_model_says_why_it_has_no_first_frame(tmp_path: Path) -> None:
    name = publish(
        tmp_path / "set",
        {"prompt": datasets.Value("string"), "image": datasets.Image()},
        [{"prompt": "a seven moves left", "image": png(1)}],
    )
    recipe = load_recipe("wan_quickstart", {"data.prompts": name, "evaluation": None})
    with pytest.raises(DataError, match=r"set \(without 'image', no paths of files\): row 1.*has no first frame"):
        read_inputs(recipe)
    text = load_recipe("wan_t2v_motion", {"data.prompts": name})
    assert [condition.image for condition in training_conditions(text.data, make_model(text))] == [None]


def test_a_loading_script_is_refused_with_the_remedy_and_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "HPDv2"
    folder.mkdir()
    (folder / "HPDv2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(DataError) as refused:
        load_conditions(f"hub:{folder}", "prompt", "test", section="evaluation")
    message = str(refused.value)
    assert message.startswith(f"hub:{folder}: this dataset is a loading script")
    assert f"hf download {folder} FILE --repo-type dataset" in message
    assert message.endswith("one a line, and set evaluation.prompts to it")
    assert "\n" not in message
    assert not (tmp_path / "ran").exists()


def test_the_extra_asks_for_a_version_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [Requirement(text) for text in project["optional-dependencies"]["hub"]]
    assert needed.name == "datasets"
    assert needed.specifier.contains(datasets.__version__)
    name = publish(tmp_path / "set", {"prompt": datasets.Value("string")}, [{"prompt": "a cat"}])
    for version in ("3.6.0", "2.21.0"):  # these offer to run the code of a dataset
        assert not needed.specifier.contains(version)
        monkeypatch.setattr(datasets, "__version__", version)
        with pytest.raises(DataError, match=f"needs version 4 or later of 'datasets', and {version} is installed"):
            load_conditions(name, "prompt", "train")
