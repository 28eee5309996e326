"""Who may import whom, what a quick command loads, and what no module may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
from guests import run_code, run_command
from typer.testing import CliRunner

import branchtree
from branchtree.cli.app import app
from branchtree.errors import BranchTreeError
from branchtree.plugins.registry import registry

ROOT = Path(__file__).parents[1]
PACKAGES = ("branchtree", "adapters/branchtree_adapters", "rewards/branchtree_rewards")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("branchtree", include_external_packages=True, cache_dir=None)


def test_the_contracts_between_packages_hold() -> None:
    # In a process of its own: import-linter configures logging, which would silence our loggers in later tests.
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_method_imports_torch_and_nothing_else(graph: grimp.ImportGraph) -> None:
    core = {name for name in graph.modules if name.startswith("branchtree.core")}
    imported = {name for module in core for name in graph.find_modules_directly_imported_by(module)}
    assert imported - core - sys.stdlib_module_names <= {"torch", "branchtree.errors"}


LAYERS = {
    "core": set(),
    "files": set(),
    "plugins": {"core", "files"},
    "recipe": {"core", "files", "plugins"},
    "data": {"core", "files", "plugins", "recipe"},
    "planning": {"core", "data", "files", "plugins", "recipe"},
    "pictures": {"core", "files", "plugins"},
    "run": {"files", "plugins", "recipe"},
    "training": {"core", "data", "files", "pictures", "planning", "plugins", "recipe", "run"},
    "report": {"files", "recipe", "run"},
    "serving": {"core", "files", "plugins"},
    "exporting": {"files", "plugins", "recipe", "report", "run"},
    "migration": {"files", "recipe"},
}
"""What each package may import beside itself; studies, the command line and the conformance tests may import all."""


@pytest.mark.parametrize("package", LAYERS)
def test_packages_look_downwards(package: str, graph: grimp.ImportGraph) -> None:
    modules = [name for name in graph.modules if name.startswith(f"branchtree.{package}")]
    imported = {name for module in modules for name in graph.find_modules_directly_imported_by(module)}
    others = {name.split(".")[1] for name in imported if name.startswith("branchtree.")} - {package, "errors"}
    assert others <= LAYERS[package]


def module_name(path: Path) -> str:
    package = next(each for each in PACKAGES if (ROOT / each) in path.parents)
    dotted = ".".join(path.relative_to((ROOT / package).parent).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported_modules(tree: ast.Module) -> set[str]:
    """The library's modules that a module imports anywhere: at its top, in functions, or for types alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else node.module for name in named}
    return found & TREES.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count too."""
    left = {name: imported_modules(tree) - {name} for name, tree in TREES.items()}
    while leaves := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}, "these modules import each other, or lead to some that do"


def test_a_public_name_is_defined_once() -> None:
    """Functions and classes. Hooks bear the names of their specifications, and commands those of what they call."""
    owners: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        if module.startswith("branchtree.cli."):
            continue
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(("_", "register_"))
            if public:
                owners.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


def test_importing_the_library_loads_no_heavy_one() -> None:
    done = run_code(
        """
        import sys
        import branchtree, branchtree.cli
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
        """,
        fresh=True,
    )
    assert done.code == 0, done.err
    loaded = done.out.split()
    assert "branchtree" in loaded
    assert not {"torch", "diffusers", "transformers", "accelerate", "matplotlib", "branchtree_adapters"} & set(loaded)


def test_training_code_and_plugins_load_no_model_library() -> None:
    done = run_code(
        """
        import sys
        import branchtree.training.trainer, branchtree.planning.plan, branchtree.report
        from branchtree.plugins.registry import registry
        assert not registry().broken, registry().broken
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
        """,
        fresh=True,
    )
    assert done.code == 0, done.err
    assert "branchtree_adapters" in done.out.split()
    assert not {"diffusers", "transformers"} & set(done.out.split())


def test_help_answers_at_once() -> None:
    done = run_code(
        """
        import sys
        from branchtree.cli import main
        sys.argv = ["branchtree", "--help"]
        try:
            main()
        finally:
            print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
        """,
        fresh=True,
    )
    assert done.code == 0
    for name in ("train", "plan", "recipes", "plugins", "report"):
        assert f" {name} " in done.out
    assert not {"torch", "numpy", "diffusers", "transformers"} & set(done.err.split())


def test_the_module_can_be_run() -> None:
    done = run_command("--help", fresh=True)
    assert done.code == 0
    assert "tree-structured" in done.out


@pytest.mark.parametrize("words", ["compare a", "diversity a", "evaluate a", "plan a", "score a.png -r b", "train a"])
def test_a_command_calls_the_function_of_its_name(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *given = words.split()
    calls: list[Any] = []

    def called(*arguments: Any, **options: Any) -> None:
        calls.append(arguments[0])
        raise BranchTreeError

    monkeypatch.setattr(f"branchtree.api.{name}", called)
    result = CliRunner().invoke(app, [name, *given])
    assert isinstance(result.exception, BranchTreeError)
    assert calls in (["a"], [["a"]], [["a.png"]])


def test_public_names_exist() -> None:
    for name in branchtree.__all__:
        assert getattr(branchtree, name) is not None


def test_the_librarys_own_plugins_come_through_the_front_door() -> None:
    found = registry()
    assert not found.broken
    for name, entry, package in (
        ("flux", found.model("flux"), "branchtree_adapters"),
        ("digits", found.reward("digits"), "branchtree_rewards"),
    ):
        assert (entry.name, entry.distribution) == (name, "branchtree-grpo")
        assert entry.build.__module__.startswith(package)
        assert entry.summary


# --- nothing unsafe is loaded ---


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call and the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_loads_what_could_run_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"pickle", "dill", "joblib", "shelve"}
    for name, call in calls(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"}
        assert options.get("trust_remote_code", "False") == "False"
        assert options.get("shell", "False") == "False"
        if name == "torch.load":
            assert options["weights_only"] == "True"
        if name in {"yaml.load", "yaml.compose"}:
            assert ast.unparse(call.args[1]) == "_Loader"
