"""Write the sections of the documentation that follow from the code.

A page marks such a section with two comments, <!-- generated: NAME --> and <!-- end of NAME -->; what is between them
is replaced. With --check nothing is written, and a page that is out of date is an error.

    python scripts/build_reference.py
    python scripts/build_reference.py --check
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import typer
import yaml
from _recipe_keys import option_table, recipe_tables
from build_models import SECTIONS

from branchtree import load_recipe
from branchtree.cli.app import app
from branchtree.core.cost import Cost, count
from branchtree.core.schedule import PRESET_SPLITS, FixedSplits, Schedule, TreePlan
from branchtree.planning.plan import draw_tree
from branchtree.plugins.registry import registry
from branchtree.recipe import Recipe
from branchtree.recipe.build import make_credit_rule, make_schedule
from branchtree.recipe.load import builtin_folder, method_names

ROOT = Path(__file__).parents[1]
GUEST = ROOT / "tests" / "guest_plugin"
ACTIONS = ROOT / "examples" / "actions"
DISTRIBUTION = "branchtree-grpo"
REGION = re.compile(
    r"(?P<open><!-- generated: (?P<name>[\w./-]+) -->\n).*?(?P<close><!-- end of (?P=name) -->)", re.DOTALL
)
DRAWN: Mapping[str, Mapping[str, object]] = {
    "tree/dense": {},
    "tree/single": {"splits": "single", "branches": 16, "siblings": "independent", "sde": "splits"},
    "tree/mix": {"sde": "window"},
}


def regions() -> Mapping[str, Callable[[], str]]:
    """Every generated section by name."""
    files = [
        "pyproject.toml",
        *(f"branchtree_guest/{name}" for name in ("__init__.py", "reward.py", "model.py", "sd3.py")),
    ]
    files += ["branchtree_guest/watch.py", "branchtree_guest/recipes/guest.yaml", "tests/test_model.py"]
    files += ["tests/test_reward.py"]
    actions = [f"branchtree_actions/{name}.py" for name in ("samples", "policy", "rewards", "plugin")]
    actions += ["pyproject.toml", "branchtree_actions/recipes/unicycle.yaml", "tests/test_policies.py"]
    return {
        "recipe-keys": lambda: recipe_tables(Recipe),
        "plug-in-options": plugin_options,
        "recipe-list": recipe_list,
        "method-list": method_list,
        "commands": commands,
        "counts": counts,
        **SECTIONS,
        **{name: partial(drawing, tree) for name, tree in DRAWN.items()},
        **{f"guest/{name}": partial(source, GUEST / name) for name in files},
        **{f"actions/{name}": partial(source, ACTIONS / name) for name in actions},
    }


def filled(text: str) -> str:
    """A page with its generated sections as they should be."""
    known = regions()

    def fill(match: re.Match[str]) -> str:
        if match["name"] not in known:
            raise SystemExit(f"unknown section '{match['name']}'; known: {', '.join(known)}")
        return f"{match['open']}\n{known[match['name']]()}\n\n{match['close']}"

    return REGION.sub(fill, text)


def block(language: str, text: str) -> str:
    """A fenced block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def source(path: Path) -> str:
    """A file of an example plug-in."""
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml"}[path.suffix]
    return block(language, path.read_text(encoding="utf-8"))


def small_recipe(tree: Mapping[str, object]) -> Recipe:
    """The quickstart with another tree."""
    return load_recipe("quickstart", {f"tree.{key}": value for key, value in tree.items()})


def plan(tree: Mapping[str, object]) -> TreePlan:
    """The first prompt's tree."""
    return make_schedule(small_recipe(tree)).plan(0, 0)


def drawing(tree: Mapping[str, object]) -> str:
    """The first prompt's tree as `branchtree plan` draws it."""
    return block("text", draw_tree(plan(tree)))


def counts() -> str:
    """What each preset costs for one prompt."""
    recipe = small_recipe({})
    schedules = {name.capitalize(): Schedule(20, FixedSplits(steps, (2,) * 4)) for name, steps in PRESET_SPLITS.items()}
    schedules["Dense, Mix"] = make_schedule(small_recipe(DRAWN["tree/mix"]))
    schedules["`single`, split at step 10"] = Schedule(20, FixedSplits((10,), (16,)), "splits")
    schedules["16 trajectories from one noise"] = Schedule(20, FixedSplits((0,), (16,)))
    rule = make_credit_rule(recipe)
    lines = [
        "| tree | nodes | edges | leaves | rollout rows | gradient rows | trained edges | nodes / leaves |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, schedule in schedules.items():
        cost: Cost = count([schedule.plan(0, 0)], rule, 0)
        figures = (cost.nodes, cost.edges, cost.leaves, cost.rollout_rows, cost.gradient_rows, cost.trained_edges)
        lines.append(f"| {name} | {' | '.join(map(str, figures))} | {cost.nodes_per_leaf:.2f} |")
    return "\n".join(lines)


def recipe_list() -> str:
    """The library's own recipes."""
    lines = ["| recipe | extends | what it does |", "| --- | --- | --- |"]
    for path in sorted(builtin_folder().glob("*.yaml")):
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
        bases = text.get("extends", [])
        named = ", ".join(f"`{base}`" for base in ([bases] if isinstance(bases, str) else bases))
        lines.append(f"| `{path.stem}` | {named} | {text.get('description', '')} |")
    return "\n".join(lines)


def method_list() -> str:
    """The methods that any recipe can be put under, and what the quickstart then costs a prompt."""
    lines = ["| method | what it is | rollout rows | gradient rows |", "| --- | --- | --- | --- |"]
    for name, path in method_names([builtin_folder()]).items():
        recipe = load_recipe(f"quickstart+{name}")
        cost = count([make_schedule(recipe).plan(0, 0)], make_credit_rule(recipe), 0)
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
        lines.append(f"| `{name}` | {text['description']} | {cost.rollout_rows} | {cost.gradient_rows} |")
    return "\n".join(lines)


def plugin_options() -> str:
    """The keys of the library's own models, rewards and callbacks."""
    found = registry()
    sections = []
    for kind, entries in (("model", found.models), ("reward", found.rewards), ("callback", found.callbacks)):
        for name, entry in sorted(entries.items()):
            if entry.distribution == DISTRIBUTION:
                sections.append(f"### {kind} `{name}`\n\n{entry.summary.rstrip('.')}.\n\n{option_table(entry.config)}")
    return "\n\n".join(sections)


def commands() -> str:
    """The command line."""
    lines = ["| command | what it does |", "| --- | --- |"]
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        words = [_usage(parameter) for parameter in command.params]
        lines.append(f"| `{' '.join(['branchtree', name, *words])}` | {command.help} |")
    return "\n".join(lines)


def _usage(parameter: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    if isinstance(parameter, typer.core.TyperArgument):
        return str(parameter.metavar or str(parameter.name).upper())
    flags = "/".join([*parameter.opts, *parameter.secondary_opts])
    return f"[{flags}]" if parameter.is_flag else f"[{flags} {str(parameter.name).upper()}]"


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(filled(text), encoding="utf-8")
    for page in stale:
        print(f"{page}: {'is out of date; run python scripts/build_reference.py' if check else 'written'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
