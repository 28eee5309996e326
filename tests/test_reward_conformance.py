"""The promises of rewards, kept by every reward of ours, and broken by rewards that are wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import digit_clips
from guests import fake_distribution
from written_words import written_words

from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry
from branchtree.testing import RewardCase, RewardPromises, noise_media

PROMPTS = ("a photo of a cat", "a red seven", "two dogs, running", "mountains at dawn & a lake")
DISTRIBUTION = "branchtree-grpo"
ELSEWHERE = {"remote": "needs a server; its own tests start one"}


def prompted(*prompts: str) -> list[Condition]:
    return [Condition(prompt) for prompt in prompts]


def moving_digits(modality: str, samples: int) -> Media:
    return Media(videos=digit_clips(samples, seed=3).videos, fps=8.0)


def small(name: str, conditions: Sequence[Condition] | None = None) -> RewardCase:
    return RewardCase({"reward": name, "path": "random:small", "batch": 3}, conditions or prompted(*PROMPTS))


def edits() -> list[Condition]:
    """Conditions with an image each."""
    frames = Path(__file__).parents[1] / "recipes/prompts/moving_digits"
    return [Condition(prompt, image=frames / f"train_{row:03d}.png") for row, prompt in enumerate(PROMPTS)]


def motion(name: str, measure: str) -> RewardCase:
    directions = prompted("a digit moving left", "moving right", "a digit that moves up", "moving down")
    return RewardCase({"reward": name, "measure": measure}, directions, moving_digits)


def large_pairs(modality: str, samples: int) -> Media:
    """Two frames of 128x128 pixels, the least that RAFT sees motion in."""
    frames = noise_media(modality, samples).videos
    assert frames is not None
    larger = torch.nn.functional.interpolate(frames[:, :2].flatten(0, 1), (128, 128), mode="bilinear")
    return Media(videos=larger.unflatten(0, (samples, 2)), fps=8.0)


def seeking(*objects: tuple[str, int]) -> Condition:
    """A condition whose metadata ask for objects, and for a red cup left of the first."""
    wanted: list[dict[str, Any]] = [{"class": name, "count": count} for name, count in objects]
    cup = {"class": "cup", "count": 1, "color": "red", "position": ["left of", 0]}
    return Condition("a picture", metadata={"include": [*wanted, cup], "exclude": [{"class": "cat", "count": 2}]})


def words(modality: str, samples: int) -> Media:
    return Media(images=written_words(["TREE", "CAT", "STONE", "QUIZ", "TREES", "COT"][:samples]))


DIGITS = prompted("a handwritten seven", "the digit 3", "a one", "a five")
MOTIONS = ("motion_smoothness", "motion_direction", "motion_displacement")
CASES: Mapping[str, RewardCase] = {
    "digits": RewardCase({"reward": "digits"}, DIGITS),
    "diversity": RewardCase({"reward": "diversity"}, prompted(*["a cat"] * 4)),
    **{name: motion(name, "flow") for name in MOTIONS},
    "vbench_dynamic": RewardCase(
        {"reward": "vbench_dynamic", "path": "random:small", "measure": "share"}, prompted(*PROMPTS), large_pairs
    ),
    "vbench_smoothness": RewardCase({"reward": "vbench_smoothness", "interpolator": "blend"}, prompted(*PROMPTS)),
    "geneval": RewardCase(
        {"reward": "geneval", "path": "random:small", "batch": 3},
        [seeking(("cat", 1)), seeking(("dog", 2), ("cat", 1)), seeking(("bench", 1)), seeking(("bus", 3))],
        refused=[Condition("a cat"), Condition("two dogs", metadata={"include": [{"class": "dog", "count": 0}]})],
    ),
    **{
        f"ocr-{engine}": RewardCase(
            {"reward": "ocr", "engine": engine},
            prompted('"TREE"', 'a sign: "COAT"', '"TONE"', 'the word "IVY"'),
            words,
            refused=[Condition("a tree"), Condition('""')],
        )
        for engine in ("v6", "v4")
    },
    "clip_similarity": small("clip_similarity", conditions=edits()),
    "motion_direction-subject": motion("motion_direction", "subject"),
}


def all_cases() -> Mapping[str, RewardCase]:
    """The cases above, and each other reward of the library with the small checkpoint that it writes itself."""
    named = {case.reward["reward"] for case in CASES.values()} | ELSEWHERE.keys()
    others = [
        name
        for name, entry in registry().rewards.items()
        if entry.distribution == DISTRIBUTION and name not in named and "path" in entry.config.model_fields
    ]
    return {**CASES, **{name: small(name) for name in others}}


@pytest.fixture(scope="module", params=all_cases())
def case(request: pytest.FixtureRequest) -> RewardCase:
    return all_cases()[request.param]


class TestOurs(RewardPromises):
    """Every reward of the library."""


def test_no_reward_of_ours_is_left_out() -> None:
    tested = {case.reward["reward"] for case in all_cases().values()} | ELSEWHERE.keys()
    assert {name for name, entry in registry().rewards.items() if entry.distribution == DISTRIBUTION} <= tested


SOUND = ("PlainVideos", "NeedsNothing", "Compares", "Leaves")
BROKEN = {
    "SaysMoreLater": "it_says_what_it_scores",
    "MisreadCard": "it_says_what_it_scores",
    "BreaksUnloaded": "it_scores_only_what_is_loaded",
    "GuessesUnloaded": "it_scores_only_what_is_loaded",
    "GivesColumns": "each_sample_gets_a_number_and_a_flag",
    "GivesDoubles": "each_sample_gets_a_number_and_a_flag",
    "FlagsByNumbers": "each_sample_gets_a_number_and_a_flag",
    "KeepsGradients": "each_sample_gets_a_number_and_a_flag",
    "TakesVideosToo": "what_it_cannot_score_is_refused",
    "RefusesItsOwn": "what_its_check_refuses_is_not_scored",
    "SpreadsOnePrompt": "what_it_cannot_score_is_refused",
    "CutsToBytes": "samples_that_are_not_finite_are_not_valid",
    "SpoilsTheBatch": "samples_that_are_not_finite_are_not_valid",
    "MeasuresAgainstTheBatch": "a_score_does_not_know_its_batch",
    "TakesTheFirstPrompt": "a_score_does_not_know_its_batch",
    "LosesTheOrder": "a_score_does_not_know_its_batch",
    "PrefersTheFirst": "a_group_has_no_order",
    "Drifts": "the_same_samples_get_the_same_scores",
    "WritesIntoSamples": "the_same_samples_get_the_same_scores",
    "ForgetsOnRelease": "it_scores_as_before_after_leaving_the_device",
    "SeedsTorch": "it_leaves_the_global_random_state_alone",
    "DrawsFromNumpy": "it_leaves_the_global_random_state_alone",
    "DrawsFromPython": "it_leaves_the_global_random_state_alone",
    "SignsByItsAddress": "its_fingerprint_is_that_of_its_scores",
}
"""Rewards of ``broken_rewards.py``, and the promise that each of them must be seen to break."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RewardCase]]:
    """Cases of the rewards in ``broken_rewards.py``, installed as their author would have them."""
    module = (Path(__file__).parent / "broken_rewards.py").read_text(encoding="utf-8")
    site = tmp_path_factory.mktemp("rewards_site")
    fake_distribution(site, "other-rewards", {"other": "other_rewards"}, {"other_rewards": module})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        registry.cache_clear()
        yield lambda name: RewardCase({"reward": name}, prompted(*PROMPTS))
    registry.cache_clear()


