"""What a training run promises of any adapter, through the same code that ``branchtree.train`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from branchtree.api import plan, train
from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import rollout
from branchtree.core.tree import BranchTree, grow
from branchtree.planning.plan import RunPlan
from branchtree.plugins.base import Callback
from branchtree.plugins.protocols import ModelAdapter
from branchtree.recipe.build import make_sampler
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import METRICS, RunDirectory
from branchtree.testing.case import AdapterCase
from branchtree.testing.probe import (
    Rows,
    counted_rows,
    load,
    make_question,
    predict_rows,
    require_lora,
    trainable_parameters,
)
from branchtree.training.conditioning import ConditioningCache
from branchtree.training.inputs import read_inputs
from branchtree.training.iteration import iterate
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.metrics import gather_metrics
from branchtree.training.policy import Policy

SPLITS = [0, 3, 6]
TREES: Mapping[str, Mapping[str, Any]] = {
    "whole": {"tree.splits": SPLITS},
    "pruned": {"tree.splits": SPLITS, "pruning.kind": "parent_top1", "run.precision": "bf16"},
    "mix": {"tree.splits": SPLITS, "tree.sde": "window"},
    "single": {"tree.splits": "single", "tree.branches": 4, "run.precision": "bf16"},
}
"""Trees of eight steps. Each precision comes with and without LoRA, if the model takes it."""
WITH_LORA = ("mix", "single")

LONGER: Mapping[str, Any] = {
    "run.iterations": 3,
    "optim.ema": 0.5,
    "optim.schedule": "cosine",
    "optim.lr": 1e-3,
    "loss.kl": 0.1,
}
"""A run with all that a checkpoint has to bring back: average, schedule, and a reference that is the start."""
SMALL_BATCHES: Mapping[str, Any] = {
    "batch.rollout_rows": 3,
    "batch.update_rows": 5,
    "batch.decode_rows": 2,
    "batch.states": "host",
}


CANCELLING = ("loss", "log_prob/", "variance/component")
"""Metrics that are differences of nearly equal numbers, so that their relative error means nothing."""


@dataclass(frozen=True)
class MeasuredIterations:
    """Two iterations: the rows that went through the denoiser in each, and what the run says of them."""

    planned: RunPlan  # of the first
    rows: tuple[Rows, ...]
    metrics: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Finished:
    """A run that was not disturbed."""

    variant: str
    recipe: Recipe
    output: Path

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl."""
        return RunDirectory(self.output).rows(METRICS)


