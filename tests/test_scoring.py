"""Scoring in the background, whole groups, and when failing rewards end a run."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from branchtree_rewards.diversity import Diversity, DiversityConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from tiny_flux import tiny_flux
from torch import Tensor
from training_runs import largest_difference, metrics, small, weights

from branchtree import load_recipe, train
from branchtree.core.families import Families
from branchtree.core.scores import Scores
from branchtree.core.tree import grow
from branchtree.data.prompts import PromptOrder
from branchtree.errors import ModelError, RewardError
from branchtree.plugins import Condition, Conditioning, Media
from branchtree.plugins.decoding import Encoded
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.build import make_schedule
from branchtree.recipe.schema import BatchSection, ScoringSection
from branchtree.report import write_page
from branchtree.run.checkpoint import list_checkpoints
from branchtree.run.directory import METRICS, RunDirectory
from branchtree.run.resume import find_checkpoint
from branchtree.training.failures import FailureWatch
from branchtree.training.inputs import read_inputs
from branchtree.training.iteration import scoring_groups
from branchtree.training.limits import RowLimits
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.scoring import AHEAD, Piece, Scorer, ScoringQueue
from branchtree.training.trainer import Trainer
from branchtree.training.update import Gradient

CPU = torch.device("cpu")
THREAD, IN_PLACE = True, False


@dataclass
class Recorder:
    """Scores a sample by its first pixel and notes every call."""

    groupwise: bool = False
    calls: list[tuple[list[float], list[str]]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    released: int = 0
    modalities: frozenset[str] = frozenset({"image"})

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def release(self) -> None:
        self.released += 1

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        values = media.pixels[:, 0, 0, 0]
        self.calls.append((values.tolist(), [condition.prompt for condition in conditions]))
        self.threads.add(threading.get_ident())
        return Scores(values, values >= 0, raw=values * 2, details={"twice": values * 2}, reasons={})


def piece(prompts: Sequence[int], start: int) -> Piece:
    """Samples that bear their own number."""
    pixels = torch.arange(start, start + len(prompts)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Piece(Media(images=pixels), [Condition(f"prompt {prompt}") for prompt in prompts], list(prompts))


def scored(pieces: Sequence[Piece], rewards: Sequence[Recorder], background: bool) -> dict[str, Scores]:
    named = [NamedReward(f"reward {place}", 1.0, reward) for place, reward in enumerate(rewards)]
    with ScoringQueue(named, background) as queue:
        for part in pieces:
            queue.put(part)
        queue.seal()
        scores = queue.results()
        queue.release()
        return scores


@st.composite
def cut_groups(draw: st.DrawFn) -> list[Piece]:
    """Groups of samples, cut into pieces anywhere."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
    cuts = sorted(draw(st.sets(st.integers(1, len(prompts)))) | {0, len(prompts)})
    return [piece(prompts[a:b], a) for a, b in itertools.pairwise(cuts)]


@settings(max_examples=60, deadline=None)
@given(pieces=cut_groups())
def test_threads_change_neither_calls_nor_scores(pieces: list[Piece]) -> None:
    """Each reward gets each piece once, in order; a group-wise one gets each prompt's samples in one call."""
    inside = [Recorder(), Recorder(groupwise=True)]
    outside = [Recorder(), Recorder(groupwise=True)]
    here, there = scored(pieces, inside, IN_PLACE), scored(pieces, outside, THREAD)
    samples = sum(len(part.prompts) for part in pieces)
    for label in here:
        assert here[label].values.tolist() == there[label].values.tolist() == list(range(samples))
        assert there[label].details["twice"].tolist() == [2 * value for value in range(samples)]
    assert [reward.calls for reward in inside] == [reward.calls for reward in outside]
    assert [len(call[0]) for call in inside[0].calls] == [len(part.prompts) for part in pieces]
    assert [set(call[1]) for call in inside[1].calls] == [
        {f"prompt {prompt}"} for prompt in sorted({p for part in pieces for p in part.prompts})
    ]
    assert [reward.released for reward in inside + outside] == [1] * 4


def test_each_reward_works_in_one_thread_of_its_own() -> None:
    rewards = [Recorder(), Recorder()]
    scored([piece([0, 0], 0), piece([1, 1], 2)], rewards, THREAD)
    assert all(len(reward.threads) == 1 for reward in rewards)
    assert rewards[0].threads != rewards[1].threads
    assert threading.get_ident() not in rewards[0].threads | rewards[1].threads


