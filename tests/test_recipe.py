"""Recipes: composing them, overriding them, and every way in which one can be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict
from strategies import thorough

from branchtree.errors import RecipeError
from branchtree.files.names import checked_name
from branchtree.recipe import Recipe, find_recipe, load_recipe, recipe_names, validate_options
from branchtree.recipe.load import builtin_folder
from branchtree.recipe.schema import TreeSection
from branchtree.recipe.source import parse_value, read_yaml, write_yaml
from branchtree.run.directory import RunDirectory

BASE = """\
model: {adapter: toy, size: 3}
rewards:
  - reward: bright
    weight: 2.0
data:
  prompts: [a, b]
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, overrides: Mapping[str, Any] | None = None, smoke: bool = False) -> Recipe:
    """A recipe of BASE and some more lines; the first of them is line 7."""
    return load_recipe(write(folder, "mine", BASE + text), overrides, smoke, folders=[folder])


def refusal(folder: Path, text: str, overrides: Mapping[str, Any] | None = None, smoke: bool = False) -> str:
    with pytest.raises(RecipeError) as refused:
        load(folder, text, overrides, smoke)
    return str(refused.value).replace(f"{folder}/", "")


def test_a_small_recipe_gets_the_papers_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, "")
    assert (recipe.name, recipe.seed) == ("mine", 42)
    assert (recipe.tree.steps, recipe.tree.split_steps, recipe.tree.branches) == (20, (0, 3, 6, 9), 2)
    assert (recipe.tree.siblings, recipe.tree.strength, recipe.tree.noise_seed) == ("correlated", 4.0, 1223627)
    assert (recipe.sampler.kind, recipe.sampler.eta, recipe.sampler.shift) == ("dance", 0.3, 3.0)
    assert (recipe.credit.beta, recipe.credit.clip, recipe.loss.clip_range) == (1.0, 5.0, 1e-4)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.run.iterations) == (1e-5, 1e-4, 300)


def test_a_plugins_own_keys_are_kept_for_it(tmp_path: Path) -> None:
    recipe = load(tmp_path, "")
    assert recipe.model.options == {"size": 3}
    assert recipe.rewards[0].options == {}


# --- extends ---


def test_extending_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE + "tree:\n  steps: 10\n  splits: [0, 2]\noptim: {lr: 1e-3, eps: 1e-6}\n")
    child = write(tmp_path, "child", "extends: base\ntree: {splits: [1]}\nrewards: [{reward: dark}]\n")
    recipe = load_recipe(child, folders=[tmp_path])
    assert (recipe.tree.steps, recipe.tree.splits) == (10, (1,))
    assert (recipe.optim.lr, recipe.optim.eps) == (1e-3, 1e-6)
    assert [(entry.reward, entry.weight) for entry in recipe.rewards] == [("dark", 1.0)]
    assert recipe.model.options == {"size": 3}


def test_a_chain_of_recipes_by_name_and_by_path(tmp_path: Path) -> None:
    write(tmp_path / "far", "first", BASE + "seed: 1\nloss: {kl: 0.1}\n")
    write(tmp_path, "second", "extends: far/first.yaml\nseed: 2\noptim: {lr: 2.0}\n")
    write(tmp_path, "third", "extends: second\nseed: 3\n")
    recipe = load_recipe("third", folders=[tmp_path])
    assert (recipe.seed, recipe.optim.lr, recipe.loss.kl) == (3, 2.0, 0.1)


def test_of_several_bases_the_later_wins(tmp_path: Path) -> None:
    write(tmp_path, "one", BASE + "seed: 1\nloss: {kl: 0.1}\n")
    write(tmp_path, "two", "seed: 2\n")
    child = write(tmp_path, "child", "extends: [one, two]\n")
    recipe = load_recipe(child, folders=[tmp_path])
    assert (recipe.seed, recipe.loss.kl) == (2, 0.1)


