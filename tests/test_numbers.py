"""Every number of a recipe, and of the built-in plug-ins' options, with values that no one means.

Keys are found by walking the schema. Each value is refused by one message that names its key, or the recipe plans.
"""

from __future__ import annotations

import copy
import faulthandler
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from branchtree import load_recipe, train
from branchtree.errors import DivergenceError, RecipeError
from branchtree.planning.plan import plan_recipe
from branchtree.plugins.registry import registry
from branchtree.recipe.build import make_schedule
from branchtree.recipe.load import validate, validate_options
from branchtree.recipe.schema import Recipe, RewardSection
from branchtree.recipe.source import Source, override, read_yaml

PATIENCE = 300.0
"""Seconds after which a case counts as hanging; they take milliseconds."""
VALUES: list[Any] = [
    *(0, -1, 2**31, 2**63, 10**30, -(10**30)),
    *(1e308, -1e308, 5e-324, -0.5, 1.5),
    *(math.nan, math.inf, -math.inf),
    *(True, False, "1", "0.5", "nan"),
]
LISTS: dict[str, Callable[[Any], list[Any]]] = {
    "optim.betas": lambda value: [0.9, value],
    "tree.branches": lambda value: [value],
    "tree.splits": lambda value: [0, value],
}
"""Keys of several numbers."""
SMALL: dict[str, Any] = {
    "tree.steps": 4,
    "tree.splits": [0],
    "batch.prompts": 1,
    "lora": {"rank": 2},
    "callbacks": [],
}