def test_decoded_pieces_do_not_pile_up() -> None:
    """With scoring held up, one piece beyond those that may wait makes ``put`` wait."""
    go = threading.Event()

    class Held(Recorder):
        def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
            assert go.wait(PATIENCE)
            return super().score(media, conditions)

    handed: list[int] = []

    def hand_over(queue: ScoringQueue) -> None:
        for place in range(AHEAD + 3):
            queue.put(piece([place], place))
            handed.append(place)

    with ScoringQueue([NamedReward("held", 1.0, Held())], THREAD) as queue:
        giver = threading.Thread(target=hand_over, args=(queue,))
        giver.start()
        deadline = time.monotonic() + PATIENCE
        while len(handed) < AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        giver.join(0.2)
        waiting = list(handed)
        go.set()
        giver.join(PATIENCE)
        queue.seal()
        assert queue.results()["held"].values.tolist() == list(range(AHEAD + 3))
    assert waiting == list(range(AHEAD))


@dataclass
class Lamp:
    """A model whose samples bear their latents as pixels."""

    threads: set[int] = field(default_factory=set)
    rests: int = 0
    broken: bool = False

    def decode(self, latents: Tensor) -> Media:
        self.threads.add(threading.get_ident())
        if self.broken:
            raise ModelError("the decoder is broken")
        return Media(images=latents.view(-1, 1, 1, 1).expand(-1, 3, 2, 2))

    def release_frozen(self) -> None:
        self.rests += 1


def scorer(model: Any, reward: Recorder, overlap: bool = True, rows: int | None = None) -> Scorer:
    limits = RowLimits(BatchSection(decode_rows=rows), None)
    return Scorer(model, [NamedReward("first pixel", 1.0, reward)], limits, limits.decode, CPU, overlap, overlap)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("groupwise", [True, False])
def test_scores_come_in_the_order_of_what_was_given(overlap: bool, groupwise: bool) -> None:
    """Five samples of two prompts in one go, then three of another; decoded two at a time."""
    model, reward = Lamp(), Recorder(groupwise)
    prompts = [[0, 0, 0, 1, 1], [2, 2, 2]]
    with scorer(model, reward, overlap, rows=2) as working:
        kept = [
            working.put(torch.arange(start, start + len(own)).float(), [Condition(str(p)) for p in own], own, {1, 2})
            for start, own in zip((0, 5), prompts, strict=True)
        ]
        assert working.scores_of(0)["first pixel"].values.tolist() == [0, 1, 2, 3, 4]
        assert (model.rests, reward.released) == (0, 0)
        assert working.finish()["first pixel"].values.tolist() == list(range(8))
    assert [[float(one.pixels[0, 0, 0, 0]) for one in put.result()] for put in kept] == [[1, 2], [6, 7]]
    assert (model.rests, reward.released) == (1, 1)
    sizes = [3, 2, 3] if groupwise else [2, 2, 1, 2, 1]
    assert [len(call[0]) for call in reward.calls] == sizes
    here = threading.get_ident()
    assert (here in model.threads | reward.threads) is not overlap
    assert set(working.seconds) == {"decode_work", "reward_work"}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_decoder_that_asks_gets_what_each_sample_was_sampled_under(overlap: bool) -> None:
    class Tinted(Lamp):
        def decode(self, latents: Tensor, conditioning: Conditioning | None = None) -> Media:
            assert conditioning is not None
            return super().decode(latents + conditioning["tint"])

    encoded = Encoded({"tint": torch.tensor([10.0, 20.0, 30.0])}, torch.tensor([2, 0, 0, 1, 2]))
    with scorer(Tinted(), Recorder(), overlap, rows=2) as working:
        working.put(torch.arange(5).float(), [Condition("a")] * 5, [0] * 5, encoded=encoded)
        assert working.finish()["first pixel"].values.tolist() == [30, 11, 12, 23, 34]


def test_a_thread_works_with_as_many_threads_as_the_run() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Curious(Recorder):
        def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
            seen.append(torch.get_num_threads())
            return super().score(media, conditions)

    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with scorer(Lamp(), Curious()) as working:
                working.put(torch.zeros(1), [Condition("a")], [0])
                working.finish()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


@pytest.mark.parametrize("overlap", [True, False])
def test_what_fails_in_a_thread_is_told_by_the_next_call(overlap: bool) -> None:
    with pytest.raises(ModelError, match="the decoder is broken"), scorer(Lamp(broken=True), Recorder()) as working:
        working.put(torch.zeros(1), [Condition("a")], [0])
        working.finish()


