"""Prompts: reading them, and saying which ones an iteration uses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from branchtree.errors import DataError
from branchtree.noise import Purpose, generator
from branchtree.protocols import Condition

HUB = "hub:"
KNOWN = ("negative_prompt", "image", "video")


@dataclass(frozen=True)
class PromptOrder:
    """An endless sequence of prompts: each pass over all of them is a permutation addressed by (seed, pass)."""

    prompts: int
    seed: int
    shuffle: bool

    def at(self, position: int) -> int:
        """The prompt id at a place of the sequence: pass * prompts + index, so that no id comes twice."""
        return (position // self.prompts) * self.prompts + self._pass(position // self.prompts)[position % self.prompts]

    def batch(self, iteration: int, size: int) -> list[int]:
        """The prompt ids of an iteration."""
        return [self.at(position) for position in range(iteration * size, (iteration + 1) * size)]

    def index(self, prompt_id: int) -> int:
        """Which prompt an id stands for."""
        return prompt_id % self.prompts

    def _pass(self, number: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.prompts))
        order: list[int] = torch.randperm(
            self.prompts, generator=generator(self.seed, number, 0, 0, 0, Purpose.PERMUTATION)
        ).tolist()
        return order


def load_conditions(prompts: str | Sequence[str], column: str, split: str) -> list[Condition]:
    """Read prompts from a list, a .txt, .jsonl or .parquet file, or ``hub:org/name``.

    Raises DataError naming file and line if something is missing, unreadable or empty.
    """
    if not isinstance(prompts, str):
        conditions = [_condition({column: text}, column, f"data.prompts.{i}", None) for i, text in enumerate(prompts)]
    elif prompts.startswith(HUB):
        conditions = list(_from_rows(_hub_rows(prompts, split), column, prompts, None))
    else:
        conditions = _from_file(Path(prompts), column)
    if not conditions:
        place = prompts if isinstance(prompts, str) else "the list of prompts"
        raise DataError(f"{place}: holds no prompts; write at least one")
    return conditions


def _from_file(path: Path, column: str) -> list[Condition]:
    if not path.is_file():
        raise DataError(f"no prompt file {path}; set data.prompts to a .txt, .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return list(_from_rows(_parquet_rows(path), column, str(path), path.parent))
    if path.suffix not in {".txt", ".jsonl"}:
        raise DataError(f"{path}: prompts are read from .txt, .jsonl and .parquet files")
    try:
        # Lines end at line feeds alone: str.splitlines would also cut at separators that a prompt may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        return [Condition(prompt=line.strip()) for _, line in numbered]
    return [_condition(_json(line, f"{path}:{n}"), column, f"{path}:{n}", path.parent) for n, line in numbered]


def _json(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: each line is one JSON object")
    return row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: reading hub datasets needs the 'datasets' package; install the 'hub' extra") from None
    try:
        yield from datasets.load_dataset(name.removeprefix(HUB), split=split)
    except Exception as error:  # the library raises many kinds; each means that the dataset cannot be had
        raise DataError(f"{name}: split '{split}' cannot be loaded: {error}") from error


def _from_rows(rows: Iterator[Mapping[str, Any]], column: str, name: str, folder: Path | None) -> Iterator[Condition]:
    for number, row in enumerate(rows, 1):
        yield _condition(row, column, f"{name}: row {number}", folder)


def _condition(row: Mapping[str, Any], column: str, place: str, folder: Path | None) -> Condition:
    """One entry; paths are relative to the file that names them."""
    prompt = row.get(column)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{place}: needs a non-empty text under '{column}'; it has {', '.join(row) or 'nothing'}")

    def file(key: str) -> Path | None:
        return None if row.get(key) is None else (folder or Path()) / str(row[key])

    return Condition(
        prompt=prompt.strip(),
        negative_prompt=row.get("negative_prompt"),
        image=file("image"),
        video=file("video"),
        metadata={key: value for key, value in row.items() if key not in (column, *KNOWN)},
    )
