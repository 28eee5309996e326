"""The promises of ``branchtree.testing``, kept by every adapter of ours, and broken by adapters that are wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from forked import Python
from guests import GUEST, fake_distribution, run_code
from tiny_flux import tiny_flux
from tiny_wan import FRAMES, SIZE, Kind, tiny_wan, write_frame

from branchtree.plugins import Condition
from branchtree.plugins.registry import registry
from branchtree.testing import AdapterCase, LoadingPromises, SamplingPromises, TrainingPromises, WeightPromises

PROMPTS = ("a seven", "a three", "a one", "a five")
BRIGHTNESS = """
    from pydantic import BaseModel

    from branchtree.plugins.hookspecs import hookimpl
    from branchtree.core.scores import Scores


    class Config(BaseModel):
        pass


    class Brightness:
        modalities = frozenset({"image", "video"})

        def __init__(self, config):
            pass

        def load(self, device):
            pass

        def score(self, media, conditions):
            values = media.pixels.flatten(1).mean(dim=1)
            return Scores(values, values.isfinite())


    @hookimpl
    def register_rewards(register):
        register("brightness", build=Brightness, config=Config, summary="for images and videos")
"""


def flux(folder: Path) -> AdapterCase:
    return AdapterCase(
        model={"adapter": "flux", "path": str(tiny_flux(folder)), "height": 16, "width": 16, "max_sequence_length": 8},
        reward={"reward": "brightness"},
        prompts=PROMPTS,
        refused=[Condition("a seven", negative_prompt="blue")],
    )


def wan(folder: Path, kind: Kind, guidance: float, last_image: bool = False) -> AdapterCase:
    frames = [write_frame(folder / f"frame_{seed}.png", seed).name for seed in range(5)]
    rows = [
        {"prompt": prompt, "image": frames[place]} | ({"last_image": frames[place + 1]} if last_image else {})
        for place, prompt in enumerate(PROMPTS)
    ]
    if guidance > 1:
        rows[1]["negative_prompt"] = "blue"
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = {"adapter": "wan", "path": str(tiny_wan(folder, kind)), "height": SIZE, "width": SIZE, "frames": FRAMES}
    task = "image_to_video" if kind.image_to_video else "text_to_video"
    tokens = {} if kind.image_encoder else {"max_sequence_length": 8}
    first, last = folder / frames[0], folder / frames[1]
    return AdapterCase(
        model={**model, "task": task, "guidance": guidance, **tokens},
        reward={"reward": "brightness"},
        prompts=str(prompts) if kind.image_to_video else PROMPTS,
        refused=[
            Condition("a last frame alone", last_image=last),
            *([] if guidance > 1 else [Condition("a negative prompt", image=first, negative_prompt="blur")]),
            *([Condition("no such image", image=folder / "none.png")] if kind.image_to_video else []),
        ],
    )


CASES: dict[str, Callable[[Path], AdapterCase]] = {
    "flux": flux,
    "wan": partial(wan, kind=Kind(), guidance=5.0),
    "wan-text": partial(wan, kind=Kind(image_to_video=False), guidance=1.0),
    "wan-both-frames": partial(wan, kind=Kind(image_encoder=True, both_images=True), guidance=1.0, last_image=True),
}


@pytest.fixture(scope="module", autouse=True)
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A reward that any medium can be scored by, as its author would have it installed."""
    site = tmp_path_factory.mktemp("brightness_site")
    fake_distribution(site, "plain-brightness", {"brightness": "plain_brightness"}, {"plain_brightness": BRIGHTNESS})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        registry.cache_clear()
        yield
    registry.cache_clear()


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


class TestSampling(LoadingPromises, SamplingPromises):
    """Of every adapter, in every use of it."""


