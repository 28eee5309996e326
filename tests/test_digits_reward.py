import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import get_args

import pydantic
import pytest
import torch
import torch.nn.functional as F
from branchtree_rewards.digits import (
    DIGIT_WORDS,
    ClassifierName,
    DigitClassifier,
    Digits,
    DigitsConfig,
    load_classifier,
    named_digit,
)
from torch import Tensor

from branchtree.plugins import Condition, Media

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_digits", SCRIPTS / "_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def real_digits(digits_data: ModuleType) -> tuple[Tensor, Tensor]:
    images, labels = digits_data.digit_images()
    return images, labels


def loaded(**settings: str) -> Digits:
    reward = Digits(DigitsConfig.model_validate(settings))
    reward.load(CPU)
    return reward


def conditions(digits: list[int]) -> list[Condition]:
    return [Condition(prompt=f"a handwritten {DIGIT_WORDS[digit]}") for digit in digits]


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("a handwritten seven", 7),
        ("the digit 0", 0),
        ("Number NINE, please", 9),
        ("the digit 7 (seven)", 7),
        ("a kitten", None),
        ("", None),
        ("a three or a four", None),
        ("3 and four", None),
        ("the number 42", None),
        ("a seven beside 42", None),
        ("seventeen", None),
        ("someone", None),
    ],
)
def test_named_digit(prompt: str, digit: int | None) -> None:
    assert named_digit(prompt) == digit


@pytest.mark.parametrize("classifier", ["reward", "heldout"])
def test_classifier_is_accurate_on_the_half_it_never_saw(
    classifier: str, digits_data: ModuleType, real_digits: tuple[Tensor, Tensor]
) -> None:
    images, labels = real_digits
    first, second = digits_data.disjoint_halves(len(images))
    assert not set(first.tolist()) & set(second.tolist())
    unseen = second if classifier == "reward" else first
    reward = loaded(classifier=classifier, measure="accuracy")
    scores = reward.score(Media(images=images[unseen]), conditions(labels[unseen].tolist()))
    assert scores.valid.all()
    assert scores.values.mean() >= 0.97


@pytest.mark.parametrize("classifier", ["reward", "heldout"])
def test_right_prompts_score_above_wrong_ones(classifier: str, real_digits: tuple[Tensor, Tensor]) -> None:
    images, labels = real_digits[0][:200], real_digits[1][:200]
    reward = loaded(classifier=classifier)
    right = reward.score(Media(images=images), conditions(labels.tolist())).values
    wrong = reward.score(Media(images=images), conditions(((labels + 1) % 10).tolist())).values
    assert right.dtype == torch.float32
    assert right.shape == (200,)
    assert right.max() <= 0
    assert right.median() > -0.3
    assert wrong.median() < -3
    assert (right > wrong).float().mean() > 0.98


@pytest.mark.parametrize("classifier", ["reward", "heldout"])
def test_a_videos_last_frame_is_read_wherever_the_digit_lies(
    classifier: str, digits_data: ModuleType, real_digits: tuple[Tensor, Tensor]
) -> None:
    images, labels = real_digits
    unseen = digits_data.disjoint_halves(len(images))[1 if classifier == "reward" else 0][:400]
    small = F.interpolate(images[unseen], size=(16, 16), mode="bilinear", antialias=True)
    videos = torch.zeros(400, 5, 1, 32, 32)
    videos[:, 0] = images[unseen].flip(0)  # what is shown before the last frame does not matter
    for row, (top, left) in enumerate(torch.randint(0, 17, (400, 2), generator=torch.Generator().manual_seed(0))):
        videos[row, -1, :, top : top + 16, left : left + 16] = small[row]
    reward = loaded(classifier=classifier, measure="accuracy")
    scores = reward.score(Media(videos=videos), conditions(labels[unseen].tolist()))
    assert scores.valid.all()
    assert scores.values.mean() >= 0.95


@pytest.mark.parametrize("classifier", ["reward", "heldout"])
def test_images_of_nothing_show_no_digit(classifier: str) -> None:
    noise = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.zeros(10, 3, 32, 32), noise])
    scores = loaded(classifier=classifier).score(Media(images=images), conditions([*range(10), *range(10)]))
    assert scores.values.max() < -1


def test_colour_and_size_do_not_matter(real_digits: tuple[Tensor, Tensor]) -> None:
    images, labels = real_digits[0][:64], real_digits[1][:64]
    reward = loaded()
    expected = reward.score(Media(images=images), conditions(labels.tolist())).values
    colour = reward.score(Media(images=images.repeat(1, 3, 1, 1)), conditions(labels.tolist())).values
    torch.testing.assert_close(colour, expected)
    large = F.interpolate(images, size=(80, 96), mode="bilinear", antialias=True)
    resized = reward.score(Media(images=large), conditions(labels.tolist())).values
    assert (resized - expected).abs().mean() < 0.1


def test_every_image_is_scored_on_its_own(real_digits: tuple[Tensor, Tensor]) -> None:
    images, labels = real_digits[0][:16], real_digits[1][:16]
    reward = loaded()
    together = reward.score(Media(images=images), conditions(labels.tolist())).values
    alone = [reward.score(Media(images=images[i : i + 1]), conditions([int(labels[i])])).values for i in range(16)]
    torch.testing.assert_close(torch.cat(alone), together)


def test_items_without_one_named_digit_are_invalid(real_digits: tuple[Tensor, Tensor]) -> None:
    images = real_digits[0][:4].clone()
    images[3, 0, 0, 0] = float("nan")
    prompts = ["a handwritten zero", "a kitten", "a three or a four", "a handwritten three"]
    scores = loaded().score(Media(images=images), [Condition(prompt=prompt) for prompt in prompts])
    assert scores.valid.dtype == torch.bool
    assert scores.valid.tolist() == [True, False, False, False]


def test_misuse_is_reported(real_digits: tuple[Tensor, Tensor]) -> None:
    media = Media(images=real_digits[0][:3])
    with pytest.raises(RuntimeError, match="load"):
        Digits(DigitsConfig()).score(media, conditions([1, 2, 3]))
    reward = loaded()
    with pytest.raises(ValueError, match="3 samples came with 2 conditions"):
        reward.score(media, conditions([1, 2]))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        reward.score(Media(images=torch.zeros(3, 32, 32)), conditions([1, 2, 3]))
    with pytest.raises(ValueError, match=r"\(B, F, C, H, W\)"):
        reward.score(Media(videos=torch.zeros(3, 3, 32, 32)), conditions([1, 2, 3]))
    with pytest.raises(ValueError, match="4 samples came with 2 conditions"):
        reward.score(Media(videos=torch.zeros(4, 2, 3, 32, 32)), conditions([1, 2]))
    with pytest.raises(pydantic.ValidationError):
        DigitsConfig.model_validate({"clasifier": "reward"})


def test_classifiers_are_small_and_differ() -> None:
    networks = [load_classifier(name, CPU) for name in get_args(ClassifierName)]
    assert len(networks) == 4
    assert sum(parameter.numel() for parameter in DigitClassifier().parameters()) <= 60_000
    for network, other in itertools.combinations(networks, 2):
        assert not torch.equal(network.head.weight, other.head.weight)
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())


def test_prompt_files_name_every_digit_and_share_no_prompt(digits_data: ModuleType) -> None:
    train, heldout = (digits_data.read_prompts([file]) for file in digits_data.PROMPT_FILES)
    assert not set(train) & set(heldout)
    assert {len(group) for group in digits_data.prompts_by_digit(train)} == {6}
    assert {len(group) for group in digits_data.prompts_by_digit(heldout)} == {3}