@pytest.mark.parametrize("background", [THREAD, IN_PLACE])
def test_a_reward_that_raises_is_named(background: bool) -> None:
    class Broken(Recorder):
        def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
            raise ConnectionError("no answer")

    with pytest.raises(RewardError, match="reward 'reward 0' failed: ConnectionError: no answer"):
        scored([piece([0], 0)], [Broken()], background)


# --- in training ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_overlap_changes_no_figure_and_no_weight(model: Path, tmp_path: Path) -> None:
    rewards = [{"reward": "digits"}, {"reward": "diversity", "weight": 0.3}]
    changes = {"batch__prompts": 3, "batch__rollout_prompts": 1, "batch__decode_rows": 3, "run__iterations": 2}
    for name, overlap in (("on", True), ("off", False)):
        overrides = small(model, rewards=rewards, scoring__overlap=overlap, **changes)
        train("quickstart", overrides, output=tmp_path / name)
    assert (tmp_path / "on" / METRICS).read_bytes() == (tmp_path / "off" / METRICS).read_bytes()
    assert largest_difference(weights(tmp_path / "on"), weights(tmp_path / "off")) == 0.0
    assert metrics(tmp_path / "on")[0]["reward/diversity/std"] > 0


def test_trees_grown_one_prompt_at_a_time_are_those_grown_together(model: Path, tmp_path: Path) -> None:
    for name, prompts in (("together", None), ("apart", 1)):
        overrides = small(model, batch__prompts=3, batch__rollout_prompts=prompts, run__iterations=1)
        train("quickstart", overrides, output=tmp_path / name)
    together, apart = metrics(tmp_path / "together")[0], metrics(tmp_path / "apart")[0]
    assert together.keys() == apart.keys()
    # Rows in batches of another size differ in their last digits.
    assert {name: pytest.approx(value, rel=2e-3, abs=1e-6) for name, value in together.items()} == apart
    assert largest_difference(weights(tmp_path / "together"), weights(tmp_path / "apart")) < 1e-4


def test_the_gradient_pass_begins_while_leaves_are_scored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last prompts' leaves are not scored before a batch of the first prompt's has gone through the denoiser."""
    begun, waits = threading.Event(), list[bool]()

    class Held(Recorder):
        def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
            if self.calls:  # the first leaves are those of the first prompt
                waits.append(begun.wait(PATIENCE))
            return super().score(media, conditions)

    add = Gradient.add

    def told(gradient: Gradient, families: Families) -> None:
        add(gradient, families)
        begun.set()

    monkeypatch.setattr(Gradient, "add", told)
    recipe = load_recipe("quickstart", small(model, batch__prompts=3, run__iterations=1))
    inputs = replace(read_inputs(recipe), rewards=[NamedReward("held", 1.0, Held())])
    directory = RunDirectory(tmp_path / "run")
    directory.claim(resume=False)
    Trainer(open_session(inputs, directory, make_accelerator(recipe)), []).run(resume=False)
    assert waits and all(waits)


def test_the_first_prompt_is_scored_alone_where_its_gradient_pass_is_long() -> None:
    """A Dense tree of 16 leaves trains 187 rows, one that splits once a single one."""
    plans = (make_schedule(load_recipe(f"quickstart+{name}")).plan(0, 0) for name in ("branchgrpo", "single"))
    dense, single = (grow([plan] * 4) for plan in plans)
    assert scoring_groups(dense, range(4)) == [range(1), range(1, 4)]
    assert scoring_groups(dense, range(1)) == [range(1)]
    assert scoring_groups(dense, range(2, 4)) == [range(2, 4)]
    assert scoring_groups(single, range(4)) == [range(4)]


@pytest.mark.parametrize(
    ("changes", "early"),
    [
        ({}, True),
        ({"optim__steps_per_iteration": 2}, False),  # a step's share of families is drawn from all prompts
    ],
)
def test_when_the_gradient_pass_may_begin_early(
    model: Path, tmp_path: Path, changes: dict[str, Any], early: bool
) -> None:
    recipe = load_recipe("quickstart", small(model, **changes))
    directory = RunDirectory(tmp_path / "run")
    session = open_session(read_inputs(recipe), directory, make_accelerator(recipe))
    assert session.learns_early is early
    sharded = replace(session, team=replace(session.team, members=2))
    assert not sharded.learns_early


def test_a_reward_that_also_judges_held_out_samples_is_loaded_once(model: Path) -> None:
    digits = {"reward": "digits"}
    twice = [{**digits, "label": "again"}, digits, {**digits, "classifier": "heldout", "label": "other"}]
    evaluation = {"prompts": ["a two"], "rewards": twice}
    inputs = read_inputs(load_recipe("quickstart", small(model, rewards=[digits], evaluation=evaluation)))
    [trained], held_out = inputs.rewards, inputs.held_out
    assert held_out[0].adapter is trained.adapter
    # Two of one section work at the same time, so each is its own.
    assert held_out[1].adapter is not trained.adapter
    assert held_out[2].adapter is not trained.adapter


# --- when failing rewards end a run ---


@dataclass
class Failing:
    """Fails on the first samples of each iteration's eight, a set share of them."""

    shares: Sequence[float]
    seen: int = 0
    modalities: frozenset[str] = frozenset({"image"})

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        iteration, place = divmod(self.seen, 8)
        self.seen += len(media)
        share = self.shares[min(iteration, len(self.shares) - 1)]
        values = torch.linspace(0, 1, len(media))
        failed = torch.arange(place, place + len(media)) < round(share * 8)
        values[failed] = math.nan
        reasons = {int(row): "no answer in 5 s" for row in failed.nonzero()}
        return Scores(values, values.isfinite(), reasons=reasons)