@pytest.fixture(autouse=True)
def never_hanging(guest_site: Path, plug: Callable[[Path], None]) -> Iterator[None]:
    """The plug-in with the smallest model, and an end to what would not end."""
    plug(guest_site)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def members(annotation: Any) -> Iterator[Any]:
    """The classes that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from members(part)


def numeric_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The dotted keys of all numbers; of a list of sections, those of its first."""
    for name, field in model.model_fields.items():
        kinds = list(members(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is not None:
            first = ("0",) if issubclass(section, RewardSection) else ()
            yield from numeric_keys(section, (*prefix, name, *first))
        elif int in kinds or float in kinds:
            yield (*prefix, name)


def named(error: RecipeError, key: str) -> bool:
    """Whether it is one message, and speaks of the key: in the singular where one of several numbers is wrong."""
    return key.removesuffix("s") in str(error) and len(str(error).splitlines()) == 1


KEYS = [".".join(path) for path in numeric_keys(Recipe)]


@pytest.fixture(scope="module")
def source(guest_site: Path) -> Source:
    """A small recipe of the guest's, before it is checked."""
    found = read_yaml(guest_site / "branchtree_guest/recipes/guest.yaml")
    del found.data["smoke"]
    found.data |= {"name": "numbers"}
    override(found, SMALL)
    return found


def test_the_walk_finds_the_numbers() -> None:
    assert {"seed", "optim.lr", "optim.betas", "tree.branches", "tree.draw.first", "lora.rank"} <= set(KEYS)
    assert {"rewards.0.weight", "evaluation.rewards.0.weight", "evaluation.seed", "run.embeddings_gib"} <= set(KEYS)
    assert "run.tf32" not in KEYS and "optim.schedule" not in KEYS


@pytest.mark.parametrize("key", KEYS)
def test_a_number_is_refused_by_name_or_plans(key: str, source: Source) -> None:
    for value in [*VALUES, *(LISTS[key](value) for value in VALUES if key in LISTS)]:
        tried = copy.deepcopy(source)
        try:
            override(tried, {key: value})
            recipe = validate(tried)
        except RecipeError as error:
            assert named(error, key.rsplit(".", 1)[-1]), (value, str(error))
            continue
        plain = value if isinstance(value, list) else [value]
        assert not any(isinstance(number, bool | str) or not math.isfinite(number) for number in plain), value
        try:
            plan_recipe(recipe)
        except RecipeError as error:
            assert any(named(error, part) for part in key.split(".")[-2:]), (value, str(error))


REQUIRED: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "path": "nowhere",
    "url": "http://localhost:1",
    "interpolator": "blend",
}
PLUGINS = [
    (kind, name)
    for kind in ("models", "rewards", "features")
    for name, entry in getattr(registry(), kind).items()
    if entry.distribution == "branchtree-grpo"
]


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_a_number_of_a_plug_in_is_refused_by_name_or_has_a_bound(kind: str, name: str) -> None:
    """Whatever is accepted is a number that tensors and files can hold."""
    config = getattr(registry(), kind)[name].config
    needed = {key: REQUIRED[key] for key, field in config.model_fields.items() if field.is_required()}
    for path in numeric_keys(config):
        key = ".".join(path)
        for value in VALUES:
            try:
                validate_options(config, {**needed, key: value}, (kind,))
            except RecipeError as error:
                assert named(error, key), (value, str(error))
            else:
                assert not isinstance(value, bool | str), (key, value)
                assert abs(value) < 2**31, (key, value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampler.kind": "cps", "sampler.eta": 2}, "sampler.eta: cps takes an eta up to 1"),
        ({"sampler.kind": "ddim", "sampler.eta": 1.5}, "sampler.eta: ddim takes an eta up to 1"),
        ({"optim.betas": [0.9, 1.5]}, "optim.betas.1: input should be less than 1 (it is 1.5)"),
        ({"sampler.shift": 1e9}, "sampler.shift: input should be less than or equal to 100"),
        ({"tree.strength": 1e308}, "tree.strength: input should be less than or equal to 1000"),
        ({"tree.steps": 2**31}, "tree.steps: input should be less than or equal to 1000"),
        ({"lora.rank": 2**31}, "lora.rank: input should be less than or equal to 4096"),
        ({"optim.lr": True}, "optim.lr: input should be a number, without quotes (it is True)"),
        ({"optim.lr": "1e-4"}, "optim.lr: input should be a number, without quotes (it is '1e-4')"),
        ({"run.tf32": "yes"}, "run.tf32: input should be true or false, without quotes (it is 'yes')"),
        ({"run.tf32": 1}, "run.tf32: input should be true or false, without quotes (it is 1)"),
        ({"run.threads": 2**31}, "run.threads: input should be less than or equal to 256"),
        ({"optim.steps_per_iteration": 10**9}, "optim.steps_per_iteration: input should be less than or equal to 1000"),
        ({"scoring.window": 2**63}, "scoring.window: input should be less than or equal to 10000"),
        ({"run.embeddings": {"gib": math.inf}}, "run.embeddings: input should be a valid string"),
        ({"run.embeddings_gib": math.inf}, "run.embeddings_gib: input should be a finite number"),
        ({"batch.update_rows": 2**63}, f"batch.update_rows: the number is too large (it is {2**63})"),
        ({"model.spread": "0.5"}, "model.spread: input should be a number, without quotes (it is '0.5')"),
        ({"model.spread": True}, "model.spread: input should be a number, without quotes (it is True)"),
        ({"rewards.0.target": math.nan}, "rewards.0.target: "),
        ({"tree.branches": 70_000}, "tree: branches: 70000 leaves for each prompt are too many"),
        ({"tree.splits": [0, 1, 2], "tree.branches": 100}, "branches: 100 x 100 x 100 = 1000000 leaves"),
        ({"tree.branches": 1000, "batch.prompts": 1000}, "batch.prompts 1000 x 4001 nodes of a tree = 4001000"),
        (
            {"tree.timestep_fraction": 0.1},
            "timestep_fraction 0.1 of a trajectory's 3 stochastic steps is less",
        ),
        (
            {"tree.sde": "window", "tree.window.size": 2, "tree.window.stop": 3},
            "a window cannot slide down to step 3: steps 0 to 2 can be stochastic",
        ),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as told:
        load_recipe("guest", {**SMALL, **overrides})
    assert message in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_split_at_a_window_never_leaves_the_grid() -> None:
    """However long a run is: its window stops where the last stochastic step is."""
    overrides = {"tree.splits": "window", "tree.sde": "window", "tree.window.size": 1, "tree.window.every": 1}
    schedule = make_schedule(load_recipe("guest", {**SMALL, **overrides, "tree.window.stop": 2}))
    assert [schedule.plan(iteration, 0).splits for iteration in (0, 1, 2, 1000)] == [(0,), (1,), (2,), (2,)]


LOWEST = {
    **dict.fromkeys(["credit.eps", "credit.clip", "loss.clip_range", "optim.lr", "optim.max_grad_norm"], 5e-324),
    "optim.eps": 1e-30,
    "sampler.eta": 1e-8,
    "sampler.shift": 0.01,
    "tree.strength": 5e-324,
    "optim.ema": 5e-324,
    "loss.kl": 5e-324,
    "optim.betas": [0, 0],
    "scoring.window": 1,
    "credit.beta": 5e-324,
}
HIGHEST = {
    **dict.fromkeys(["credit.beta", "credit.eps", "credit.clip", "loss.clip_range", "loss.kl"], 1e6),
    "optim.lr": 10,
    "optim.weight_decay": 10,
    "optim.eps": 1,
    "optim.max_grad_norm": 1e12,
    "sampler.eta": 10,
    "sampler.shift": 100,
    "tree.strength": 1e3,
    "scoring.window": 10_000,
    "optim.steps_per_iteration": 1000,
    "run.checkpoint_every": 2**63 - 1,
    "batch.update_rows": 2**63 - 1,
    "batch.rollout_rows": 2**63 - 1,
    "rewards.0.weight": 1e6,
    "run.keep_checkpoints": 2**63 - 1,
    "optim.max_refused": 2**63 - 1,
}


@pytest.mark.parametrize("extremes", [LOWEST, HIGHEST], ids=["lowest", "highest"])
def test_the_last_values_that_are_allowed_train(extremes: dict[str, Any], tmp_path: Path) -> None:
    run = {"run.iterations": 2, "evaluation": None, "run.sample_every": 1000, "run.tree_every": 1000, "lora": None}
    try:
        assert train("guest", {**SMALL, **run, **extremes}, output=tmp_path / "run").iterations == 2
    except DivergenceError as error:
        assert extremes is HIGHEST and "the weights have diverged in iteration" in str(error)