def test_a_base_may_be_put_under_methods(tmp_path: Path) -> None:
    """As on the command line: those of the folders of recipes, over what the base says."""
    write(tmp_path, "base", BASE + "seed: 1\nloss: {kl: 0.1}\n")
    (tmp_path / "methods").mkdir()
    write(tmp_path / "methods", "gentle", "loss: {kl: 0.5}\n")
    child = write(tmp_path, "child", "extends: base+gentle\nseed: 3\n")
    recipe = load_recipe(child, folders=[tmp_path])
    assert (recipe.seed, recipe.loss.kl) == (3, 0.5)
    assert recipe.loss == load_recipe("base+gentle", folders=[tmp_path]).loss
    misspelt = write(tmp_path, "child", "extends: base+gentel\n")
    with pytest.raises(RecipeError, match=r"child\.yaml:1: extends: no method 'gentel'; did you mean 'gentle'"):
        load_recipe(misspelt, folders=[tmp_path])


def test_a_recipe_has_a_name_and_a_description_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE + "name: first\ndescription: the first\n")
    child = write(tmp_path, "child", "extends: base\n")
    assert load_recipe("base", folders=[tmp_path]).name == "first"
    recipe = load_recipe(child, folders=[tmp_path])
    assert (recipe.name, recipe.description) == ("child", "")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_recipes_that_extend_each_other_are_refused(length: int, tmp_path: Path) -> None:
    for place in range(length):
        write(tmp_path, f"r{place}", f"extends: r{(place + 1) % length}\n")
    with pytest.raises(RecipeError, match=r"extends itself through .*r0\.yaml"):
        load_recipe("r0", folders=[tmp_path])


def test_a_base_used_twice_is_no_cycle(tmp_path: Path) -> None:
    write(tmp_path, "root", BASE)
    for name in ("left", "right"):
        write(tmp_path, name, f"extends: root\nseed: {len(name)}\n")
    write(tmp_path, "both", "extends: [left, right]\n")
    assert load_recipe("both", folders=[tmp_path]).seed == len("right")


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ("base", "mine.yaml:7: extends: no recipe 'base'. Known: mine."),
        ("mini", "mine.yaml:7: extends: no recipe 'mini'; did you mean 'mine'?"),
        ("far/base.yaml", "mine.yaml:7: extends: no recipe file far/base.yaml"),
        ("5", "mine.yaml:7: extends: write a recipe's name or path, or a list of them (it is 5)"),
        ("[5]", "mine.yaml:7: extends: write a recipe's name or path"),
        ("", "mine.yaml:7: extends: write a recipe's name or path"),
    ],
)
def test_a_base_that_is_not_there_is_named_with_its_line(bases: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, f"extends: {bases}\n")


def test_a_mistake_in_a_base_is_placed_in_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE + "optim:\n  lrr: 1\n")
    child = write(tmp_path, "child", "extends: base\noptim: {lr: 2.0}\n")
    with pytest.raises(RecipeError, match=r"base\.yaml:8: optim\.lrr: unknown key 'lrr'; did you mean 'lr'\?"):
        load_recipe(child, folders=[tmp_path])


# --- prompt files ---


@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_a_prompt_file_is_relative_to_the_recipe_that_names_it(section: str, tmp_path: Path) -> None:
    files = {"data": "[a]", "evaluation": "[b]", section: "texts/p.txt"}
    data = f"data: {{prompts: {files['data']}}}\n"
    evaluation = f"evaluation: {{prompts: {files['evaluation']}, rewards: [{{reward: bright}}]}}\n"
    write(tmp_path / "far", "base", BASE.partition("data:")[0] + data + evaluation)
    child = write(tmp_path, "child", "extends: far/base.yaml\n")
    recipe = load_recipe(child, folders=[])
    chosen = recipe.data if section == "data" else recipe.evaluation
    assert chosen is not None
    assert chosen.prompts == str(tmp_path / "far" / "texts" / "p.txt")