def train_failing(
    model: Path, output: Path, shares: Sequence[float], resume: bool = False, **overrides: object
) -> None:
    """A run whose only reward fails."""
    recipe = load_recipe("quickstart", small(model, run__iterations=len(shares), **overrides))
    inputs = replace(read_inputs(recipe), rewards=[NamedReward("judge", 1.0, Failing(shares))])
    directory = RunDirectory(output)
    directory.claim(resume)
    accelerator = make_accelerator(recipe)
    checkpoint = find_checkpoint(directory.checkpoints, recipe, ()) if resume else None
    Trainer(open_session(inputs, directory, accelerator, checkpoint), []).run(resume)


def test_a_rising_rate_of_failures_ends_the_run_and_keeps_what_was_learnt(model: Path, tmp_path: Path) -> None:
    """A window of 2: 0 and 1/2, then 1/2 and 1, of which 3/4 is above the 60% allowed."""
    limits = {"scoring__max_invalid": 0.6, "scoring__window": 2, "run__checkpoint_every": 100}
    output = tmp_path / "run"
    with pytest.raises(RewardError) as told:
        train_failing(model, output, [0, 0.5, 1, 0], **limits)
    message = str(told.value)
    assert "reward 'judge' gave no valid value for 12 of 16 samples of the last 2 iterations (75%;" in message
    assert "scoring.max_invalid allows 60%" in message
    assert "Most often: no answer in 5 s (12 times)" in message and "--resume" in message
    assert [row["reward/judge/invalid"] for row in metrics(output)] == [0, 4]
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["iteration_000002"]
    # The failures of the iterations before count on: 4 of 8 and 7 of 8 is too many, where 7 of 8 alone is, too.
    with pytest.raises(RewardError, match="11 of 16 samples of the last 2 iterations"):
        train_failing(model, output, [0.875, 0, 0, 0], resume=True, **limits)
    train_failing(model, output, [0, 0, 0, 0], resume=True, **limits)
    assert len(metrics(output)) == 4


def test_a_run_told_to_bear_any_failure_skips_what_cannot_be_scored(model: Path, tmp_path: Path) -> None:
    train_failing(model, tmp_path / "run", [0.5, 1, 0], scoring__max_invalid=1)
    rows = metrics(tmp_path / "run")
    assert [row["reward/valid_fraction"] for row in rows] == [0.5, 0, 1]
    assert [row["reward/skipped_prompts"] for row in rows] == [1, 2, 0]
    assert [row["steps/taken"] for row in rows] == [1, 0, 1]
    assert "reward/judge/mean" not in rows[1]


def failures(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]