# torch says so once, whenever float32 weights meet bfloat16 autocast in an RMS norm.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
class TrainingPromises:
    """Counted rows, exact ratios, batches that do not matter, and runs that can be stopped."""

    @pytest.fixture(scope="class", params=list(TREES))
    @classmethod
    def measured(
        cls, case: AdapterCase, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> MeasuredIterations:
        """Two iterations of a tree, with a hook on the denoiser."""
        lora = case.lora is not None and request.param in WITH_LORA
        recipe = case.recipe({"tree.steps": 8, **TREES[request.param]}, lora=lora)
        return _measure(recipe, tmp_path_factory.mktemp(request.param) / "run")

    @pytest.fixture(scope="class", params=["full", "lora"])
    @classmethod
    def finished(
        cls, case: AdapterCase, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Finished:
        """A run of three iterations."""
        if request.param == "lora":
            require_lora(case)
        recipe = case.recipe(LONGER, lora=request.param == "lora")
        output = tmp_path_factory.mktemp(request.param) / "run"
        train(recipe, output=output)
        return Finished(request.param, recipe, output)

    def test_rows_are_those_of_the_plan_and_of_the_metrics(self, measured: MeasuredIterations) -> None:
        """In rollout and gradient pass, guidance counted, as the hook saw them."""
        first = measured.rows[0]
        assert first.rollout == measured.planned.rollout_rows > 0
        assert first.gradient == measured.planned.gradient_rows > 0
        for rows, logged in zip(measured.rows, measured.metrics, strict=True):
            assert (logged["rows/rollout"], logged["rows/gradient"]) == (rows.rollout, rows.gradient)

    def test_the_ratio_is_exactly_one_at_the_first_update(self, measured: MeasuredIterations) -> None:
        """In every precision, and again after the weights have moved."""
        for row in measured.metrics:
            assert row["ratio/max_deviation"] == 0.0
            assert row["ratio/clipped_fraction"] == 0.0
            assert row["grad_norm"] > 0

    def test_the_update_sees_the_densities_of_the_rollout(
        self, case: AdapterCase, measured: MeasuredIterations
    ) -> None:
        """A state and its condition get the same prediction in both, up to the rounding of the precision."""
        half = measured.planned.recipe.run.precision == "bf16"
        for row in measured.metrics:
            mismatch = row["log_prob/mismatch_mean"], row["log_prob/mismatch_max"]
            assert 0 <= mismatch[0] <= mismatch[1] <= case.tolerance[torch.bfloat16 if half else torch.float32]

    def test_a_tree_does_not_depend_on_its_batch(self, case: AdapterCase) -> None:
        """The second prompt's tree is the same without the first one, up to rounding."""
        recipe = case.recipe()
        adapter = load(case)
        both, alone = (_states(_tree(adapter, recipe, ids), prompt) for ids, prompt in (((0, 1), 1), ((1,), 0)))
        for found, expected in zip(alone, both, strict=True):
            assert found.shape == expected.shape
            # A rollout carries the rounding of every step before.
            assert float((found - expected).abs().max()) <= 10 * case.tolerance[torch.float32]

    def test_the_size_of_batches_does_not_matter(self, case: AdapterCase, finished: Finished, tmp_path: Path) -> None:
        """Rows at a time in rollout, update and decoding, and states on the host: figures are equal up to rounding."""
        train(case.recipe({**LONGER, **SMALL_BATCHES}, lora=finished.variant == "lora"), output=tmp_path / "run")
        pieces = RunDirectory(tmp_path / "run").rows(METRICS)
        for whole, piece in zip(finished.metrics, pieces, strict=True):
            assert whole.keys() == piece.keys()
            for name in (name for name in whole if not name.startswith(CANCELLING)):
                assert piece[name] == pytest.approx(whole[name], rel=2e-3, abs=1e-5), name
        first, second, start = (
            _flat(_restored(case, finished.variant, output)) for output in (finished.output, tmp_path / "run", None)
        )
        assert float((second - first).norm()) < 0.01 * float((first - start).norm())

    def test_resuming_gives_the_run_that_was_never_stopped(
        self, case: AdapterCase, finished: Finished, tmp_path: Path
    ) -> None:
        """The same metrics, byte by byte, and the same weights and average, to the bit."""
        cut = tmp_path / "cut"
        with pytest.raises(_PowerCutError):
            train(finished.recipe, output=cut, callbacks=[_PowerCut(before_the_end_of=1)])
        assert len(RunDirectory(cut).rows(METRICS)) == 2  # one more than the checkpoint knows
        assert train(finished.recipe, output=cut, resume=True).finished
        assert (cut / METRICS).read_bytes() == (finished.output / METRICS).read_bytes()
        whole, resumed = (_restored(case, finished.variant, output) for output in (finished.output, cut))
        assert torch.equal(_flat(whole), _flat(resumed))
        averages = [load_file(_last_checkpoint(output) / "average.safetensors") for output in (finished.output, cut)]
        assert averages[0].keys() == averages[1].keys() == trainable_parameters(whole).keys()
        assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())

    def test_the_kl_reference_is_the_start_policy(self, finished: Finished) -> None:
        """It agrees with the policy exactly before the first step and not after; its rows are counted."""
        first, *later = finished.metrics
        assert first["kl"] == 0.0
        assert all(row["kl"] > 0 for row in later)
        assert all(row["rows/reference"] == row["rows/gradient"] for row in finished.metrics)

    def test_a_run_learns_something(self, case: AdapterCase, finished: Finished) -> None:
        """The trained weights are not those that the run began with."""
        assert not torch.equal(
            _flat(_restored(case, finished.variant, finished.output)), _flat(_restored(case, finished.variant, None))
        )

    def test_final_holds_the_trained_model(self, case: AdapterCase, finished: Finished) -> None:
        """An adapter built on ``final/`` of a full run has the average's weights and predicts as they do."""
        if finished.variant == "lora":
            assert any(path.is_file() for path in (RunDirectory(finished.output).final).rglob("*"))
            return
        adapter = load(case, path=RunDirectory(finished.output).final)
        averaged = load(case)
        parameters = trainable_parameters(averaged)
        with torch.no_grad():
            for name, value in load_file(_last_checkpoint(finished.output) / "average.safetensors").items():
                parameters[name].copy_(value)
        asked = make_question(adapter, case)
        assert torch.equal(predict_rows(adapter, asked), predict_rows(averaged, asked))


class _PowerCutError(BaseException):
    """No Exception, after which a run would still write a checkpoint."""


class _PowerCut(Callback):
    def __init__(self, before_the_end_of: int) -> None:
        self._iteration = before_the_end_of

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        if iteration == self._iteration:
            raise _PowerCutError


def _measure(recipe: Recipe, output: Path) -> MeasuredIterations:
    directory = RunDirectory(output)
    inputs = read_inputs(recipe)
    directory.claim(resume=False)
    session = open_session(inputs, directory, make_accelerator(recipe))
    counted, metrics = [], []
    for iteration in range(recipe.run.iterations):
        with counted_rows(inputs.model.denoiser) as rows:
            done = iterate(session, iteration)
        counted.append(rows)
        metrics.append(gather_metrics(session, done))
    return MeasuredIterations(plan(recipe), tuple(counted), tuple(metrics))


def _tree(adapter: ModelAdapter, recipe: Recipe, ids: Sequence[int]) -> BranchTree:
    """The trees of some prompts, rolled out together in the first iteration."""
    inputs = read_inputs(recipe)
    sampler, cache = make_sampler(recipe, adapter), ConditioningCache(adapter)
    policy = Policy(adapter, cache, sampler, False, torch.device("cpu")).under(
        [inputs.conditions[prompt_id] for prompt_id in ids]
    )
    return rollout(
        policy,
        sampler,
        grow([inputs.schedule.plan(0, prompt_id) for prompt_id in ids]),
        policy.initial(recipe.tree.noise_seed, 0, [(prompt_id, 0) for prompt_id in ids]),
        NoiseSource(recipe.seed, 0),
        ids,
    )


def _states(tree: BranchTree, prompt: int) -> list[Tensor]:
    """One prompt's states at each depth (N_d, *latent)."""
    return [tree.states[depth][tree.topology.root[depth] == prompt] for depth in tree.topology.depths]


def _last_checkpoint(output: Path) -> Path:
    return max(RunDirectory(output).checkpoints.iterdir())


def _restored(case: AdapterCase, variant: str, output: Path | None) -> ModelAdapter:
    """The model of a run's last checkpoint, or without a run as training starts."""
    adapter = load(case)
    if variant == "lora":
        adapter.add_lora(require_lora(case), case.recipe().seed)
    if output is not None:
        adapter.restore(_last_checkpoint(output) / "model")
    return adapter


def _flat(adapter: ModelAdapter) -> Tensor:
    """All trainable numbers."""
    return torch.cat([value.detach().flatten() for value in trainable_parameters(adapter).values()])