PROMISES = {
    name.removeprefix("test_"): promise
    for name, promise in inspect.getmembers(RewardPromises, inspect.isfunction)
    if name.startswith("test_")
}


def broken(case: RewardCase, promise: str) -> bool:
    """Whether a promise is seen to be broken; one that is none of this reward's is skipped, and is not."""
    wanted = inspect.signature(PROMISES[promise]).parameters
    given = {"case": case, **{name: case.load() for name in ("loaded", "twin") if name in wanted}}
    try:
        PROMISES[promise](RewardPromises(), **given)
    except (AssertionError, pytest.fail.Exception):
        return True
    except pytest.skip.Exception:
        return False
    return False


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_reward_keeps_every_promise(name: str, theirs: Callable[[str], RewardCase]) -> None:
    assert [promise for promise in PROMISES if broken(theirs(name), promise)] == []


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_reward_that_breaks_a_promise_is_found_out(name: str, theirs: Callable[[str], RewardCase]) -> None:
    with torch.random.fork_rng(devices=[]):
        assert broken(theirs(name), BROKEN[name])


def test_every_promise_is_seen_broken() -> None:
    assert set(BROKEN.values()) == PROMISES.keys()


def test_a_case_needs_four_conditions() -> None:
    with pytest.raises(ValueError, match="at least four conditions"):
        RewardCase({"reward": "digits"}, DIGITS[:3]).samples()


def test_noise_is_media_of_8_bits_and_never_the_same() -> None:
    images, videos = (noise_media(modality, 4) for modality in ("image", "video"))
    assert images.pixels.shape == (4, 3, 40, 48)
    assert videos.pixels.shape == (4, 9, 3, 40, 48)
    for media in (images, videos):
        levels = media.pixels * 255
        assert float((levels - levels.round()).abs().max()) < 1e-3
        assert 0 <= float(media.pixels.min()) < float(media.pixels.max()) <= 1
        assert len(set(media.pixels.flatten(1).mean(dim=1).tolist())) == 4