class TestWeights(WeightPromises):
    """Of each architecture; all have the methods of their adapter, and the last of Wan's also an image encoder."""

    @pytest.fixture(scope="class", params=["flux", "wan-both-frames"])
    @classmethod
    def case(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
        return CASES[request.param](tmp_path_factory.mktemp(request.param))


class TestRuns(TrainingPromises):
    """With every adapter."""

    @pytest.fixture(scope="class", params=["flux", "wan"])
    @classmethod
    def case(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
        return CASES[request.param](tmp_path_factory.mktemp(request.param))


def run_tests(folder: Path, code: str, *sites: Path, only: Sequence[str] = ()) -> dict[str, list[str]]:
    """Run a file of tests as its author would, in a process of its own; the names of its tests by outcome."""
    file, report = folder / "test_theirs.py", folder / "report.xml"
    file.write_text(code, encoding="utf-8")
    chosen = [f"{file}::{name}" for name in only] or [str(file)]
    # pytest warns of plug-ins that the forked process has imported already, with one of the large libraries.
    warnings = ["-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options = ["-q", *warnings, "-p", "no:cacheprovider", f"--rootdir={folder}", f"--junitxml={report}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sites))}
    done = Python("-m", "pytest", *options, *chosen, environment=environment)
    done.ended()
    assert report.is_file(), done.out + done.err
    outcomes: dict[str, list[str]] = {"passed": [], "skipped": [], "failure": [], "error": []}
    for test in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in test if child.tag in outcomes), "passed")
        outcomes[outcome].append(f"{test.attrib['classname'].rpartition('.')[2]}::{test.attrib['name']}")
    return outcomes


def test_a_case_needs_two_prompts(tmp_path: Path) -> None:
    case = flux(tmp_path)
    assert [condition.prompt for condition in case.conditions] == list(PROMPTS)
    for prompts in (("a seven",), ("a seven", "a seven", "a one")):
        with pytest.raises(ValueError, match="the first two must differ"):
            assert replace(case, prompts=prompts).conditions


def test_only_the_promises_need_pytest() -> None:
    done = run_code(
        """
        import sys
        import branchtree.cli, branchtree.training.trainer
        assert "pytest" not in sys.modules
        import branchtree.testing
        print(*sorted({"pytest", "diffusers", "transformers", "branchtree_adapters"} & set(sys.modules)))
        """,
        fresh=True,
    )
    assert (done.code, done.out.split()) == (0, ["pytest"]), done.err


def test_a_guests_tests_are_its_case_and_one_class(guest_site: Path, tmp_path: Path) -> None:
    outcomes = run_tests(tmp_path, (GUEST / "tests" / "test_model.py").read_text(encoding="utf-8"), guest_site)
    assert (outcomes["failure"], outcomes["error"]) == ([], [])
    assert len(outcomes["passed"]) > 40
    assert all("lora" in name for name in outcomes["skipped"])


def test_a_guests_reward_is_tested_in_the_same_way(guest_site: Path, tmp_path: Path) -> None:
    outcomes = run_tests(tmp_path, (GUEST / "tests" / "test_reward.py").read_text(encoding="utf-8"), guest_site)
    assert (outcomes["failure"], outcomes["error"]) == ([], [])
    assert len(outcomes["passed"]) >= 8


