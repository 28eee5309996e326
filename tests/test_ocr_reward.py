"""The `ocr` reward: what its readers read, how its score is formed, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from branchtree_rewards.ocr.readers import Engine, open_reader
from branchtree_rewards.ocr.reward import Ocr, OcrConfig
from branchtree_rewards.ocr.text import edit_distance, likeness, plain, quoted_text
from hypothesis import given
from hypothesis import strategies as st
from written_words import written, written_words

from branchtree import load_recipe
from branchtree.errors import DataError, RewardError
from branchtree.planning.plan import plan_recipe
from branchtree.plugins import Condition, Media

CPU = torch.device("cpu")
ENGINES: tuple[Engine, ...] = ("v6", "v4")
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol", "cmb10")
WORDS = ("TREE", "CAT", "STONE", "QUIZ")


def loaded(**settings: object) -> Ocr:
    reward = Ocr(OcrConfig(**settings))  # type: ignore[arg-type]
    reward.load(CPU)
    return reward


def asked(*texts: str) -> list[Condition]:
    return [Condition(f'a sign that says "{text}"') for text in texts]


@pytest.fixture(scope="module", params=ENGINES)
def reward(request: pytest.FixtureRequest) -> Ocr:
    return loaded(engine=request.param)


# The text of a prompt


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('New York with "Hello World" written by fireworks', "Hello World"),
        ('a sign "ONE" beside a sign "TWO"', "ONE"),
        ("a cake that says “Joy”", "Joy"),
        ("no quotation marks", None),
        ('nothing between "  " them', None),
        ('only one " mark', None),
        ("it's a dog's 'bone'", None),
    ],
)
def test_the_target_is_the_first_quoted_text(prompt: str, text: str | None) -> None:
    assert quoted_text(prompt) == text


def test_spaces_and_case_do_not_count() -> None:
    assert plain(" Hello\u3000\nWORLD ") == "helloworld"


# The distance


def naive_distance(first: str, second: str) -> int:
    """The definition, by recursion on last characters."""
    if not first or not second:
        return len(first) + len(second)
    replaced = naive_distance(first[:-1], second[:-1]) + (first[-1] != second[-1])
    removed, inserted = naive_distance(first[:-1], second), naive_distance(first, second[:-1])
    return min(replaced, removed + 1, inserted + 1)


few_letters = st.text("abc", max_size=5)


@given(few_letters, few_letters)
def test_the_distance_is_that_of_the_definition(first: str, second: str) -> None:
    assert edit_distance(first, second) == naive_distance(first, second)


@given(few_letters, few_letters, few_letters)
def test_the_distance_is_a_metric(first: str, second: str, third: str) -> None:
    assert edit_distance(first, second) == edit_distance(second, first)
    assert (edit_distance(first, second) == 0) == (first == second)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(second, third)


@given(st.text("abc", min_size=1, max_size=3), st.text("abc", max_size=7))
def test_likeness_is_the_normalised_distance_from_0_to_1(target: str, read: str) -> None:
    assert likeness(target, read) == max(0, 1 - naive_distance(target, read) / len(target))


# Reading


@pytest.mark.parametrize("font", FONTS)
def test_both_readers_read_small_words_in_several_fonts(font: str, reward: Ocr) -> None:
    scores = reward.score(Media(images=written_words(WORDS, font=font)), asked(*WORDS))
    assert scores.values.tolist() == [1] * len(WORDS)
    assert scores.details["lines"].tolist() == [1] * len(WORDS)


def test_a_large_picture_is_read_line_by_line(reward: Ocr) -> None:
    picture = written(["HELLO", "World"], size=90, canvas=(640, 480))[None]
    scores = reward.score(Media(images=picture), asked("hello WORLD"))
    assert scores.values.tolist() == [1]
    assert scores.details["lines"].tolist() == [2]


def test_what_differs_costs_a_character_each(reward: Ocr) -> None:
    pictures = written_words(["STONE", "STONE", "STONE", "STONE", "ME"])
    scores = reward.score(Media(images=pictures), asked("STONE", "STORE", "TON", "BRICKS", "SOME"))
    assert scores.values.tolist() == pytest.approx([1, 1 - 1 / 5, 1 - 2 / 3, 0, 1 - 2 / 4])
    assert scores.details["exact"].tolist() == [1, 0, 0, 0, 0]


def test_a_picture_without_text_scores_0(reward: Ocr) -> None:
    pictures = torch.stack([torch.ones(3, 32, 128), torch.zeros(3, 32, 128)])
    assert reward.score(Media(images=pictures), asked("TREE", "TREE")).values.tolist() == [0, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_measures_differ_in_what_they_forgive(engine: Engine) -> None:
    media, conditions = Media(images=written_words(["STONE"] * 3)), asked("STONE", "TON", "STORE")
    expected = {"edit": [1, 1 - 2 / 3, 1 - 1 / 5], "contains": [1, 1, 1 - 1 / 5], "exact": [1, 0, 0]}
    for measure, values in expected.items():
        scores = loaded(engine=engine, measure=measure).score(media, conditions)
        assert scores.values.tolist() == pytest.approx(values), measure


def test_more_lines_than_allowed_score_0() -> None:
    pictures = torch.stack([written(lines, size=60, canvas=(320, 320)) for lines in (["TREE"], ["TREE", "CAT"])])
    media, conditions = Media(images=pictures), asked("TREE", "TREE CAT")
    assert loaded(boxes=1).score(media, conditions).values.tolist() == [1, 0]
    assert loaded(boxes=2).score(media, conditions).values.tolist() == [1, 1]
    with pytest.raises(ValueError, match="only counted with detect: true"):
        OcrConfig(boxes=1, detect=False)


def test_without_detection_the_picture_is_one_line() -> None:
    scores = loaded(detect=False).score(Media(images=written_words(WORDS)), asked(*WORDS))
    assert scores.values.tolist() == [1] * len(WORDS)


# What it refuses


def test_a_prompt_without_quoted_text_is_named_by_file_and_line(tmp_path: Path) -> None:
    prompts = tmp_path / "signs.txt"
    prompts.write_text('a sign that says "OPEN"\na sign that says CLOSED\n', encoding="utf-8")
    changes = {"data.prompts": str(prompts), "rewards": [{"reward": "ocr"}], "evaluation": None}
    recipe = load_recipe("quickstart", changes)
    with pytest.raises(DataError, match=r"signs\.txt:2.*quotes no text"):
        plan_recipe(recipe)


def test_unquoted_prompts_are_invalid_in_a_batch() -> None:
    conditions = [*asked("TREE"), Condition("a tree")]
    scores = loaded().score(Media(images=written_words(["TREE", "TREE"])), conditions)
    assert scores.valid.tolist() == [True, False]
    assert "quotes no text" in scores.reasons[1]


def test_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="scores image, not video"):
        loaded().score(Media(videos=torch.ones(1, 2, 3, 32, 128)), asked("TREE"))


@pytest.mark.parametrize(("engine", "package"), [("v6", "rapidocr"), ("v4", "rapidocr_onnxruntime")])
def test_a_missing_package_is_named(engine: Engine, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RewardError, match=rf"needs {package.replace('_', '-')}.*pip install"):
        open_reader(engine, detect=True)


def test_fingerprints_name_weights_and_settings() -> None:
    prints = [loaded(engine=engine, detect=detect).fingerprint() for engine in ENGINES for detect in (True, False)]
    assert len(set(prints)) == 4
    assert loaded().fingerprint() == prints[0]
