"""What full_size.py times: the recipes, the models, and one iteration of each method in parts."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from branchtree_adapters.flux import FluxConfig
from branchtree_adapters.wan_layout import WanConfig
from operations import synchronize
from random_models import SMALL_FLUX, SMALL_WAN, Execution, RandomFlux, RandomWan, write_configs
from sampling import SampledDenoiser, Timed, part_of
from sessions import QUIET, Prompts, credited, random_scores, updated

from branchtree.cli.arguments import parse_overrides
from branchtree.core.cost import Cost, count
from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import rollout
from branchtree.core.tree import BranchTree
from branchtree.data.prompts import training_conditions
from branchtree.planning.memory import estimate_memory
from branchtree.plugins import ModelAdapter
from branchtree.recipe import load_recipe
from branchtree.recipe.build import make_credit_rule, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.training.inputs import Inputs
from branchtree.training.session import Session


@dataclass(frozen=True)
class Subject:
    """A model, and the batches that suit a GPU of 80 GB or more."""

    recipe: str
    build: Callable[[dict[str, Any], Execution], ModelAdapter]
    batch: dict[str, int]
    small: dict[str, Any]
    small_configs: Any


# Under gradient checkpointing 8 rows of FLUX keep 11 GiB beside 22 GiB of frozen weights; 4 predictions of Wan, which
# guidance makes 8 rows, 26 GiB beside 3. Larger batches fit, and hardly run faster: a row has thousands of tokens.
SUBJECTS = {
    "flux": Subject(
        "flux_t2i_branchgrpo",
        lambda options, execution: RandomFlux(FluxConfig(**options), execution),
        {"batch.rollout_rows": 16, "batch.update_rows": 8, "batch.decode_rows": 8},
        {"model.height": 64, "model.width": 64, "lora.rank": 4},
        SMALL_FLUX,
    ),
    "wan": Subject(
        "wan_t2v_motion",
        lambda options, execution: RandomWan(WanConfig(**options), execution),
        {"batch.rollout_rows": 8, "batch.update_rows": 4, "batch.decode_rows": 1},
        {"model.height": 32, "model.width": 32, "model.frames": 5, "model.max_sequence_length": 16, "lora.rank": 4},
        SMALL_WAN,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the command line changes."""

    small: bool = False
    prompts: int = 2
    rollout_rows: int | None = None
    update_rows: int | None = None
    execution: Execution = field(default_factory=Execution)
    overrides: tuple[str, ...] = ()


def recipe_of(name: str, method: str, settings: Settings, folder: Path) -> Recipe:
    """A model's recipe under a method; ``folder`` takes the configuration files of a small model."""
    subject = SUBJECTS[name]
    overrides: dict[str, Any] = {**QUIET, **subject.batch, "lora.rank": 64, "batch.rollout_prompts": None}
    overrides |= {"batch.prompts": settings.prompts}
    overrides |= {"data.prompts": [f"prompt {place}" for place in range(max(settings.prompts, 2))]}
    if settings.rollout_rows:
        overrides["batch.rollout_rows"] = settings.rollout_rows
    if settings.update_rows:
        overrides["batch.update_rows"] = settings.update_rows
    if settings.small:
        overrides |= {**subject.small, "model.path": write_configs(folder / name, subject.small_configs)}
    return load_recipe(f"{subject.recipe}+{method}", overrides | parse_overrides(list(settings.overrides)))


def adapter(name: str, recipe: Recipe, settings: Settings) -> ModelAdapter:
    """The recipe's model with random weights, not yet loaded."""
    return SUBJECTS[name].build(dict(recipe.model.options), settings.execution)


def inputs_of(name: str, recipe: Recipe, settings: Settings) -> Inputs:
    """What a session is opened with: the model with random weights, and no reward."""
    conditions = training_conditions(recipe.data)
    model = adapter(name, recipe, settings)
    return Inputs(recipe, model, [], [], conditions, [], make_schedule(recipe), [])


def cost_of(recipe: Recipe, iteration: int) -> Cost:
    """The rows of an iteration, by the planner's own count."""
    schedule = make_schedule(recipe)
    plans = [schedule.plan(iteration, prompt) for prompt in range(recipe.batch.prompts)]
    return count(plans, make_credit_rule(recipe), iteration)


@dataclass(frozen=True)
class Measurement:
    """One iteration."""

    rollout: Timed
    update: Timed
    decode: Timed | None
    peak_bytes: int
    planned_bytes: int

    def expected(self, recipe: Recipe, iteration: int) -> float:
        """Seconds of another method's iteration at this one's seconds a row."""
        cost = cost_of(recipe, iteration)
        seconds = cost.rollout_rows * self.rollout.seconds / self.rollout.rows
        seconds += cost.gradient_rows * self.update.seconds / self.update.rows
        return seconds + (cost.leaves * self.decode.seconds / self.decode.rows if self.decode else 0.0)


def measure(session: Session, iteration: int, share: float, decoding: bool) -> Measurement:
    """Time an iteration's rollout, gradient pass and decoding, a share of the batches of each."""
    device, recipe = session.device, session.recipe
    _start_peak(device)
    prompts = Prompts.of(session, iteration)
    start = time.perf_counter()
    denoiser, tree = sampled_rollout(session, iteration, prompts, share)
    rolled_out = denoiser.timed(time.perf_counter() - start)
    families = credited(session, iteration, tree, random_scores(tree, recipe.seed))
    run = part_of(len(families), recipe.batch.update_rows, share)
    synchronize(device)
    start = time.perf_counter()
    record = updated(session, iteration, tree, families.select(torch.arange(run)), prompts)
    synchronize(device)
    trained = Timed.scaled(len(families), record.rows, time.perf_counter() - start)
    decoded = timed_decode(session, tree, share) if decoding else None
    cost = cost_of(recipe, iteration)
    planned = estimate_memory(recipe, session.inputs.model.footprint(), cost).device
    return Measurement(rolled_out, trained, decoded, _peak(device), planned)


def sampled_rollout(
    session: Session, iteration: int, prompts: Prompts, share: float
) -> tuple[SampledDenoiser, BranchTree]:
    """Grow the iteration's trees as a run does, with a share of the batches going through the denoiser."""
    recipe, policy, batch = session.recipe, prompts.policy, prompts.batch
    denoiser = SampledDenoiser(policy.training(None), session.device, share)
    tree = rollout(
        denoiser,
        session.sampler,
        batch.topology,
        policy.initial(recipe.tree.noise_seed, iteration, [(prompt_id, 0) for prompt_id in batch.ids]),
        NoiseSource(recipe.seed, iteration),
        batch.ids,
        max_rows=recipe.batch.rollout_rows,
        store=torch.device("cpu") if recipe.batch.states == "host" else None,
    )
    return denoiser, tree


def timed_decode(session: Session, tree: BranchTree, share: float) -> Timed:
    """Decode a share of the leaves, with the decoder's move to the device and back, as a run does."""
    rows = session.recipe.batch.decode_rows
    leaves = tree.leaves[: part_of(len(tree.leaves), rows, share)]
    start = time.perf_counter()
    for part in leaves.split(rows or len(leaves)):
        session.inputs.model.decode(part)
    session.inputs.model.release_frozen()
    synchronize(session.device)
    return Timed.scaled(len(tree.leaves), len(leaves), time.perf_counter() - start)


def _start_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Bytes that tensors took on a GPU at the fullest moment; on a CPU, of the whole process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
