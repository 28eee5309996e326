"""Batches that shrink where memory runs out: a run that hits the limit equals one that was told of it."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flux import tiny_flux
from torch import Tensor, nn
from training_runs import iterated, largest_difference, metrics, opened, small, weights

from branchtree import load_recipe
from branchtree.core.cost import count
from branchtree.core.scores import Scores
from branchtree.errors import DeviceMemoryError, RewardError
from branchtree.planning.fitting import open_limits
from branchtree.planning.memory import estimate_memory
from branchtree.plugins import Condition, Footprint, Media
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.build import make_credit_rule, make_schedule
from branchtree.recipe.schema import BatchSection
from branchtree.run.directory import LIMITS, RunDirectory
from branchtree.testing.probe import require_equal
from branchtree.training.inputs import read_inputs
from branchtree.training.limits import RowLimit, RowLimits
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.scoring import Piece, ScoringQueue
from branchtree.training.session import Session
from branchtree.training.trainer import Trainer

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about the device."


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Leave what is there out of the collections by which a run frees memory where it runs out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def prepared(model: Path, output: Path, **overrides: Any) -> Session:
    return opened("quickstart", small(model, **overrides), output)


@dataclass
class Device:
    """A device on which only so many rows fit; where gradients are kept, memory runs out in the backward pass."""

    rollout: int = 10**9
    update: int = 10**9
    decode: int = 10**9
    failures: list[str] = field(default_factory=list)

    def fail(self, where: str) -> None:
        self.failures.append(where)
        raise torch.OutOfMemoryError(FULL)

    def hold(self, session: Session) -> Session:
        model: Any = session.inputs.model
        # The first block's gradient comes when later layers have had theirs.
        model.denoiser.transformer_blocks[0].register_forward_hook(self._watch)
        decode = model.decode

        def watched(latents: Tensor) -> Media:
            if len(latents) > self.decode:
                self.fail("decode")
            media: Media = decode(latents)
            return media

        model.decode = watched
        return session

    def _watch(self, block: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        rows = len(output[1])
        if not torch.is_grad_enabled():
            if rows > self.rollout:
                self.fail("rollout")
        elif rows > self.update:
            output[1].register_hook(lambda _: self.fail("update"))


def test_a_run_out_of_memory_equals_one_that_knew(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(rollout=3, update=7, decode=2)
    with caplog.at_level(logging.WARNING, "branchtree"):
        Trainer(device.hold(prepared(model, tmp_path / "hit")), []).run(resume=False)
    found = json.loads((tmp_path / "hit" / LIMITS).read_text())
    assert found.keys() == {"batch.rollout_rows", "batch.update_rows", "batch.decode_rows"}
    assert found["batch.rollout_rows"] <= 3 and found["batch.update_rows"] <= 7 and found["batch.decode_rows"] == 2
    assert set(device.failures) == {"rollout", "update", "decode"}
    assert len(caplog.records) == len(device.failures)  # none in the second iteration, whose batches fit
    told = {key.replace(".", "__"): rows for key, rows in found.items()}
    Trainer(prepared(model, tmp_path / "told", **told), []).run(resume=False)
    assert metrics(tmp_path / "hit") == metrics(tmp_path / "told")
    require_equal(weights(tmp_path / "hit"), weights(tmp_path / "told"))


def test_a_gradient_begun_early_begins_again_where_memory_runs_out(model: Path, tmp_path: Path) -> None:
    """Three prompts, of which the first is taken up before the others are scored; the second batch does not fit."""
    keys: dict[str, Any] = {"batch__prompts": 3, "batch__update_rows": None, "run__iterations": 1}
    once = prepared(model, tmp_path / "roomy", **keys)
    Trainer(once, []).run(resume=False)
    rows = metrics(tmp_path / "roomy")[0]["rows/gradient"] / 3
    device = Device(update=round(rows))  # the first prompt's rows fit
    session = device.hold(prepared(model, tmp_path / "hit", **keys))
    Trainer(session, []).run(resume=False)
    assert session.learns_early and device.failures == ["update"]
    hit, roomy = metrics(tmp_path / "hit")[0], metrics(tmp_path / "roomy")[0]
    assert hit.keys() == roomy.keys()
    for name, value in roomy.items():
        assert hit[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name
    assert largest_difference(weights(tmp_path / "hit"), weights(tmp_path / "roomy")) < 1e-4


def test_a_resumed_run_starts_with_what_was_found(model: Path, tmp_path: Path) -> None:
    first = Device(update=7)
    Trainer(first.hold(prepared(model, tmp_path / "run", run__iterations=1)), []).run(resume=False)
    assert first.failures
    again = Device(update=7)
    recipe = load_recipe("quickstart", small(model))
    directory = RunDirectory(tmp_path / "run")
    session = open_session(read_inputs(recipe), directory, make_accelerator(recipe))
    Trainer(again.hold(session), []).run(resume=True)
    assert again.failures == [] and len(metrics(tmp_path / "run")) == 2
    (tmp_path / "run" / LIMITS).write_text("damaged")
    session.limits.recall(directory)


@pytest.mark.parametrize("old", [{"loss__old_log_prob": "recomputed"}, {"loss__ratio": "centred"}], ids=str)
def test_what_later_steps_compare_with_is_dealt_to_smaller_batches(
    old: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    keys = {**old, "optim__steps_per_iteration": 2, "run__iterations": 1}
    device = Device(update=2)
    (hit,) = iterated(device.hold(prepared(model, tmp_path / "hit", **keys)))
    (roomy,) = iterated(prepared(model, tmp_path / "roomy", **keys))
    assert device.failures and hit.keys() == roomy.keys()
    for name, value in roomy.items():
        assert hit[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_one_row_that_does_not_fit_names_the_key(model: Path, tmp_path: Path) -> None:
    for key, device in (("batch.rollout_rows", Device(rollout=0)), ("batch.update_rows", Device(update=0))):
        session = device.hold(prepared(model, tmp_path / key))
        with pytest.raises(
            DeviceMemoryError, match=f"^{key}: memory ran out with one row at a time; use run"
        ) as caught:
            Trainer(session, []).run(resume=False)
        assert str(caught.value).endswith("Tried to allocate 2.00 GiB.")


def test_other_errors_are_not_taken_for_it() -> None:
    def broken(rows: slice) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(RowLimit("batch.rollout_rows", None).each(4, broken))


def test_a_step_that_all_processes_share_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Device(update=3).hold(prepared(model, tmp_path / "run", batch__update_rows=None, batch__prompts=1))
    trainer = Trainer(session, [])
    monkeypatch.setattr(type(session.accelerator), "num_processes", 2)
    # All families in one batch: it is the one whose gradient is reduced.
    refused = r"^batch\.update_rows: memory ran out with \d+ rows at once, in a step that all processes take together"
    with pytest.raises(DeviceMemoryError, match=refused):
        trainer.run(resume=False)
    with pytest.raises(DeviceMemoryError, match=r"set evaluation\.rows to less than 8"):
        RowLimits(BatchSection(), 8, sharded=True).evaluation.shrink(8, FULL)


@dataclass
class Cramped:
    """A reward that has memory for three samples and gives each its mean brightness."""

    groupwise: bool
    calls: list[int] = field(default_factory=list)
    room: int = 3
    modalities: frozenset[str] = frozenset({"image"})

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        if len(media) > self.room:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        self.calls.append(len(media))
        return Scores(media.pixels.mean(dim=(1, 2, 3)), torch.ones(len(media), dtype=torch.bool))


def test_a_reward_is_given_what_it_has_memory_for() -> None:
    media = Media(images=torch.rand(8, 3, 2, 2))
    limits, reward = RowLimits(BatchSection(), None), Cramped(groupwise=False)
    for _ in range(2):
        with ScoringQueue([NamedReward("mean", 1.0, reward)], False, limits) as queue:
            queue.put(Piece(media, [Condition("a")] * 8, [0] * 8))
            queue.seal()
            scores = queue.results()["mean"]
        assert torch.equal(scores.values, media.pixels.mean(dim=(1, 2, 3)))
    assert reward.calls == [2] * 8 and limits.found == {"rewards.mean": 2}
    for refused in (Cramped(groupwise=True), Cramped(groupwise=False, room=0)):
        told = r"reward 'mean' failed: .*set the reward's own batch or offload"
        queue = ScoringQueue([NamedReward("mean", 1.0, refused)], False)
        with pytest.raises(RewardError, match=told), queue:
            queue.put(Piece(media, [Condition("a")] * 8, [0] * 8))
            queue.seal()
            queue.results()


def test_open_limits_start_from_the_estimate() -> None:
    recipe = load_recipe("quickstart", {"batch.update_rows": None, "batch.rollout_rows": None})
    sizes = Footprint(1000, 0, (4,), 500, 100, 1.0, 1, 10, "made up", forward_numbers_per_row=50)
    plans = [make_schedule(recipe).plan(0, prompt) for prompt in range(4)]
    cost = count(plans, make_credit_rule(recipe), 0)
    resident = estimate_memory(recipe, sizes, cost).resident
    found = open_limits(recipe, sizes, cost, resident + 20 * 4 * 500)
    assert found == {"batch.update_rows": 16}  # of 20 families, the power of two; all rollout rows fit
    told = load_recipe("quickstart", {"batch.update_rows": 32, "batch.rollout_rows": None})
    assert open_limits(told, sizes, cost, resident + 20 * 4 * 500) == {}
    limits = RowLimits(BatchSection(rollout_rows=5), None)
    limits.start_at({"batch.update_rows": 16, "batch.rollout_rows": 9})
    assert (limits.update.rows, limits.rollout.rows) == (16, 5)
    assert limits.found == {}
