"""The documentation against the code: nothing missing, nothing out of date, no link or name that leads nowhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

import branchtree
from branchtree.cli.app import app
from branchtree.cli.arguments import parse_overrides
from branchtree.core.cost import count
from branchtree.core.credit import CreditRule, assign_credit
from branchtree.core.families import collect_families
from branchtree.core.gate import GateRule
from branchtree.core.schedule import FixedSplits, Schedule
from branchtree.core.scores import Scores
from branchtree.core.tree import grow
from branchtree.errors import RecipeError
from branchtree.plugins import hookspecs
from branchtree.recipe import Recipe, load_recipe, recipe_names
from branchtree.recipe.build import make_credit_rule, make_schedule
from branchtree.recipe.load import builtin_folder, method_names
from branchtree.training.gating import KlGate
from branchtree.training.metrics import ShareRecord, iteration_metrics, learned_splits
from branchtree.training.objective import UpdateRecord

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ["adapters/README.md", "rewards/README.md", "recipes/README.md", "examples/actions/README.md"]
FOLDERS += ["examples/tokens/README.md"]
PAGES = [*DOCS, *(ROOT / name for name in (*FOLDERS, "CONTRIBUTING.md", "CHANGELOG.md", "README.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
EVERYTHING = "\n".join(TEXT[page] for page in DOCS)
PROSE = sorted({*PAGES, ROOT / "tests" / "pretend_gpu" / "README.md"})
COMMANDS = typer.main.get_command(app).commands
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script that writes the generated sections."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield importlib.import_module("build_reference")
    for name in ("build_reference", "build_models", "_recipe_keys"):
        sys.modules.pop(name, None)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)


def quoted(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# Generated sections


def test_generated_sections_are_up_to_date(reference: ModuleType) -> None:
    stale = [page.name for page in DOCS if reference.filled(TEXT[page]) != TEXT[page]]
    assert not stale, "run: python scripts/build_reference.py"


def test_every_generated_section_is_on_a_page(reference: ModuleType) -> None:
    assert set(reference.regions()) == {match["name"] for match in reference.REGION.finditer(EVERYTHING)}


def test_an_edited_section_is_corrected(reference: ModuleType) -> None:
    page = ROOT / "docs" / "concepts.md"
    edited = TEXT[page].replace("| Dense | 219 |", "| Dense | 220 |")
    assert edited != TEXT[page]
    assert reference.filled(edited) == TEXT[page]
    with pytest.raises(SystemExit, match="unknown section 'nothing'"):
        reference.filled("<!-- generated: nothing -->\n<!-- end of nothing -->")


# The form of the pages


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_end_by_column_120(page: Path) -> None:
    """Tables and code may be longer, and so may a line that is one link."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not re.match(r"\|| *\S+$", line)]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_wrapped_line_turns_into_a_list(page: Path) -> None:
    """Markdown makes a list item of a line that begins with a dash or a number with a full stop."""
    text = re.sub(r"^ *```.*?^ *```", "```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    item = r" *(?:[-*+]|\d+[.)]) "
    pairs = zip(text.splitlines(), text.splitlines()[1:], strict=False)
    wrapped = [line for before, line in pairs if re.match(item, line) and re.match(rf"(?!{item})\S", before)]
    assert wrapped == []


def test_the_error_on_the_page_of_recipes_is_the_one_that_is_raised() -> None:
    (shown,) = [line for block in blocks(ROOT / "docs" / "recipes.md", "text") for line in block.splitlines()]
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", {"optim.rl": 1e-4})
    assert shown == f"error: {caught.value}"


# Everything is mentioned


def test_every_recipe_key_is_described(reference: ModuleType) -> None:
    text = TEXT[ROOT / "docs" / "recipes.md"]
    keys = importlib.import_module("_recipe_keys").recipe_keys(Recipe)
    assert "optim.lr" in keys
    assert [key for key in keys if f"| `{key}` |" not in text] == []


def test_every_recipe_is_listed() -> None:
    text = TEXT[ROOT / "docs" / "recipes.md"]
    named = [*recipe_names([builtin_folder()]), *method_names([builtin_folder()])]
    assert [name for name in named if f"| `{name}` |" not in text] == []


