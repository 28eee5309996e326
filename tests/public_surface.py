"""Which uses of the library in somebody else's code go beyond what ``docs/api.md`` documents."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import branchtree

LIBRARY = Path(branchtree.__file__).parent
API = LIBRARY.parent / "docs" / "api.md"
FRONT = ("branchtree", "branchtree.plugins", "branchtree.testing")  # whose ``__all__`` says what is public
PRIVATE = re.compile(r"_[a-z]\w*")


def undocumented_uses(folder: Path) -> list[str]:
    """Return ``file:line: what`` for each use of the library under ``folder`` that its reference does not document."""
    return [
        f"{path.relative_to(folder)}:{line}: {what}"
        for path in sorted(folder.rglob("*.py"))
        for line, what in uses_beyond_the_reference(path.read_text(encoding="utf-8"))
    ]


def uses_beyond_the_reference(code: str) -> list[tuple[int, str]]:
    """Return line and name of each import that is not documented, and of each private name of somebody else's."""
    return [(node.lineno, what) for node in ast.walk(ast.parse(code)) for what in _beyond(node)]


def _beyond(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if module.split(".")[0] == "branchtree":
            yield from (f"{module}.{each.name}" for each in node.names if each.name not in documented_names(module))
        yield from (each.name for each in node.names if PRIVATE.fullmatch(each.name))
    elif isinstance(node, ast.Import):  # from such a name any other can be reached
        yield from (each.name for each in node.names if each.name.split(".")[0] == "branchtree")
    elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
        own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
        if not own or node.attr in private_members():
            yield f".{node.attr}"
    elif isinstance(node, ast.FunctionDef):
        if node.name in private_members():
            yield f"def {node.name}"
    elif isinstance(node, ast.Call):  # of getattr, import_module and the like
        words = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        yield from (repr(word) for word in words if re.fullmatch(r"branchtree(\.\w+)*|_[a-z]\w*", word))


@cache
def documented_names(module: str) -> frozenset[str]:
    """Return the public names of a module that the reference documents, none of another."""
    if module in FRONT:
        return frozenset(importlib.import_module(module).__all__)
    if not re.search(rf"^::: {re.escape(module)}$", API.read_text(encoding="utf-8"), re.MULTILINE):
        return frozenset()
    body = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")).body
    names = {each.name for each in body if isinstance(each, ast.ClassDef | ast.FunctionDef)}
    names |= {target.id for each in body if isinstance(each, ast.Assign) for target in each.targets}
    return frozenset(name for name in names if not name.startswith("_"))


@cache
def private_members() -> frozenset[str]:
    """Return the private members of what others may derive from, which they must neither read nor replace."""
    files = [*(LIBRARY / "plugins").glob("*.py"), *(LIBRARY / "testing").glob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = (getattr(node, "name", None) or getattr(node, "attr", None) for node in nodes)
    return frozenset(name for name in names if name and PRIVATE.fullmatch(name))