@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_a_data_folder_is_relative_to_the_recipe_that_names_it(section: str, tmp_path: Path) -> None:
    keys = {"data": "prompts: [a]", "evaluation": "prompts: [b], rewards: [{reward: bright}]"}
    keys[section] += ", folder: texts/pictures"
    lines = "".join(f"{name}: {{{text}}}\n" for name, text in keys.items())
    write(tmp_path / "far", "base", BASE.partition("data:")[0] + lines)
    child = write(tmp_path, "child", "extends: far/base.yaml\n")
    recipe = load_recipe(child, folders=[])
    chosen = recipe.data if section == "data" else recipe.evaluation
    assert chosen is not None
    assert chosen.folder == str(tmp_path / "far" / "texts" / "pictures")
    other = load_recipe(child, {f"{section}.folder": "here"}, folders=[])
    chosen = other.data if section == "data" else other.evaluation
    assert chosen is not None
    assert chosen.folder == str(Path.cwd() / "here")


def test_absolute_prompt_files_hub_names_and_lists_are_left_alone(tmp_path: Path) -> None:
    for prompts in (str(tmp_path / "p.jsonl"), "hub:org/name"):
        assert load(tmp_path, "", {"data.prompts": prompts}).data.prompts == prompts
    write(tmp_path, "hub", BASE.partition("data:")[0] + "data: {prompts: hub:org/name}\n")
    assert load_recipe("hub", folders=[tmp_path]).data.prompts == "hub:org/name"
    assert load(tmp_path, "").data.prompts == ("a", "b")


def test_a_prompt_file_in_an_override_is_relative_to_the_working_folder(tmp_path: Path) -> None:
    assert load(tmp_path, "", {"data.prompts": "p.txt"}).data.prompts == str(Path.cwd() / "p.txt")


# --- smoke ---

SMOKE = """\
tree: {steps: 10, splits: [0]}
lora: {rank: 4}
smoke:
  model: {adapter: tiny}
  data: {prompts: tiny.txt}
  tree: {steps: 5}
  run: {iterations: 1}
"""


def test_smoke_swaps_the_model_and_merges_the_rest(tmp_path: Path) -> None:
    full, small = load(tmp_path, SMOKE), load(tmp_path, SMOKE, smoke=True)
    assert (full.model.adapter, full.tree.steps, full.run.iterations) == ("toy", 10, 300)
    assert (small.model.adapter, small.model.options) == ("tiny", {})
    assert (small.tree.steps, small.tree.splits, small.run.iterations) == (5, (0,), 1)
    assert small.data.prompts == str(tmp_path / "tiny.txt")
    assert small.lora == full.lora


def test_smoke_of_a_base_serves_the_recipes_that_extend_it(tmp_path: Path) -> None:
    write(tmp_path / "far", "base", BASE + SMOKE)
    child = write(tmp_path, "child", "extends: far/base.yaml\nsmoke: {run: {iterations: 2}}\n")
    recipe = load_recipe(child, smoke=True, folders=[])
    assert (recipe.model.adapter, recipe.run.iterations) == ("tiny", 2)
    assert recipe.data.prompts == str(tmp_path / "far" / "tiny.txt")


def test_overrides_come_after_smoke(tmp_path: Path) -> None:
    assert load(tmp_path, SMOKE, {"run.iterations": 7}, smoke=True).run.iterations == 7


def test_mistakes_inside_smoke_are_placed(tmp_path: Path) -> None:
    text = "smoke:\n  tree:\n    stepz: 4\n"
    assert load(tmp_path, text).tree.steps == 20
    assert "mine.yaml:9: tree.stepz: unknown key 'stepz'; did you mean 'steps'?" in refusal(tmp_path, text, smoke=True)


@pytest.mark.parametrize("text", ["", "smoke: 5\n"])
def test_a_recipe_without_smoke_says_so(text: str, tmp_path: Path) -> None:
    assert "has no 'smoke' section" in refusal(tmp_path, text, smoke=True)


