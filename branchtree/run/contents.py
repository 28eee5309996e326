"""What lies in the files that a run reads: digests by which a changed prompt, picture or weight is found and named.

Of a file up to a limit all bytes count, of a larger one its size and 64 blocks of 64 KiB that are spread evenly over
it: other weights differ everywhere, and a model of any size is read in a moment. Times of change do not count, so that
a copy is as good as the original. Files and folders whose names begin with a dot are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.files.checksums import CARD
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import Condition
from branchtree.recipe.paths import local_paths
from branchtree.recipe.schema import DataSection, EvaluationSection, Recipe

Contents = Mapping[str, Mapping[str, str]]
"""By the key of the recipe that names them, the digest of each file."""

WEIGHTS_WHOLE, MEDIA_WHOLE = 64 * 2**20, 2**20
"""Bytes up to which a file of weights, or a picture or video, counts whole."""
BLOCKS, BLOCK = 64, 2**16
MANY_MEDIA = 10_000
"""Pictures and videos above this number count by their names and sizes."""
DIGITS = 16
"""Hexadecimal digits that are kept of a digest."""
SOURCES = ("model.", "rewards.", "evaluation.rewards.")
"""Beginnings of the keys whose paths hold weights."""
SHOWN = 3


@dataclass(frozen=True)
class FileChange:
    """Files that a key of the recipe names and that hold something else than before."""

    key: str
    files: Sequence[str]

    def __str__(self) -> str:
        more = f" and {len(self.files) - SHOWN} more" if len(self.files) > SHOWN else ""
        return f"{self.key}: {', '.join(self.files[:SHOWN])}{more} changed"


def read_contents(recipe: Recipe, conditions: Sequence[Condition], held_out: Sequence[Condition]) -> Contents:
    """Return the digests of prompts, of the pictures and videos that they name, and of local models and rewards.

    ``conditions`` and ``held_out`` are the prompts as they were read, from wherever they come.
    """
    found: dict[str, Mapping[str, str]] = {"data.prompts": _prompts(recipe.data, conditions)}
    if recipe.evaluation is not None:
        found["evaluation.prompts"] = _prompts(recipe.evaluation, held_out)
    for key, path in local_paths(recipe.model_dump(mode="json")).items():
        if key.startswith(SOURCES) and path.exists():
            found[key] = _below(path)
    return found


def changed_files(before: Contents, now: Contents) -> list[FileChange]:
    """Return what changed under keys that both name."""
    found = []
    for key in before.keys() & now.keys():
        if files := _different(before[key], now[key]):
            found.append(FileChange(key, files))
    return sorted(found, key=lambda change: change.key)


def _different(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names under which two folders hold different files."""
    return [name for name in sorted({*one, *other} - {CARD}) if one.get(name) != other.get(name)]


def same_files(before: Contents, now: Contents) -> list[str]:
    """Return the keys under which all files are as before, wherever they lie by now."""
    same = [key for key in before if key in now and not _different(before[key], now[key])]
    return [*same, *(f"{key.removesuffix('prompts')}folder" for key in same if key.endswith(".prompts"))]


def evaluation_identity(
    recipe: Recipe, rewards: Sequence[NamedReward], prompts: int, contents: Contents
) -> dict[str, Any]:
    """Return all that held-out figures depend on but the trained weights: figures of another identity do not compare.

    ``rewards`` are those that judge, and ``prompts`` is the number of prompts.
    """
    section = recipe.evaluation
    assert section is not None
    model = {key: value for key, value in recipe.model.options.items() if key != "path"}
    weights = {key: _digest(json.dumps(files, sort_keys=True).encode()) for key, files in contents.items()}
    return {
        "prompts": {"number": prompts, "digest": weights["evaluation.prompts"]},
        "rewards": {reward.label: reward.described for reward in rewards},
        "weights": {key: value for key, value in weights.items() if key.startswith("evaluation.rewards.")},
        "noises": section.noises,
        "seed": section.seed,
        "sampler": {
            "steps": recipe.tree.steps,
            "grid": recipe.sampler.grid,
            "shift": recipe.sampler.shift,
            "solver": recipe.tree.solver,
        },
        "model": {"adapter": recipe.model.adapter, **json.loads(json.dumps(model, default=str))},
        "precision": recipe.run.precision,
    }


def file_digest(path: Path, whole: int = WEIGHTS_WHOLE) -> str:
    """Return the digest of a file; one that cannot be read has the digest ``unreadable``."""
    try:
        size = path.stat().st_size
        content = hashlib.sha256(f"{size} ".encode())
        with path.open("rb") as file:
            if size <= whole:
                content.update(file.read())
            else:
                for block in range(BLOCKS):
                    file.seek((size - BLOCK) * block // (BLOCKS - 1))
                    content.update(file.read(BLOCK))
    except OSError:
        return "unreadable"
    return content.hexdigest()[:DIGITS]


def _below(path: Path) -> dict[str, str]:
    """Return the digest of a file, or of every file of a folder, by its path in there."""
    if not path.is_dir():
        return {path.name: file_digest(path)}
    files: dict[str, str] = {}
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if not name.startswith("."):
                files[file.relative_to(path).as_posix()] = file_digest(file)
    return dict(sorted(files.items()))


def _prompts(section: DataSection | EvaluationSection, conditions: Sequence[Condition]) -> dict[str, str]:
    """Return the digest of the prompts with their metadata, by the name of their file, and of each file they name."""
    file = section.prompts if isinstance(section.prompts, str) else "prompts"
    base = Path(section.folder) if section.folder is not None else Path(file).parent
    media: dict[str, Path] = {}
    texts = []
    for condition in conditions:
        names = []
        for path in condition.files:
            name = None if path is None else _inside(path, base)
            names.append(name)
            if path is not None and name is not None:
                media[name] = path
        texts.append([condition.prompt, condition.negative_prompt, names, _plain(condition.metadata)])
    return {Path(file).name: _digest(json.dumps(texts).encode()), **_media(media)}


def _media(files: Mapping[str, Path]) -> dict[str, str]:
    if len(files) <= MANY_MEDIA:
        return {name: file_digest(path, MEDIA_WHOLE) for name, path in sorted(files.items())}
    sizes = [[name, path.stat().st_size if path.is_file() else None] for name, path in sorted(files.items())]
    return {f"{len(files)} images and videos": _digest(json.dumps(sizes).encode())}


def _inside(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _plain(value: Any) -> Any:
    """Return metadata in a form that JSON writes the same way in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        return _digest(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