def test_every_hook_is_described() -> None:
    hooks = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("register_")]
    assert len(hooks) == 15
    assert [hook for hook in hooks if f"`{hook}(register)`" not in TEXT[ROOT / "docs" / "extending.md"]] == []


@pytest.mark.parametrize("name", branchtree.__all__)
def test_every_public_name_is_in_the_api(name: str) -> None:
    assert re.search(rf"\b{name}\b", TEXT[ROOT / "docs" / "api.md"])


def test_every_class_that_the_api_returns_is_under_results() -> None:
    results = TEXT[ROOT / "docs" / "api.md"].partition("### Results")[2].partition("### Errors")[0]
    listed = re.findall(r"^::: ([\w.]+)\.(\w+)$", results, re.MULTILINE)
    functions = (function for name in branchtree.__all__ if inspect.isfunction(function := getattr(branchtree, name)))
    returned = {name for one in functions for name in re.findall(r"\w+", str(inspect.signature(one).return_annotation))}
    assert returned - {"list", "Path", "Recipe", "None"} <= {name for _, name in listed}
    assert all(inspect.isclass(getattr(importlib.import_module(module), name)) for module, name in listed)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_in_the_api(name: str) -> None:
    assert f"`branchtree {name}" in TEXT[ROOT / "docs" / "api.md"]


def written_metrics() -> set[str]:
    """The names of what a small iteration logs, as the page writes them."""
    plans = [Schedule(4, FixedSplits((0, 1), (2, 2))).plan(0, 0)] * 2
    topology, values = grow(plans), torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.4, 0.7, 0.8])
    scores = {"LABEL": Scores(values, torch.ones(8, dtype=torch.bool), raw=values, details={"DETAIL": values})}
    flat = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    credit = assign_credit(topology, flat, scores, {"LABEL": 1.0}, CreditRule(), 0, 1)
    edges = collect_families(topology, credit.advantages, credit.keep)
    one = [torch.ones(edges.edges)]
    update = UpdateRecord(
        loss=one,
        kl=one,
        deviation=one,
        first_deviation=one,
        clipped=one,
        mismatch=one,
        error=one,
        preference=one,
        depth=[edges.edge_depth],
    )
    names = iteration_metrics(
        ShareRecord(tuple(plans), scores, credit, topology.rollout_rows, update, probes=1, probe_rows=1), 1
    )
    shown = {re.sub(r"split_\d+$", "split_J", re.sub(r"depth_\d+$", "depth_NN", name)) for name in names}
    checked = {"continuation/gap/LABEL", "continuation/correlation/LABEL", "rows/continuation_check"}
    gate = KlGate(GateRule(), {})
    gate.take_up({"share": 0.1, "seen": [0.2]})
    gated = gate.figures((torch.ones(1),)).keys()
    return shown | checked | gated | learned_splits(plans, 1.0).keys() | {"iteration", "lr"}


def test_the_metrics_page_names_what_is_logged_and_nothing_else() -> None:
    section = TEXT[ROOT / "docs" / "metrics.md"].split("## metrics.jsonl")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == written_metrics()


def test_the_metrics_page_names_every_phase_and_file() -> None:
    text = TEXT[ROOT / "docs" / "metrics.md"]
    folders = [ROOT / "branchtree" / name for name in ("training", "run", "pictures")]
    source = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py"))
    phases = set(re.findall(r'watch\.phase\("(\w+)"\)', source))
    assert len(phases) > 4
    assert [name for name in sorted(phases | {"other", "total"}) if f"| `{name}` |" not in text] == []
    files = set(re.findall(r'"(\w+\.(?:jsonl|json|yaml|pt|safetensors))"', source))
    assert "summary.json" in files
    assert [name for name in sorted(files) if f"`{name}`" not in text] == []


def test_the_tutorial_states_the_counts_of_the_quickstart() -> None:
    recipe = load_recipe("quickstart")
    plans = [make_schedule(recipe).plan(0, prompt) for prompt in range(recipe.batch.prompts)]
    cost = count(plans, make_credit_rule(recipe), 0)
    stated = f"these are {cost.rollout_rows} rows for the rollout and {cost.gradient_rows} for the gradient pass"
    assert stated in " ".join(TEXT[ROOT / "docs" / "tutorial.md"].split())