# --- overrides ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("12", 12),
        ("true", True),
        ("null", None),
        ("", None),
        ("[0, 3]", [0, 3]),
        ("{rank: 4}", {"rank": 4}),
        ("dense", "dense"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("a: b", {"a": "b"}),
        ("hub:org/name", "hub:org/name"),
    ],
)
def test_values_of_overrides_are_yaml(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["[1", "{a", "!!python/name:os.system", "'"])
def test_a_value_that_is_no_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not YAML"):
        parse_value(text)


def test_overrides_reach_sections_lists_and_plugin_keys(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "lora: null\n",
        {
            "optim.lr": 2e-5,
            "tree.window.size": 3,
            "rewards.0.weight": 0.5,
            "data.prompts.1": "c",
            "lora.rank": 8,
            "model.size": 9,
            "seed": 3,
        },
    )
    assert (recipe.optim.lr, recipe.tree.window.size, recipe.rewards[0].weight) == (2e-5, 3, 0.5)
    assert recipe.data.prompts == ("a", "c")
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.model.options, recipe.seed) == (8, {"size": 9}, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lrr": 5}, "override optim.lrr=5: optim.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ({"optm.lr": 5}, "override optm.lr=5: optm: unknown key 'optm'; did you mean 'optim'?"),
        ({"optim.lr": "fast"}, "override optim.lr=fast: optim.lr: input should be a valid number"),
        ({"rewards.1.weight": 5}, "override rewards.1.weight: 'rewards' is a list of 1; write an index from 0"),
        ({"rewards.1": 5}, "override rewards.1: 'rewards' is a list of 1; write an index from 0"),
        ({"rewards.first.weight": 5}, "override rewards.first.weight: 'rewards' is a list of 1"),
        ({"rewards.weight": 5}, "override rewards.weight: 'rewards' is a list of 1"),
        ({"model.size.x": 5}, "override model.size.x: 'model.size' holds a plain value, not keys"),
        ({"model.size.x.y": 5}, "override model.size.x.y: 'model.size' holds a plain value, not keys"),
        ({"seed.x": 5}, "override seed.x=5: seed: input should be a valid integer"),
        ({"rewards": []}, "override rewards=[]: rewards: tuple should have at least 1 item"),
        ({"smoke.seed": 5}, "override smoke.seed=5: smoke: unknown key 'smoke'"),
        ({"": 5}, "override =5: recipe: unknown key ''"),
    ],
)
def test_bad_overrides_are_named(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, "", overrides)


def test_what_an_override_replaces_is_no_longer_placed_in_the_file(tmp_path: Path) -> None:
    told = refusal(tmp_path, "tree:\n  branches: 3\n", {"tree": {"branches": 1}})
    assert told.startswith("override tree={'branches': 1}: tree.branches: a split needs at least 2 children")


# --- mistakes, each with file and line ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trees: {}", "mine.yaml:7: trees: unknown key 'trees'; did you mean 'tree'? Known: alarm, batch, callbacks,"),
        ("tree:\n  window:\n    sise: 4", "mine.yaml:9: tree.window.sise: unknown key 'sise'; did you mean 'size'?"),
        ("zzz: 1", "mine.yaml:7: zzz: unknown key 'zzz'. Known: alarm, batch,"),
        ("seed: 2024-99-99", "mine.yaml:7: seed: input should be a valid integer"),
        ("seed: many", "mine.yaml:7: seed: input should be a valid integer"),
        ("seed: -1", "mine.yaml:7: seed: input should be greater than or equal to 0 (it is -1)"),
        ("seed: 9223372036854775808", "mine.yaml:7: seed: input should be less than"),
        ("tree: 5", "mine.yaml:7: tree: input should be a valid dictionary"),
        ("run:\n  iterations: 0", "mine.yaml:8: run.iterations: input should be greater than or equal to 1 (it is 0)"),
        ("optim:\n  lr: .nan", "mine.yaml:8: optim.lr: input should be a finite number"),
        ("loss:\n  kl: .inf", "mine.yaml:8: loss.kl: input should be a finite number"),
        ("run:\n  precision: fp8", "mine.yaml:8: run.precision: input should be 'fp32' or 'bf16' (it is 'fp8')"),
        ("run:\n  trackers: wandb", "mine.yaml:8: run.trackers: input should be a valid tuple"),
        ("lora: {alpha: 3}", "mine.yaml:7: lora.rank: is missing"),
        ("callbacks:\n  - name: x", "mine.yaml:8: callbacks.0.callback: is missing"),
        ("tree:\n  splits: [0, x]", "mine.yaml:8: tree.splits.1: input should be a valid integer"),
        ("tree:\n  draw: {first: 0.9, last: 0.2}", "mine.yaml:8: tree.draw: first is 0.9, after last, 0.2"),
        ("evaluation: {prompts: [a], rewards: []}", "mine.yaml:7: evaluation.rewards: tuple should have at least 1"),
        ("1: 2", "mine.yaml:7: 1: unknown key '1'"),
    ],
)
def test_a_mistake_is_told_with_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


