"""The prompts for text-to-image models that come with the recipes: many, all different, and apart from the held-out."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from branchtree.data.prompts import held_out_conditions, load_conditions, training_conditions
from branchtree.recipe import load_recipe, recipe_names
from branchtree.recipe.load import builtin_folder

PROMPTS = builtin_folder() / "prompts"
SETS = {"images_train": 400, "images_heldout": 100}
ALIKE = 0.2
"""Share of word triples in common, of all that two prompts have, from which one counts as a copy of the other."""


@cache
def prompts(name: str) -> tuple[str, ...]:
    return tuple(one.prompt for one in load_conditions(str(PROMPTS / f"{name}.txt"), "prompt", "train"))


def triples(prompt: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"[\w']+", prompt.lower())
    return frozenset(tuple(words[start : start + 3]) for start in range(max(len(words) - 2, 1)))


def likeness(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("name", SETS)
def test_there_are_as_many_as_the_page_says(name: str) -> None:
    assert len(prompts(name)) == SETS[name]
    assert all(prompt == " ".join(prompt.split()) for prompt in prompts(name))


def test_no_prompt_comes_twice_nor_nearly_so() -> None:
    both = [prompt for name in SETS for prompt in prompts(name)]
    assert len({prompt.lower() for prompt in both}) == len(both)
    made = [triples(prompt) for prompt in both]
    alike = [
        (both[place], both[before])
        for place, one in enumerate(made)
        for before, other in enumerate(made[:place])
        if one & other and likeness(one, other) >= ALIKE
    ]
    assert alike == []


def test_a_copy_with_a_word_changed_would_be_seen() -> None:
    one, other = "A snow leopard asleep on a grey ledge in winter", "A snow leopard asleep on a dark ledge in winter"
    assert likeness(triples(one), triples(other)) >= ALIKE


def test_short_and_long_ones_fit_into_clips_77_tokens() -> None:
    open_clip = pytest.importorskip("open_clip")
    encode = open_clip.tokenizer.SimpleTokenizer().encode
    lengths = sorted(len(encode(prompt)) + 2 for name in SETS for prompt in prompts(name))
    assert lengths[-1] <= 77
    assert lengths[len(lengths) // 10] <= 12
    assert lengths[-len(lengths) // 10] >= 24


def test_every_large_text_to_image_recipe_uses_them() -> None:
    names = [name for name in recipe_names([builtin_folder()]) if name.startswith("flux_t2i_")]
    assert len(names) >= 10
    for name in names:
        recipe = load_recipe(name)
        trained = [one.prompt for one in training_conditions(recipe.data)]
        judged = [one.prompt for one in held_out_conditions(recipe.evaluation)]
        assert (len(trained), len(judged)) == (400, 64)
        assert not {*trained} & {*judged}


def test_the_wheel_ships_what_the_recipes_name(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    import zipfile

    wheel = next(builder.WheelBuilder(str(Path(__file__).parents[1])).build(directory=str(tmp_path)))
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for model in ("digits_flux", "moving_digits_wan"):
        assert f"branchtree_adapters/assets/{model}/SHA256SUMS" in shipped
    for name in recipe_names([builtin_folder()]):
        recipe = load_recipe(name)
        for source in (recipe.data.prompts, recipe.evaluation.prompts if recipe.evaluation else ""):
            if isinstance(source, str) and source:
                assert f"branchtree/recipes/prompts/{Path(source).name}" in shipped


def test_the_page_shows_how_to_take_the_prompts_of_hpdv2(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "first_run.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python -c")]
    # As the publisher describes its files: several rows for a prompt, each a comparison of pictures.
    train = [
        {"human_preference": [1, 0], "prompt": 'A cat, "asleep"', "file_path": ["0.jpg", "1.jpg"]},
        {"human_preference": [0, 1], "prompt": 'A cat, "asleep"', "file_path": ["2.jpg", "3.jpg"]},
        {"human_preference": [0, 1], "prompt": "une île\nau loin", "file_path": ["4.jpg", "5.jpg"]},
    ]
    test = [{"prompt": "A dog", "image_path": ["6.jpg"], "rank": [1], "raw_annotations": []}]
    (tmp_path / "hpdv2").mkdir()
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / "hpdv2" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    assert len(commands) == 2
    for command in commands:
        subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    recipe = load_recipe(
        "flux_t2i_branchgrpo",
        {
            "data.prompts": str(tmp_path / "hpdv2/train.jsonl"),
            "evaluation.prompts": str(tmp_path / "hpdv2/test.jsonl"),
        },
    )
    assert [one.prompt for one in training_conditions(recipe.data)] == ['A cat, "asleep"', "une île\nau loin"]
    assert [one.prompt for one in held_out_conditions(recipe.evaluation)] == ["A dog"]
