"""The large recipes: what they say of hardware and of the number of prompts, and the commands that start them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import branchtree
from branchtree.cli.arguments import parse_overrides
from branchtree.core.families import collect_families
from branchtree.core.pruning import trainable_edges
from branchtree.core.tree import grow
from branchtree.planning.gpus import GPUS
from branchtree.recipe import load_recipe, recipe_names
from branchtree.recipe.build import make_schedule
from branchtree.recipe.load import builtin_folder
from branchtree.recipe.source import parse_value
from branchtree.training.update import partition

ROOT = Path(__file__).parents[1]

SHIPPED = sorted(recipe_names([builtin_folder()]))
SMALL = [name for name in SHIPPED if "quickstart" in name]
LARGE = [name for name in SHIPPED if name not in SMALL]
HAND_WRITTEN = [name for name in LARGE if load_recipe(name).model.adapter == "wan"]
USABLE_BYTES = {gpu.name.partition("(")[2].split()[0]: gpu.usable for gpu in reversed(GPUS)}
"""By what a card's name says of its memory, in GB."""

HEADROOM = 0.85
"""The part of a card that a plan may take: rewards and the decoder at work need the rest."""


def said(name: str) -> str:
    """What a description ends with: the hardware that the recipe needs."""
    return load_recipe(name).description.rpartition("; ")[2]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_description_says_what_hardware_is_needed(name: str) -> None:
    if name in SMALL:
        assert said(name) == "minutes on two CPU cores"
    elif name.startswith("flux_t2i_") and not name.endswith("_24gb"):  # the same model in batches of the same size
        assert said(name) == said("flux_t2i_branchgrpo")


@pytest.mark.parametrize("name", ["flux_t2i_branchgrpo", "flux_t2i_branchgrpo_24gb", *HAND_WRITTEN])
def test_the_hardware_is_enough_by_the_plan(name: str) -> None:
    needs = re.findall(r"(?:(one|eight) (\d+) GB GPUs?|one with (\S+)=(\S+))", said(name))
    assert needs
    size = ""
    for number, memory, key, value in needs:
        size = memory or size
        memory_of = branchtree.plan(name, {key: parse_value(value)} if key else {}).memory
        if number == "eight":
            sharded = (memory_of.weights + memory_of.optimizer) / 8 + memory_of.activations + memory_of.forward
            # Whole weights pass through each device before they are sharded.
            assert max(memory_of.weights, sharded) < USABLE_BYTES[size]
            assert "(FSDP2)" in said(name)
        else:
            assert memory_of.device < HEADROOM * USABLE_BYTES[size]


def comment(name: str, key: str) -> str:
    """What stands behind a key of a recipe's file, or of the nearest one that it extends."""
    text = (builtin_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(rf"^batch:\n(?:  .*\n)*?  {key}: \S+  # (.*)$", text, re.MULTILINE)
    if found:
        return found[1]
    extended = re.search(r"^extends: \[?([\w/]+)", text, re.MULTILINE)
    assert extended, f"{name} does not say how its {key} follows from the number of GPUs"
    return comment(extended[1], key)


@pytest.mark.parametrize("name", LARGE)
def test_the_comment_on_prompts_has_the_number_of_the_recipe(name: str) -> None:
    prompts = load_recipe(name).batch.prompts
    assert comment(name, "prompts").startswith("for each GPU")
    assert f"on G GPUs give batch.prompts = {prompts} G" in comment(name, "prompts")


def test_the_released_settings_are_those_of_the_script() -> None:
    recipe, paper = load_recipe("flux_t2i_branchgrpo_released"), load_recipe("flux_t2i_branchgrpo")
    plan = branchtree.plan(recipe)
    assert (recipe.batch.prompts, plan.iteration.edges, plan.iteration.trained_edges) == (2, 436, 404)
    assert round(plan.iteration.trained_edges / recipe.optim.steps_per_iteration) == 12
    assert (recipe.seed, recipe.tree.noise_seed) == (1223627, 42)
    assert (recipe.loss.clip_range, recipe.optim.max_grad_norm) == (1e-3, 1.0)
    assert (recipe.credit.beta, recipe.optim.ema) == (0.0, None)
    changed = {"name", "description", "seed", "tree", "credit", "loss", "optim", "batch", "run"}
    assert recipe.model_dump(exclude=changed) == paper.model_dump(exclude=changed)


def test_each_released_step_has_about_twelve_edges() -> None:
    recipe = load_recipe("flux_t2i_branchgrpo_released")
    topology = grow([make_schedule(recipe).plan(0, prompt) for prompt in range(2)])
    advantages = [torch.ones(topology.width(depth)) for depth in topology.depths]
    families = collect_families(topology, advantages, trainable_edges(topology))
    steps = partition(families, recipe.optim.steps_per_iteration, recipe.seed, 0, [0, 1], 0)
    edges = [step.edges for step in steps]
    assert sum(edges) == 404
    assert min(edges) >= 10
    assert max(edges) <= 15


# Commands on pages and in comments


def started() -> list[tuple[str, str]]:
    """Each command that starts several processes, with the file that shows it."""
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *(ROOT / "recipes").rglob("*.yaml")]
    found: list[tuple[str, str]] = []
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\n# ", "\n").replace("\\\n", " ")
        found += [
            (page.name, line.strip()) for line in text.splitlines() if line.strip().startswith("accelerate launch")
        ]
    return found


def test_commands_for_several_gpus_multiply_the_recipes_prompts() -> None:
    checked = []
    for page, command in started():
        words = shlex.split(command)
        recipe = next((word for word in words if word in LARGE), None)
        if recipe is None or "--config_file" not in words:
            continue
        config = ROOT / "recipes" / "accelerate" / Path(words[words.index("--config_file") + 1]).name
        processes = yaml.safe_load(config.read_text(encoding="utf-8"))["num_processes"]
        given = parse_overrides([word for word in words[words.index(recipe) + 1 :] if re.match(r"[a-z_.]+=", word)])
        each, prompts = load_recipe(recipe).batch.prompts, load_recipe(recipe, given).batch.prompts
        assert prompts == each * processes, f"{page}: {command}"
        checked.append(page)
    assert {"scale.md", "eight_gpus.yaml", "fsdp2.yaml", "zero2.yaml", "fsdp2_nodes.yaml"} <= {*checked}