def test_every_mistake_is_told_and_each_once(tmp_path: Path) -> None:
    told = refusal(tmp_path, "seed: x\ntree:\n  splits: [0, x]\n  branches: [2, y]\noptim: {lr: 0}\n").splitlines()
    assert [line.split(": ")[1] for line in told] == ["seed", "tree.splits.1", "tree.branches.1", "optim.lr"]


def test_missing_sections_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "empty", "seed: 1\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert str(refused.value).splitlines() == [f"{path}: {key}: is missing" for key in ("model", "rewards", "data")]


def test_a_reward_entry_without_a_name_is_told_once(tmp_path: Path) -> None:
    path = write(tmp_path, "bare", BASE.replace("reward: bright", "label: bright"))
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert str(refused.value) == f"{path}:3: rewards.0.reward: is missing"


def test_a_reward_weight_is_finite(tmp_path: Path) -> None:
    path = write(tmp_path, "heavy", BASE.replace("2.0", ".inf"))
    with pytest.raises(RecipeError, match=r"heavy\.yaml:4: rewards\.0\.weight: input should be a finite number"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "mine.yaml:8: not valid YAML: key 'seed' is written twice in one mapping"),
        (
            "tree: {steps: 5, splits: [],\n  steps: 6}",
            "mine.yaml:8: not valid YAML: key 'steps' is written twice in one",
        ),
        ("seed: [1", "mine.yaml:7: not valid YAML"),
        ("seed:\n\t- 1", "mine.yaml:8: not valid YAML"),
        ("seed: !!python/object:os.system {}", "mine.yaml:7: not valid YAML: could not determine a constructor"),
        ("seed: *nothing", "mine.yaml:7: not valid YAML: found undefined alias"),
        ("[1]: 2", "mine.yaml:7: not valid YAML: found unhashable key"),
        ("description: a\x07b", "mine.yaml:7: not valid YAML: unacceptable character"),
    ],
)
def test_text_that_is_no_yaml_is_told_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_recipe_is_a_mapping(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, "r", text)
    with pytest.raises(RecipeError, match=r"r\.yaml:1: a recipe is a mapping of keys to values"):
        load_recipe(path)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"r\.yaml: is UTF-16 or UTF-32 text; save it as UTF-8"):
        load_recipe(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match=r"no recipe 'quikstart'; did you mean 'quickstart'\?"):
        find_recipe("quikstart", [builtin_folder()])


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": 3}, "model.sise: unknown key 'sise'; did you mean 'size'? Known: size."),
        ({"size": "big"}, "model.size: input should be a valid integer"),
    ],
)
def test_a_plugins_keys_are_checked_by_the_plugin(options: dict[str, Any], message: str) -> None:
    assert validate_options(Options, {"size": 3}, ("model",)) == Options(size=3)
    with pytest.raises(RecipeError) as refused:
        validate_options(Options, options, ("model",))
    assert str(refused.value).startswith(message)


