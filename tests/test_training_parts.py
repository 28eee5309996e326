"""The trainer's parts by themselves, and what it does with rewards that fail."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import batches
from tiny_flux import tiny_flux
from torch import Tensor, nn
from training_runs import metrics, small

from branchtree import load_recipe
from branchtree.core.families import collect_families
from branchtree.core.pruning import trainable_edges
from branchtree.core.scores import Scores
from branchtree.core.tree import grow
from branchtree.errors import DataError, OutputError, RewardError
from branchtree.files.checksums import MANIFEST
from branchtree.files.writing import write_atomically
from branchtree.pictures.grid import write_grid
from branchtree.pictures.still import fitted, to_image
from branchtree.plugins import Condition, Conditioning, Media
from branchtree.plugins.scores import NamedReward, ask
from branchtree.recipe.schema import OptimSection
from branchtree.run.checkpoint import list_checkpoints
from branchtree.run.directory import METRICS, RunDirectory
from branchtree.run.ledger import LEDGER, Ledger
from branchtree.training import conditioning as policy
from branchtree.training.conditioning import ConditioningCache
from branchtree.training.engine import WeightAverage
from branchtree.training.inputs import read_inputs
from branchtree.training.interrupt import StopRequest
from branchtree.training.learning_rate import learning_rate_factor
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.trainer import Trainer
from branchtree.training.update import partition


@dataclass
class Scripted:
    """A reward that gives samples the values in turn, over and over."""

    values: Sequence[float]
    seen: int = 0
    modalities: frozenset[str] = frozenset({"image"})

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        places = range(self.seen, self.seen + len(media))
        self.seen = places.stop
        values = torch.tensor([self.values[place % len(self.values)] for place in places])
        return Scores(values, torch.ones(len(media), dtype=torch.bool))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def train_scripted(model: Path, output: Path, values: Sequence[float], **overrides: object) -> list[dict[str, float]]:
    """One iteration under a scripted reward; a prompt's four leaves come one after the other."""
    recipe = load_recipe("quickstart", small(model, run__iterations=1, **overrides))
    inputs = replace(read_inputs(recipe), rewards=[NamedReward("scripted", 1.0, Scripted(values))])
    directory = RunDirectory(output)
    directory.claim(resume=False)
    Trainer(open_session(inputs, directory, make_accelerator(recipe)), []).run(resume=False)
    return metrics(output)


def test_leaves_whose_reward_failed_are_masked_and_counted(model: Path, tmp_path: Path) -> None:
    """Splits at steps 0 and 2 of 6: without leaf 0 its three trained edges after the last split go."""
    whole = train_scripted(model, tmp_path / "whole", [0.1, 0.7, 0.2, 0.4])[0]
    masked = train_scripted(model, tmp_path / "masked", [math.nan, 0.7, 0.2, 0.4])[0]
    assert masked["reward/valid_fraction"] == 0.75
    assert masked["reward/scripted/mean"] == pytest.approx((0.7 + 0.2 + 0.4) / 3)
    assert whole["edges/trained"] - masked["edges/trained"] == 2 * 3
    assert masked["reward/skipped_prompts"] == 0


def test_a_prompt_without_a_valid_leaf_is_skipped_and_counted(model: Path, tmp_path: Path) -> None:
    row = train_scripted(model, tmp_path / "run", [math.nan] * 4 + [0.1, 0.7, 0.2, 0.4])[0]
    assert row["reward/skipped_prompts"] == 1
    assert row["edges/trained"] == train_scripted(
        model, tmp_path / "one", [0.1, 0.7, 0.2, 0.4], batch__prompts=1
    )[0]["edges/trained"]  # fmt: skip


def test_equal_rewards_train_nothing_and_leave_the_weights(model: Path, tmp_path: Path) -> None:
    row = train_scripted(model, tmp_path / "run", [0.3])[0]
    assert (row["steps/taken"], row["steps/skipped"], row["rows/gradient"], row["edges/trained"]) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool)), "must give 2 values"),
        (Scores(torch.zeros(2, 1), torch.ones(2, dtype=torch.bool)), "must give 2 values"),
        (Scores(torch.zeros(2), torch.ones(1, dtype=torch.bool)), "must give 2 values"),
    ],
)
def test_scores_of_the_wrong_shape_name_the_reward(scores: Scores, message: str) -> None:
    class Wrong(Scripted):
        def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
            return scores

    media = Media(images=torch.zeros(2, 3, 4, 4))
    with pytest.raises(RewardError, match=f"'mine' {message}"):
        ask("mine", Wrong([0]), media, [Condition("a")] * 2)