def test_each_failed_sample_is_logged_with_its_prompt_and_reason(model: Path, tmp_path: Path) -> None:
    """An iteration has 2 prompts of 4 leaves, and the reward fails on the first of the 8."""
    limits = {"scoring__max_invalid": 1, "run__checkpoint_every": 1}
    train_failing(model, tmp_path / "run", [0, 0.25, 1, 0], **limits)
    rows, counted = failures(tmp_path / "run"), metrics(tmp_path / "run")
    by_iteration = [[row for row in rows if row["iteration"] == i] for i in range(4)]
    assert [len(found) for found in by_iteration] == [row["reward/judge/invalid"] for row in counted] == [0, 2, 8, 0]
    recipe = load_recipe("quickstart", small(model))
    texts = [condition.prompt for condition in read_inputs(recipe).conditions]
    order = PromptOrder(len(texts), recipe.seed, recipe.data.shuffle)
    for row in rows:
        assert (row["reward"], row["reason"]) == ("judge", "no answer in 5 s")
    ids = order.batch(2, 2)
    assert [(row["prompt_id"], row["leaf"]) for row in by_iteration[2]] == [(i, leaf) for i in ids for leaf in range(4)]
    assert [row["prompt"] for row in by_iteration[2]] == [texts[order.index(i)] for i in ids for _ in range(4)]
    page = write_page(tmp_path / "run").read_text()
    assert "Samples that could not be scored" in page and "no answer in 5 s" in page and ">10<" in page


def test_a_resumed_run_drops_the_failures_after_its_checkpoint(model: Path, tmp_path: Path) -> None:
    limits = {"scoring__max_invalid": 0.6, "scoring__window": 1, "run__checkpoint_every": 100}
    with pytest.raises(RewardError, match="8 of 8 samples"):
        train_failing(model, tmp_path / "run", [0.5, 0.25, 1], **limits)
    assert [row["iteration"] for row in failures(tmp_path / "run")] == [0] * 4 + [1] * 2 + [2] * 8
    train_failing(model, tmp_path / "run", [0.25] * 3, resume=True, **limits)
    assert [row["iteration"] for row in failures(tmp_path / "run")] == [0] * 4 + [1] * 2 + [2] * 2


def test_a_reward_that_fails_as_a_whole_is_logged(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="reward 'judge' failed: ValueError"):
        train_failing(model, tmp_path / "run", [0, 0.25, math.nan])
    [*_, last] = failures(tmp_path / "run")
    assert last["iteration"] == 2 and "reward" not in last
    assert str(last["reason"]).startswith("reward 'judge' failed: ValueError: cannot convert float NaN")


def test_no_failure_is_borne_at_a_limit_of_zero(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"1 of 8 samples of the last iteration \(12%"):
        train_failing(model, tmp_path / "run", [0.125], scoring__max_invalid=0)


def test_failures_of_a_reward_do_not_count_against_another() -> None:
    def scores(valid: int) -> Scores:
        return Scores(torch.zeros(4), torch.arange(4) < valid)

    watch = FailureWatch(ScoringSection(max_invalid=0.5, window=1))
    alone = SimpleNamespace(is_main_process=True)
    watch.check(alone, {"a": scores(2), "b": scores(2)})
    with pytest.raises(
        RewardError, match=r"reward 'b' gave no valid value for 3 of 4 .* Most often: the reward gave none"
    ):
        watch.check(alone, {"a": scores(2), "b": scores(1)})


# --- a reward of whole groups ---


def diversity(pixels: torch.Tensor, size: int = 32) -> Scores:
    reward = Diversity(DiversityConfig(size=size))
    reward.load(CPU)
    media = Media(images=pixels) if pixels.ndim == 4 else Media(videos=pixels)
    return reward.score(media, [Condition("a")] * len(pixels))


def test_diversity_is_the_mean_distance_from_the_others() -> None:
    """Grey pictures of 0, 0.2 and 0.6: distances .2, .6 and .4."""
    for shape in ((3, 8, 8), (4, 3, 8, 8)):
        grey = torch.tensor([0.0, 0.2, 0.6]).view(-1, *(1 for _ in shape)).expand(-1, *shape)
        assert diversity(grey).values.tolist() == pytest.approx([0.4, 0.3, 0.5])


def test_diversity_compares_only_finite_samples() -> None:
    grey = torch.tensor([0.0, math.nan, 0.6]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    scores = diversity(grey)
    assert scores.valid.tolist() == [True, False, True]
    assert scores.values[[0, 2]].tolist() == pytest.approx([0.6, 0.6])
    assert not diversity(grey[:1]).valid.any()
    assert diversity(grey[:2]).reasons == {0: "there is no other sample of its prompt", 1: "pixels are not finite"}


def test_diversity_looks_at_shrunk_samples() -> None:
    """A checkerboard and its negative have the same means over blocks of two pixels."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    pixels = torch.stack([board, 1 - board]).float()[:, None]
    assert diversity(pixels, size=8).values.tolist() == [1.0, 1.0]
    assert diversity(pixels, size=4).values.tolist() == [0.0, 0.0]