# --- the tree section ---


def test_single_brings_the_keys_that_belong_to_it(tmp_path: Path) -> None:
    recipe = load(tmp_path, "", {"tree.splits": "single"})
    assert (recipe.tree.branches, recipe.tree.siblings, recipe.tree.sde) == (16, "independent", "splits")
    assert recipe.credit.advantage == "leaf"
    other = load(tmp_path, "", {"tree.splits": "single", "tree.branches": 4, "credit.advantage": "depth"})
    assert (other.tree.branches, other.tree.sde, other.credit.advantage) == (4, "splits", "depth")


@pytest.mark.parametrize(
    ("splits", "steps"), [("dense", (0, 3, 6, 9)), ("mixed", (0, 4, 8, 12)), ("sparse", (0, 5, 10, 15)), ("single", ())]
)
def test_presets_of_splits(splits: str, steps: tuple[int, ...]) -> None:
    assert TreeSection(splits=splits).split_steps == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "splits: dens",
            "8: tree.splits: 'dens' is no preset; write dense, mixed, sparse, single, window, adaptive, or a list",
        ),
        ("splits: [3, 0]", "8: tree.splits: split steps must rise"),
        ("splits: [0, 0]", "8: tree.splits: split steps must rise"),
        ("splits: [19]", "7: tree: split step 19 lies outside the grid: with 20 steps, steps 0 to 18 can split"),
        ("splits: [-1]", "7: tree: split step -1 lies outside the grid"),
        ("steps: 9", "7: tree: split step 9 lies outside the grid: with 9 steps, steps 0 to 7 can split"),
        ("branches: 1", "8: tree.branches: a split needs at least 2 children (it is 1)"),
        ("branches: [2, 2, 1, 2]", "8: tree.branches: a split needs at least 2 children"),
        ("branches: [2, 2]", "7: tree: 4 splits need as many branch factors, not 2"),
        ("{splits: single, branches: [4, 4]}", "7: tree: 0 splits need as many branch factors, not 2"),
        ("strength: 0", "8: tree.strength: input should be greater than 0"),
        ("steps: 1", "8: tree.steps: input should be greater than or equal to 2"),
    ],
)
def test_trees_that_cannot_be_grown(text: str, message: str, tmp_path: Path) -> None:
    assert f"mine.yaml:{message}" in refusal(tmp_path, f"tree:\n  {text}\n")


def test_a_number_of_children_for_each_split(tmp_path: Path) -> None:
    tree = load(tmp_path, "tree: {steps: 6, splits: [0, 4], branches: [3, 2]}\n").tree
    assert (tree.split_steps, tree.branches) == ((0, 4), (3, 2))


# --- what is shipped, and what is written ---


SHIPPED = sorted(path.stem for path in builtin_folder().glob("*.yaml"))


def test_recipes_are_shipped() -> None:
    assert {"quickstart", "quickstart_single", "flux_t2i_branchgrpo"} <= set(SHIPPED)
    assert recipe_names([builtin_folder()]).keys() == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_and_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, folders=[builtin_folder()])
    assert recipe.name == name
    assert recipe.description, "says what it does"
    prompts = recipe.data.prompts
    assert not isinstance(prompts, str) or prompts.startswith("hub:") or Path(prompts).is_file()
    assert rewritten(recipe, tmp_path) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_has_a_small_version(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, smoke=True, folders=[builtin_folder()])
    assert recipe.run.iterations <= 5
    assert isinstance(recipe.data.prompts, str)
    assert Path(recipe.data.prompts).is_file()
    assert re.search("bundled:|small:", recipe.model.options["path"])
    assert rewritten(recipe, tmp_path) == recipe


def rewritten(recipe: Recipe, folder: Path) -> Recipe:
    """What a run directory holds, read as a recipe."""
    RunDirectory(folder).write_recipe(recipe)
    return load_recipe(RunDirectory(folder).recipe_file)


