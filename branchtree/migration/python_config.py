"""Configurations that are Python: a function's assignments to an ``ml_collections`` configuration, read from its text.

Nothing is run. What is understood are assignments, own functions and those of a file beside it, arithmetic, and paths
that are put together; the value of anything else is ``Unread``.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchtree.errors import RecipeError, nearest
from branchtree.files.reading import read_text

DEEPEST = 20
"""Functions that may call each other."""
LARGEST_POWER = 64
NUMERIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARED: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
BUILT_IN: Mapping[str, Callable[..., Any]] = {"int": int, "float": float, "round": round, "max": max, "min": min}


@dataclass(frozen=True)
class Unread:
    """A value that is not understood, as it is written."""

    text: str

    def __repr__(self) -> str:
        return self.text


class ConfigSection(dict[str, Any]):
    """An ``ml_collections.ConfigDict``."""


@dataclass(frozen=True)
class PythonConfig:
    """What a function returns, flat, by dotted key."""

    values: Mapping[str, Any]
    own: frozenset[str]  # keys that the file itself sets, not one beside it
    variables: Mapping[str, Any]  # the function's own


def read_python_config(path: Path, name: str | None) -> PythonConfig:
    """Read the configuration that a function of a file returns. Raises RecipeError for a name that is not there."""
    module = _Module(path)
    if name is None or name not in module.functions:
        known = [each for each in module.functions if each != "get_config"]
        asked = f"has no function '{name}'" if name else "has several configurations; choose one with --config NAME"
        raise RecipeError(f"{path}: {asked}{nearest(name or '', known)}")
    variables: dict[str, Any] = {}
    found = module.call(name, 0, variables)
    if not isinstance(found, ConfigSection):
        raise RecipeError(f"{path}:{module.functions[name].lineno}: {name} returns no configuration that can be read")
    return PythonConfig(dict(_flat(found)), frozenset(module.assigned), variables)


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, ConfigSection) else [(name, value)]
    return found


@dataclass
class _Module:
    """A file of such functions."""

    path: Path
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    others: dict[str, _Module] = field(default_factory=dict)  # files beside it, by their name in this one
    assigned: set[str] = field(default_factory=set)  # dotted keys that this file sets

    def __post_init__(self) -> None:
        text = read_text(self.path, RecipeError)
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise RecipeError(f"{self.path}: is no Python that can be read: {error}") from None
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            for alias, file in _files_beside(node):
                if (self.path.parent / file).is_file():
                    self.others[alias] = _Module(self.path.parent / file)

    def call(self, name: str, depth: int, variables: dict[str, Any]) -> Any:
        """Return what a function without arguments returns; its variables are left in ``variables``."""
        if depth > DEEPEST:
            raise RecipeError(f"{self.path}: {name} calls itself, or more functions than can be read")
        return _Body(self, depth, variables).run(self.functions[name].body)


def _files_beside(node: ast.stmt) -> list[tuple[str, str]]:
    """Return the name that a statement gives to a Python file in the same folder, and that file's name."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
        texts = [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
        return [(node.targets[0].id, text) for text in texts if isinstance(text, str) and text.endswith(".py")][:1]
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name, f"{alias.name.rpartition('.')[2]}.py") for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(alias.asname or alias.name, f"{alias.name}.py") for alias in node.names]
    return []