BROKEN = {
    "MixesRows": ["rows_do_not_know_their_batch", "a_tree_does_not_depend_on_its_batch"],
    "Forgetful": ["predictions_are_float32_and_repeatable", "the_update_sees_the_densities_of_the_rollout"],
    "UsesItsOwnDenoiser": ["a_frozen_copy_can_be_predicted_with", "the_kl_reference_is_the_start_policy"],
    "IgnoresThePrompt": ["a_prediction_depends_on_all_that_is_given"],
    "WritesIntoItsArguments": ["predictions_are_float32_and_repeatable"],
    "AnswersInHalf": ["predictions_are_float32_and_repeatable", "it_loads_in_the_precision_asked_for"],
    "DrawsFromTheGlobalState": [
        "initial_noise_comes_from_its_generator_alone",
        "resuming_gives_the_run_that_was_never_stopped",
    ],
    "DrawsUniformNoise": ["initial_noise_is_standard_normal"],
    "RepeatsItsNoise": ["initial_noise_is_standard_normal"],
    "StopsShortOfZero": ["its_time_grid_falls_from_one_to_zero"],
    "ComparesPrompts": ["encoding_knows_no_neighbours"],
    "StretchesContrast": ["a_sample_is_decoded_the_same_in_any_batch", "the_size_of_batches_does_not_matter"],
    "DecodesBeyondWhite": ["decoded_samples_are_media"],
    "LosesWhatIsReleased": ["frozen_parts_can_be_released_and_used_again"],
    "SaysTwoRows": [
        "rows_per_prediction_are_those_through_the_denoiser",
        "rows_are_those_of_the_plan_and_of_the_metrics",
    ],
    "GuessesItsSizes": ["footprint_is_that_of_the_loaded_model"],
    "LoadsAtOnce": ["it_is_loaded_by_load_alone"],
    "BeginsAnywhere": ["it_always_loads_the_same_weights"],
    "PassesErrorsOn": ["a_missing_folder_is_named"],
    "TakesAnyCondition": ["conditions_are_checked_before_loading"],
    "AlwaysFull": ["it_loads_in_the_precision_asked_for"],
    "HasADeadWeight": ["gradients_reach_exactly_what_is_trained"],
    "CheckpointsWrongly": ["gradients_reach_exactly_what_is_trained"],
    "LosesATensor": ["saved_weights_are_restored_to_the_bit", "resuming_gives_the_run_that_was_never_stopped"],
    "SavesInHalf": ["saved_weights_are_restored_to_the_bit", "resuming_gives_the_run_that_was_never_stopped"],
    "KeepsWhatItShouldOnlySave": ["other_weights_can_be_saved_in_their_place"],
    "ChecksTooLate": ["weights_of_another_model_are_not_saved"],
    "RestoresInSilence": ["what_cannot_be_restored_is_refused"],
    "ExportsItsStart": [
        "an_export_is_the_whole_model",
        "an_export_holds_the_weights_it_was_given",
        "final_holds_the_trained_model",
    ],
    "LoraWithoutASeed": ["lora_starts_as_the_base_model_from_its_seed_alone"],
    "LoraOfAnotherRank": ["footprint_counts_the_lora"],
    "LoraThatStaysOn": ["without_lora_is_the_base_model", "the_kl_reference_is_the_start_policy"],
    "LoraBesideTheRest": ["footprint_counts_the_lora", "lora_starts_as_the_base_model_from_its_seed_alone"],
    "LoraInHalf": ["lora_starts_as_the_base_model_from_its_seed_alone"],
}
"""Adapters of ``broken_adapters.py``, and the promises that each of them must be seen to break."""

THEIRS = """
import pytest
from branchtree.plugins import Condition
from branchtree.testing import AdapterCase, ModelAdapterPromises, TrainingPromises

class Theirs(ModelAdapterPromises, TrainingPromises):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        name = cls.__name__.removeprefix("Test")
        flux = {{"path": "{flux}", "height": 16, "width": 16, "max_sequence_length": 8}} if "Lora" in name else {{}}
        return AdapterCase(
            model={{"adapter": name, **flux}}, reward={{"reward": "guest_brightness"}}, prompts=["the sun", "a lamp"],
            refused=[Condition("darkness")] if name == "TakesAnyCondition" else [],
            **({{}} if flux else {{"lora": None}}),
        )
"""


@pytest.fixture(scope="module")
def failed(guest_site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What comes of the broken adapters' tests."""
    module = (Path(__file__).parent / "broken_adapters.py").read_text(encoding="utf-8")
    site = tmp_path_factory.mktemp("broken_site")
    fake_distribution(site, "broken-adapters", {"broken": "broken_adapters"}, {"broken_adapters": module})
    classes = "".join(f"class Test{name}(Theirs):\n    pass\n" for name in BROKEN)
    code = THEIRS.format(flux=tiny_flux(tmp_path_factory.mktemp("flux"))) + classes
    only = [f"Test{name}::test_{promise}" for name, promises in BROKEN.items() for promise in promises]
    return run_tests(tmp_path_factory.mktemp("theirs"), code, guest_site, site, only=only)


@pytest.mark.parametrize("name", list(BROKEN))
def test_an_adapter_that_breaks_a_promise_is_found_out(name: str, failed: dict[str, list[str]]) -> None:
    found = {test.partition("[")[0] for test in failed["failure"] if test.startswith(f"Test{name}::")}
    assert found == {f"Test{name}::test_{promise}" for promise in BROKEN[name]}
    assert [test for test in failed["error"] if test.startswith(f"Test{name}::")] == []
