"""Reads YAML as plain data: mappings with texts as keys, lists, texts, numbers, truth values and null, with lines.

Tags of other types are refused, dates are texts, and numbers are those of YAML 1.2: 1e-5 is a number, 010 is ten, 1:30
is a text. Short texts that expand to very much data (aliases of aliases, deep nesting) are refused early.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from branchtree.errors import shortened
from branchtree.files.reading import half_character

KeyPath = tuple[str | int, ...]

MOST_LEVELS = 64
MOST_REPEATS = 50_000
"""The most values that aliases may repeat in all."""
MOST_DIGITS = 300
"""The most digits of an integer; a longer one fits no float, and Python refuses to print very long ones."""

TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"


class NotPlainError(Exception):
    """A text is not YAML, or has more than plain data."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


@dataclass
class Plain:
    """Plain data, and the line of every key path in it."""

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Composes nodes, with the numbers of YAML 1.2 and a limited depth."""

    depth = 0

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # The scanner reads far ahead of the composer, and its work grows with the square of the open brackets.
        if self.flow_level >= MOST_LEVELS:
            raise ComposerError(None, None, _TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_LEVELS:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, _TOO_DEEP, mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes a text which ``_Loader`` or a reader of YAML 1.1 would read as another type."""


_TOO_DEEP = f"is nested deeper than {MOST_LEVELS} levels, or holds itself"
_DROPPED = {f"{TAG}{name}" for name in ("int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _DROPPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        f"{TAG}int", re.compile(r"^[-+]?(\d[\d_]*|0x[0-9a-fA-F]+|0o[0-7]+)$", re.ASCII), list("-+0123456789")
    )
    _reader_or_writer.add_implicit_resolver(
        f"{TAG}float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.inf|\.nan)$", re.ASCII),
        list("-+0123456789."),
    )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Return a node for a text, with line separators as escapes so that they are read back unchanged."""
    return dumper.represent_scalar(f"{TAG}str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _represent_text)


def write_yaml(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML that ``read_plain`` reads back equal."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_plain(text: str) -> Plain:
    """Read the single document of a text; an empty text is null. Raises NotPlainError."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        plain = Plain()
        node = loader.get_single_node()
        if node is not None:
            plain.data = _Builder(plain.lines).build(node, ())
        return plain
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotPlainError(line, f"unacceptable character #x{ord(text[error.position]):04x}: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotPlainError(mark.line + 1 if mark else 1, shortened(str(error.problem or error))) from None
    except (ValueError, OverflowError) as error:  # the number of an escape or a directive is too large
        raise NotPlainError(loader.line + 1 if loader else 1, str(error)) from None


@dataclass
class _Builder:
    """Builds plain data from nodes. An alias yields the node that it refers to, which is built again."""

    lines: dict[KeyPath, int]
    seen: set[int] = field(default_factory=set)
    repeats: int = 0
    depth: int = 0

    def build(self, node: yaml.Node, at: KeyPath) -> Any:
        """Return the data of a node at a key path."""
        self.repeats += id(node) in self.seen
        self.seen.add(id(node))
        if self.repeats > MOST_REPEATS:
            raise _refused(node, f"aliases repeat more than {MOST_REPEATS} values")
        if self.depth >= MOST_LEVELS:
            raise _refused(node, _TOO_DEEP)
        self.depth += 1
        try:
            return self._content(node, at)
        finally:
            self.depth -= 1

    def _content(self, node: yaml.Node, at: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
            for index, value in enumerate(node.value):
                self.lines[(*at, index)] = value.start_mark.line + 1
            return [self.build(value, (*at, index)) for index, value in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return _scalar(node)
        written = node.tag.replace(TAG, "!!")
        raise _refused(
            node, f"could not determine a constructor for the tag '{written}' on a {_kind(node)}; leave it out"
        )

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                data = self._merged(value, at)
        names: set[str] = set()
        for key, value in node.value:
            name = _key(key)
            if name in names:
                raise _refused(key, f"key '{name}' is written twice in one mapping")
            names.add(name)
            if key.tag != MERGE:
                self.lines[(*at, name)] = key.start_mark.line + 1
                data[name] = self.build(value, (*at, name))
        return data

    def _merged(self, node: yaml.Node, at: KeyPath) -> dict[str, Any]:
        """Return the keys that ``<<`` adds to a mapping: those of another, or of several, of which the first wins."""
        data: dict[str, Any] = {}
        for each in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(each, yaml.MappingNode):
                raise _refused(each, f"'<<' takes a mapping or a list of mappings, not a {_kind(each)}")
            data.update(self.build(each, at))
        return data


def _key(node: yaml.Node) -> str:
    """Return a key as it is written: 3, true and null are texts as keys, as in JSON."""
    if not isinstance(node, yaml.ScalarNode):
        raise _refused(node, f"found unhashable key: a key is a text, not a {_kind(node)}")
    return _text(node.value) if node.tag in _SCALARS else str(_scalar(node))


def _scalar(node: yaml.ScalarNode) -> Any:
    try:
        return _SCALARS[node.tag](node.value)
    except (ValueError, KeyError) as error:
        reason = f"{error}" if isinstance(error, ValueError) else f"it is no {node.tag.replace(TAG, '!!')}"
        raise _refused(node, f"{shortened(repr(node.value), 60)} cannot be read: {reason}") from None


def _text(text: str) -> str:
    """Return a text with pairs of surrogates, as JSON writes escapes, combined to characters. Raises ValueError."""
    if half_character(text) is None:
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ValueError(f"{half_character(text)} is half a character") from None


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number has at most {MOST_DIGITS} digits, not {len(digits)}")
    prefixed = digits.lstrip("+-")[:2].lower() in {"0x", "0o"}
    return int(digits, 0) if prefixed else int(digits)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: Mapping[str, Callable[[str], Any]] = {
    f"{TAG}null": {"": None, "~": None, "null": None, "Null": None, "NULL": None}.__getitem__,
    f"{TAG}bool": lambda text: yaml.SafeLoader.bool_values[text.lower()],
    f"{TAG}int": _integer,
    f"{TAG}float": _float,
    f"{TAG}str": _text,
    MERGE: _text,
}


def _kind(node: yaml.Node) -> str:
    """Return a node's kind in YAML's words: scalar, sequence or mapping."""
    return type(node).__name__.removesuffix("Node").lower()


def _refused(node: yaml.Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)