@dataclass
class _Body:
    """The statements of a function."""

    module: _Module
    depth: int
    variables: dict[str, Any]

    def run(self, statements: list[ast.stmt]) -> Any:
        for node in statements:
            if isinstance(node, ast.Return):
                return None if node.value is None else self.value(node.value)
            if isinstance(node, ast.Assign):
                value = self.value(node.value)
                for target in node.targets:
                    self.assign(target, value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self.assign(node.target, self.value(node.value))
            elif isinstance(node, ast.If):
                test = self.value(node.test)
                if isinstance(test, Unread):
                    raise RecipeError(f"{self.module.path}:{node.lineno}: whether '{test.text}' holds cannot be read")
                returned = self.run(node.body if test else node.orelse)
                if returned is not None:
                    return returned
            elif not isinstance(node, ast.Expr | ast.Assert | ast.Import | ast.ImportFrom | ast.Pass):
                kind = type(node).__name__.lower()
                raise RecipeError(f"{self.module.path}:{node.lineno}: a statement '{kind}' is not read; write it out")
        return None

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
            return
        section = self.value(target.value) if isinstance(target, ast.Attribute) else None
        if isinstance(target, ast.Attribute) and isinstance(section, ConfigSection):
            section[target.attr] = value
            self.module.assigned.add(ast.unparse(target).partition(".")[2])

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression, or what it says where that is not understood."""
        try:
            found = self._known(node)
        except (ArithmeticError, TypeError, ValueError, KeyError):
            return Unread(ast.unparse(node))
        return Unread(ast.unparse(node)) if isinstance(found, Unread) else found

    def _known(self, node: ast.expr) -> Any:
        readers: Mapping[type[ast.expr], Callable[[Any], Any]] = {
            ast.Constant: lambda node: node.value,
            ast.Name: lambda node: self.variables[node.id],
            ast.Attribute: lambda node: self._section(node.value)[node.attr],
            ast.List: self._listed,
            ast.Tuple: self._listed,
            ast.Dict: lambda node: dict(zip(map(self._clear, node.keys), map(self.value, node.values), strict=True)),
            ast.JoinedStr: lambda node: "".join(str(self.value(each)) for each in node.values),
            ast.FormattedValue: lambda node: self.value(node.value),
            ast.UnaryOp: self._signed,
            ast.BinOp: self._computed,
            ast.Compare: self._compared,
            ast.IfExp: lambda node: self.value(node.body if self._clear(node.test) else node.orelse),
            ast.Call: self._called,
        }
        return readers[type(node)](node)

    def _section(self, node: ast.expr) -> ConfigSection:
        found = self.value(node)
        if not isinstance(found, ConfigSection):
            raise TypeError
        return found

    def _listed(self, node: ast.List | ast.Tuple) -> list[Any]:
        return [self.value(each) for each in node.elts]

    def _signed(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return not self._clear(node.operand)
        if not isinstance(node.op, ast.USub):
            raise TypeError
        return -self._number(node.operand)

    def _compared(self, node: ast.Compare) -> bool:
        (operation,), (right,) = node.ops, node.comparators
        return COMPARED[type(operation)](self._clear(node.left), self._clear(right))

    def _clear(self, node: ast.expr) -> Any:
        found = self.value(node)
        if isinstance(found, Unread):
            raise ValueError(found.text)
        return found

    def _number(self, node: ast.expr) -> Any:
        found = self._clear(node)
        if not isinstance(found, int | float):
            raise TypeError
        return found

    def _computed(self, node: ast.BinOp) -> Any:
        if isinstance(node.op, ast.Add) and isinstance(self.value(node.left), str):
            return str(self.value(node.left)) + str(self._clear(node.right))
        left, right = self._number(node.left), self._number(node.right)
        if isinstance(node.op, ast.Pow):
            if abs(right) > LARGEST_POWER:
                raise ValueError
            return float(left) ** right
        return NUMERIC[type(node.op)](left, right)

    def _called(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        arguments = [self._clear(each) for each in node.args]
        if node.keywords:
            raise TypeError
        if not arguments:
            return self._made(name)
        if name == "os.path.join":
            return str(Path(*map(str, arguments)))
        if name.endswith("ConfigDict") and isinstance(arguments[0], dict):
            return ConfigSection(arguments[0])
        return BUILT_IN[name](*arguments)

    def _made(self, name: str) -> Any:
        """Return what a call without arguments makes: an own function's, that of a file beside it, or a section."""
        module, _, function = name.rpartition(".")
        if function == "ConfigDict":
            return ConfigSection()
        if name == "os.getcwd":
            return str(self.module.path.absolute().parent.parent)  # it is run in the folder above config/
        owner = self.module.others[module] if module else self.module
        return owner.call(owner.functions[function].name, self.depth + 1, {})
