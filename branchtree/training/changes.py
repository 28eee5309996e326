"""What may change in a recipe when its run is continued, and how what may not is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError, RecipeError, nearest
from branchtree.run.contents import Contents, FileChange, changed_files, same_files

FREE_SECTIONS = ("name", "description", "evaluation", "callbacks", "scoring")
FREE_RUN_KEYS = (
    "iterations",
    "checkpoint_every",
    "checkpoint_async",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "tree_every",
    "trackers",
    "embeddings",
    "embeddings_gib",
    "timeout",
)
"""What may change when a run is continued: it does not touch what is learnt."""
SHOWN = 60
"""Characters of a value in a message."""


class _Absent:
    """Stands for the value of a key that one of two recipes does not have."""


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """A key of the recipe, dotted, and its two values."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)} and is {_shown(self.now)}"


def require_same_recipe(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    allow: Sequence[str],
    path: Path,
    files: tuple[Contents, Contents] = ({}, {}),
) -> list[Change | FileChange]:
    """The changes between two recipes, written as JSON, that touch what is learnt; all are allowed.

    ``allow`` names keys, or sections with all that is in them. ``files`` are the digests of the files that both name:
    a path to the same files is no change, and other files under the same path are one. Raises CheckpointError that
    names the keys and files that changed without being allowed to, and RecipeError for an allowed key that neither
    recipe has.
    """
    _require_known(allow, [before, now])
    moved = same_files(*files)
    changes: list[Change | FileChange] = [change for change in learning(before, now) if change.key not in moved]
    keys = [change.key for change in changes]
    changes += [change for change in changed_files(*files) if not _covered(change.key, [*FREE_SECTIONS, *keys])]
    refused = [change for change in changes if not _covered(change.key, allow)]
    if refused:
        flags = " ".join(f"--allow {change.key}" for change in refused)
        under, same = "was written under other files", "files"
        if any(isinstance(change, Change) for change in refused):
            under, same = "was written under another recipe", "recipe"
        raise CheckpointError(
            f"{path} {under}: {'; '.join(map(str, refused))}. Use the same {same}, or another --output, or, to go on "
            f"with what changed, add {flags}"
        )
    return changes


def learning(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the changes between two recipes, written as JSON, that touch what is learnt."""
    # The length of the run shapes every schedule but the constant one.
    constant = before["optim"]["schedule"] == now["optim"]["schedule"] == "constant"
    free = [*FREE_SECTIONS, *(f"run.{key}" for key in FREE_RUN_KEYS if constant or key != "iterations")]
    return [change for change in differences(before, now) if not _covered(change.key, free)]


def unused(allow: Sequence[str], changes: Sequence[Change | FileChange]) -> list[str]:
    """The allowed keys under which nothing changed."""
    return [key for key in allow if not any(_covered(change.key, [key]) for change in changes)]


def differences(before: Any, now: Any, key: str = "") -> Iterator[Change]:
    """Where two recipes differ, by the innermost key: a value, or an entry or section that only one of them has."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(name, before.get(name, ABSENT), now.get(name, ABSENT)) for name in {**before, **now}]
    elif _is_sections(before) and _is_sections(now):
        length = max(len(before), len(now))
        pairs = [(str(i), _entry(before, i), _entry(now, i)) for i in range(length)]
    else:
        if before is ABSENT or now is ABSENT or before != now:
            yield Change(key, before, now)
        return
    for name, first, second in pairs:
        yield from differences(first, second, f"{key}.{name}" if key else name)


def _is_sections(value: Any) -> bool:
    """Whether it is a list of sections, as ``rewards`` is; any other list is one value."""
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def _entry(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else ABSENT


def _covered(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of those named, or lies in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _require_known(allow: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> None:
    known = {key for recipe in recipes for key in _keys(recipe)}
    for name in allow:
        if name not in known:
            near = sorted(key for key in known if key.split(".")[0] == name.split(".")[0]) or sorted(
                key for key in known if "." not in key
            )
            raise RecipeError(f"--allow {name}: the recipe has no such key{nearest(name, near)}")


def _keys(value: Any, key: str = "") -> Iterator[str]:
    """All dotted keys, of sections and of values."""
    if key:
        yield key
    entries: Mapping[str, Any] = {}
    if isinstance(value, Mapping):
        entries = value
    elif _is_sections(value):
        entries = {str(place): entry for place, entry in enumerate(value)}
    for name, entry in entries.items():
        yield from _keys(entry, f"{key}.{name}" if key else name)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    # Both ends: paths differ in the last of their names.
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2 - 3]}...{text[-SHOWN // 2 :]}"
