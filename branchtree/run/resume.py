"""Going on with a run: from which checkpoint, and what may have changed in its recipe and files since."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from branchtree.errors import CheckpointError, RecipeError, nearest
from branchtree.recipe.paths import make_absolute
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import Source
from branchtree.run.checkpoint import chosen_checkpoint, newest_whole, read_state
from branchtree.run.contents import Contents, FileChange, changed_files, same_files

log = logging.getLogger("branchtree")

FREE_SECTIONS = ("name", "description", "evaluation", "callbacks", "scoring", "alarm")
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
    "encode_alone",
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


def find_checkpoint(
    folder: Path,
    recipe: Recipe,
    allow: Sequence[str],
    contents: Contents | None = None,
    iteration: int | None = None,
) -> Path | None:
    """The newest checkpoint that is whole, or that of ``iteration``, if it can be gone on from; None without any.

    ``contents`` are the digests of the files that are read now. Raises CheckpointError if no checkpoint is whole, or it
    was written under a recipe or files that would learn something else in keys that ``allow`` does not name;
    RecipeError for an allowed key that does not exist.
    """
    path = newest_whole(folder) if iteration is None else chosen_checkpoint(folder, iteration)
    if path is None:
        return None
    state = read_state(path)
    files: tuple[Contents, Contents] = ({}, {})
    if contents is not None and "contents" in state:
        files = (state["contents"], contents)
    elif contents is not None:
        log.warning("%s holds no digests of files: whether prompts, model and rewards are as before is not known", path)
    changes = require_same_recipe(as_of_now(state["recipe"]), recipe.model_dump(mode="json"), allow, path, files)
    if state["iteration"] > recipe.run.iterations:
        raise CheckpointError(f"{path}: {state['iteration']} iterations are done, more than run.iterations asks for")
    for change in changes:
        log.warning("from iteration %d on, %s", state["iteration"], change)
    for key in unused(allow, changes):
        log.warning("--allow %s: nothing changed there", key)
    return path


def as_of_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's recipe with the defaults of keys that it did not know yet, and with absolute paths."""
    source = Source(copy.deepcopy(recipe))
    make_absolute(source)
    try:
        return Recipe.model_validate(source.data).model_dump(mode="json")
    except ValidationError:  # another version's; what differs is named as it stands
        return source.data


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
    """Yield where two recipes differ, by the innermost key: a value, or what only one of them has."""
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
    """Return whether it is a list of sections, as ``rewards`` is; any other list is one value."""
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def _entry(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else ABSENT


def _covered(key: str, names: Sequence[str]) -> bool:
    """Return whether a key is one of those named, or lies in a section that is."""
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
        entries = {str(i): entry for i, entry in enumerate(value)}
    for name, entry in entries.items():
        yield from _keys(entry, f"{key}.{name}" if key else name)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    # Both ends: paths differ in the last of their names.
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2 - 3]}...{text[-SHOWN // 2 :]}"