def test_values_that_are_not_finite_are_invalid() -> None:
    reward = Scripted([1.0, math.nan, math.inf, -math.inf])
    scores = ask("mine", reward, Media(images=torch.zeros(4, 3, 2, 2)), [Condition("a")] * 4)
    assert scores.valid.tolist() == [True, False, False, False]


# --- dealing families out to optimiser steps ---


@settings(max_examples=50, deadline=None)
@given(plans=batches(), steps=st.integers(1, 4), seed=st.integers(0, 5))
def test_parts_hold_every_family_once_and_are_even_per_prompt(plans: list, steps: int, seed: int) -> None:
    topology = grow(plans)
    advantages = tuple(torch.ones(topology.width(depth), dtype=torch.float64) for depth in topology.depths)
    families = collect_families(topology, advantages, trainable_edges(topology))
    ids = list(range(len(plans)))
    parts = partition(families, steps, seed, 3, ids, first=0)
    assert len(parts) == steps
    places = [list(zip(part.depth.tolist(), part.parent.tolist(), strict=True)) for part in parts]
    whole = zip(families.depth.tolist(), families.parent.tolist(), strict=True)
    assert Counter(chain.from_iterable(places)) == Counter(whole)
    assert sum(part.edges for part in parts) == families.edges
    for prompt in ids:
        counts = [int((part.prompt == prompt).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_parts_do_not_depend_on_how_prompts_are_shared() -> None:
    recipe = load_recipe("quickstart")
    from branchtree.recipe.build import make_schedule

    schedule = make_schedule(recipe)

    def parts(ids: list[int], first: int) -> set[tuple[int, int, int, int]]:
        topology = grow([schedule.plan(0, prompt_id) for prompt_id in ids])
        advantages = tuple(torch.ones(topology.width(depth), dtype=torch.float64) for depth in topology.depths)
        families = collect_families(topology, advantages, trainable_edges(topology))
        found = set()
        for step, part in enumerate(partition(families, 3, 7, 5, ids, first)):
            for depth, parent, prompt in zip(part.depth, part.parent, part.prompt, strict=True):
                place = int(parent) - topology.span(int(prompt), int(depth)).start
                found.add((step, ids[int(prompt)], int(depth), place))
        return found

    assert parts([4, 9, 2], 0) == parts([4], 0) | parts([9, 2], 1)


# --- small parts ---


def test_average_is_the_recursion_and_is_put_on_and_off() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage({"w": parameter}, decay=0.9)
    for value in (2.0, 4.0):
        parameter.data.fill_(value)
        average.update()
    # The first step begins the average; the second is taken in with the decay (1 + 1) / (10 + 1).
    assert average.state()["w"].item() == pytest.approx(2 / 11 * 2 + 9 / 11 * 4)
    with average.applied():
        assert parameter.item() == average.state()["w"].item()
    assert parameter.item() == 4.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_learning_rate_schedules(schedule: str, expected: list[float]) -> None:
    factor = learning_rate_factor(OptimSection(schedule=schedule, warmup=2), total=6)  # type: ignore[arg-type]
    assert [factor(step) for step in range(6)] == pytest.approx(expected)


class Encoder:
    """Counts what it is asked to encode."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.released = 0

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        self.asked += [condition.prompt for condition in conditions]
        return {"embedding": torch.tensor([[float(len(condition.prompt))] * 8 for condition in conditions])}

    def release_frozen(self) -> None:
        self.released += 1


def prompts(*texts: str) -> list[Condition]:
    return [Condition(text) for text in texts]


def test_each_prompt_is_encoded_once() -> None:
    encoder = Encoder()
    cache = ConditioningCache(encoder)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    first = cache.get(prompts("a", "bb", "a"), cpu)["embedding"]
    assert first[:, 0].tolist() == [1, 2, 1]
    assert cache.get(prompts("bb", "ccc"), cpu)["embedding"][:, 0].tolist() == [2, 3]
    assert encoder.asked == ["a", "bb", "ccc"]
    assert encoder.released == 2


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    encoder = Encoder()
    cache = ConditioningCache(encoder, limit=2 * 8 * 4)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    for texts in (("a",), ("bb",), ("a",), ("ccc",), ("a",), ("bb",)):
        cache.get(prompts(*texts), cpu)
    assert encoder.asked == ["a", "bb", "ccc", "bb"]


def test_encoders_leave_once_after_all_that_is_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "PREPARED", 2)
    encoder = Encoder()
    cache = ConditioningCache(encoder)  # type: ignore[arg-type]
    cache.prepare(prompts("a", "b", "c", "d", "e"))
    assert (encoder.asked, encoder.released) == (["a", "b", "c", "d", "e"], 1)
    cache.prepare(prompts("e", "a"))
    assert encoder.released == 1


def test_what_is_kept_gives_way_to_what_is_coming_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it fits by itself; what is kept and comes is not encoded again."""
    monkeypatch.setattr(policy, "PREPARED", 2)
    encoder = Encoder()
    cache = ConditioningCache(encoder, limit=4 * 8 * 4)  # type: ignore[arg-type]
    cache.prepare(prompts("a", "b", "c", "d"))
    coming = prompts("x", "d", "y", "z", "v", "w")
    cache.prepare(coming)
    assert encoder.asked[4:] == ["x"]  # one part, and no room for the next
    cache.prepare(coming, replace=True)
    assert encoder.asked[5:] == ["y", "z"] and encoder.released == 3
    assert cache.holds(coming[:4]) and not cache.holds(coming[:5]) and not cache.holds(prompts("a"))


@pytest.mark.parametrize(("room", "encoded"), [(6, 5), (5, 4), (4, 4), (3, 2), (1, 2)])
def test_what_is_coming_is_encoded_in_its_order_as_far_as_it_fits(
    room: int, encoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, and no more once the next two would be too many."""
    monkeypatch.setattr(policy, "PREPARED", 2)
    encoder, texts = Encoder(), ("a", "bb", "ccc", "dddd", "eeeee")
    cache = ConditioningCache(encoder, limit=room * 8 * 4)  # type: ignore[arg-type]
    cache.prepare(prompts(*texts))
    assert encoder.asked == list(texts[:encoded])
    assert encoder.released == 1


def test_an_unreadable_image_is_left_for_the_request_that_needs_it() -> None:
    class Blind(Encoder):
        def encode(self, conditions: Sequence[Condition]) -> Conditioning:
            if any(condition.prompt == "gone" for condition in conditions):
                raise DataError("no image")
            return super().encode(conditions)

    cache = ConditioningCache(Blind())  # type: ignore[arg-type]
    cache.prepare(prompts("a", "gone"))
    assert len(cache.get(prompts("a"), torch.device("cpu"))["embedding"]) == 1
    with pytest.raises(DataError):
        cache.get(prompts("gone"), torch.device("cpu"))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    ledger, target = Ledger(tmp_path), tmp_path / "folder"
    ledger.write_folder(target, lambda folder: write_atomically(folder / "old", b"1"))

    def fail(folder: Path) -> None:
        (folder / "new").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ledger.write_folder(target, fail)
    assert {path.name for path in target.iterdir()} == {"old", MANIFEST}
    ledger.write_folder(target, lambda folder: write_atomically(folder / "new", b"2"))
    assert {path.name for path in target.iterdir()} == {"new", MANIFEST}
    assert {path.name for path in tmp_path.iterdir()} == {"folder", LEDGER}


def test_a_line_that_a_crash_cut_off_is_not_read_and_is_dropped(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for iteration in range(4):
        directory.append(METRICS, {"iteration": iteration})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"iteration": 4, "rew')
    assert [row["iteration"] for row in directory.rows(METRICS)] == [0, 1, 2, 3]
    directory.rewind(2)
    assert [json.loads(line)["iteration"] for line in (tmp_path / METRICS).read_text().splitlines()] == [0, 1]


def test_a_directory_below_a_file_cannot_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").claim(resume=False)


def test_an_unfinished_checkpoint_is_not_listed(tmp_path: Path) -> None:
    for name in (".iteration_000003.partial", "damaged_iteration_000004", "iteration_1000000", "iteration_000020"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iteration_000020", "iteration_1000000"]


def test_the_first_signal_is_noted_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_an_image_of_the_same_values(channels: int) -> None:
    pixels = torch.rand(channels, 5, 7)
    image = to_image(pixels)
    assert (image.mode, image.size) == ("RGB", (7, 5))
    shown: Tensor = torch.tensor(list(image.getdata())).view(5, 7, 3).permute(2, 0, 1) / 255
    assert float((shown - pixels).abs().max()) <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 32), (64, 64)), ((1024, 512), (256, 128)), ((200, 100), (200, 100))]
)
def test_thumbnails_fit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(Image.new("RGB", size), 256).size == expected


def test_a_grid_holds_every_sample(tmp_path: Path) -> None:
    media = [Media(images=torch.full((8, 3, 16, 16), 0.2)), Media(images=torch.full((4, 3, 16, 16), 0.8))]
    write_grid(tmp_path, 7, media, [Condition(f"prompt {number}") for number in range(12)])
    grid = Image.open(tmp_path / "iteration_000007.png")
    assert grid.size == (10 * 64, 2 * 64)
    assert grid.getpixel((7 * 64 + 5, 5)) == (51, 51, 51)
    assert grid.getpixel((8 * 64 + 5, 5)) == (204, 204, 204)
    assert json.loads((tmp_path / "iteration_000007.json").read_text())["columns"] == 10