# Any text that a file may hold, and those that look like something else.
texts = st.text(max_size=12) | st.sampled_from(["1e5", "1.5e3", "0e0", ".5e1", "12", "null", "yes", "2024-01-01", "~"])
names = st.text(min_size=1, max_size=8)
positive = st.floats(1e-12, 1e12)
rates = positive.map(lambda rate: min(rate, 10.0))
decays = st.floats(0, 1).map(lambda decay: min(decay, 0.999))
plain = st.none() | st.booleans() | st.integers() | positive | texts
own_keys = st.dictionaries(st.sampled_from(["path", "size", "1", "é"]), plain | st.lists(plain, max_size=2), max_size=2)
prompts = texts.map(lambda text: f"hub:{text}") | st.lists(texts, max_size=3)


def is_name(text: str) -> bool:
    """Whether a recipe may be named so."""
    try:
        return checked_name(text) == text
    except ValueError:
        return False


def entries(key: str, **more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda own, fixed: own | fixed, own_keys, st.fixed_dictionaries({key: names}, optional=more))


rewards = st.lists(entries("reward", weight=st.floats(-9, 9), label=st.none() | texts), min_size=1, max_size=3)
trees = st.one_of(
    st.fixed_dictionaries({"steps": st.integers(17, 40), "splits": st.sampled_from(["dense", "mixed", "sparse"])}),
    st.fixed_dictionaries(
        {
            "steps": st.integers(6, 9),
            "splits": st.just([0, 4]),
            "branches": st.lists(st.integers(2, 9), min_size=2, max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {
            "splits": st.just("single"),
            "branches": st.integers(2, 20),
            "draw": st.fixed_dictionaries({"first": st.floats(0, 0.4), "last": st.floats(0.5, 0.9)}),
            "sde": st.sampled_from(["all", "splits", "window"]),
            "window": st.fixed_dictionaries({"stop": st.none() | st.integers(0, 9)}),
        }
    ),
)
recipes = st.fixed_dictionaries(
    {
        "name": texts.filter(is_name),
        "description": texts,
        "model": entries("adapter"),
        "rewards": rewards,
        "data": st.fixed_dictionaries({"prompts": prompts}, optional={"column": texts, "shuffle": st.booleans()}),
        "tree": trees,
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "lora": st.none() | st.fixed_dictionaries({"rank": st.integers(1, 99), "targets": st.none() | st.lists(texts)}),
        "optim": st.fixed_dictionaries({"lr": rates, "betas": st.tuples(decays, decays)}),
        "evaluation": st.none() | st.fixed_dictionaries({"prompts": prompts, "rewards": rewards}),
        "callbacks": st.lists(entries("callback"), max_size=2),
        "run": st.fixed_dictionaries({"trackers": st.lists(texts, max_size=2), "precision": st.just("bf16")}),
    },
)


@thorough
@given(data=recipes)
def test_any_recipe_written_as_yaml_is_read_back_the_same(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = Recipe.model_validate(data)
    path = write(tmp_path_factory.getbasetemp(), "any", write_yaml(recipe.model_dump(mode="json")))
    assert load_recipe(path, folders=[]) == recipe


@thorough
@given(text=texts)
def test_any_text_is_read_back_as_that_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), "any", write_yaml({"a": text, "b": [text], "c": {"d": text}}))
    assert read_yaml(path).data == {"a": text, "b": [text], "c": {"d": text}}


def test_a_run_directory_keeps_a_prompt_that_looks_like_a_number(tmp_path: Path) -> None:
    recipe = load(tmp_path, "", {"data.prompts": ["1e5"]})
    assert rewritten(recipe, tmp_path / "run") == recipe


def test_a_written_recipe_is_plain_yaml() -> None:
    data = {"lr": 1e-5, "n": 3, "none": None, "text": "a: b", "list": [1.5, True]}
    assert yaml.safe_load(write_yaml(data)) == data
    assert math.isinf(parse_value(".inf"))