# Nothing leads nowhere


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@each_page
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@each_page
def test_named_files_exist(page: Path) -> None:
    folders = "branchtree|adapters|rewards|recipes|tests|scripts|docs|benchmarks|examples"
    for code in quoted(page):
        if re.fullmatch(rf"(?:{folders})/[\w./-]*", code):
            assert (ROOT / code).exists(), code


@each_page
def test_dotted_names_can_be_imported(page: Path) -> None:
    for code in quoted(page):
        if re.fullmatch(r"branchtree(\.\w+)+", code):
            assert resolves(code), code


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute or field of something in one."""
    names = dotted.split(".")
    for cut in range(len(names), 0, -1):
        try:
            found: object = importlib.import_module(".".join(names[:cut]))
        except ModuleNotFoundError:
            continue
        for name in names[cut:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def test_the_navigation_has_every_page() -> None:
    _, _, navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    named = re.findall(r"[\w/]+\.md", navigation)
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)


def test_make_targets_exist() -> None:
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z]+)`", TEXT[page])}
    assert "quickstart" in named
    assert named <= set(known)


@each_page
def test_no_page_speaks_of_one_machine_or_of_the_other_project(page: Path) -> None:
    found = re.findall(
        r"(?:^|[\s`\"'(=])((?:/(?:home|root|tmp|work|opt|mnt|Users|data)/|[A-Z]:\\).*)", TEXT[page], re.MULTILINE
    )
    assert found == []
    assert not re.search(r"pip install (?:\S+ )*['\"]?branchtree(?!-grpo)\b", TEXT[page])


# Code in the pages


@each_page
def test_python_blocks_compile(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("name", ["adapters", "rewards"])
def test_hooks_in_the_readmes_register(name: str) -> None:
    (code,) = blocks(ROOT / name / "README.md", "python")
    kind = {"adapters": "Model", "rewards": "Reward"}[name]
    registered = []
    space = {f"My{kind}": object, f"My{kind}Config": object}
    exec(code, space)
    space[f"register_{kind.lower()}s"](lambda *names, **options: registered.append((*names, *options)))  # type: ignore[operator]
    assert registered == [(f"my_{kind.lower()}", "build", "config", "summary")]


@each_page
def test_yaml_blocks_are_recipes(page: Path, tmp_path: Path) -> None:
    for index, text in enumerate(blocks(page, "yaml")):
        if "guest_" in text or "adapter: actions" in text or "extends: unicycle" in text:
            continue  # needs an example plug-in, and is tested with it
        whole = text if re.search(r"^(extends|model):", text, re.MULTILINE) else f"extends: quickstart\n{text}"
        file = tmp_path / f"block_{index}.yaml"
        file.write_text(whole, encoding="utf-8")
        load_recipe(file)


@each_page
def test_commands_are_as_shown(page: Path) -> None:
    for line in "".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line)
        if "branchtree" not in words or words[0] == "pip":
            continue
        name, *arguments = words[words.index("branchtree") + 1 :]
        # Click knows the options; parsing runs nothing.
        given = COMMANDS[name].make_context(name, list(arguments)).params
        if given.get("recipe") in recipe_names([builtin_folder()]):
            load_recipe(given["recipe"], parse_overrides(given["overrides"] or []), smoke=given.get("smoke", False))


def test_a_command_that_does_not_parse_would_be_seen() -> None:
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["train"].make_context("train", ["quickstart", "--ouput", "x"])


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    known = messages()
    text = TEXT[ROOT / "docs" / "troubleshooting.md"]
    shown = re.findall(r"^\| `([^|]+)` \|", text, re.MULTILINE)
    assert len(shown) > 30
    for message in shown:
        if message.startswith("input should be"):
            continue  # pydantic's words
        pieces = [piece.strip(" ;:?.") for piece in re.split(r"\.\.\.|'[^']*'|\b\d+\b|\bN\b", message)]
        longest = max(pieces, key=len)
        assert any(longest in sentence for sentence in known), message


def messages() -> list[str]:
    """Every text in the code, with a gap where a value is filled in."""
    found = []
    for folder in ("branchtree", "adapters", "rewards"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    pieces = [piece.value if isinstance(piece, ast.Constant) else "\0" for piece in node.values]
                    found.append("".join(map(str, pieces)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found
