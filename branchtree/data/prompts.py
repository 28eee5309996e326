"""Reading of prompts, with the images and videos that they name, and the order in which iterations use them."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from branchtree.core.noise import Purpose, generator
from branchtree.data.row_keys import warn_of_near_keys
from branchtree.errors import DataError, refuse, shortened
from branchtree.files.json_lines import json_object, numbered_lines
from branchtree.files.reading import half_character, require_file, user_path
from branchtree.plugins.protocols import ChecksConditions, ModelAdapter, NamesItsMedia, RewardAdapter
from branchtree.plugins.values import Condition

if TYPE_CHECKING:
    from branchtree.recipe.schema import DataSection, EvaluationSection

HUB = "hub:"
MEDIA = ("image", "last_image", "video")


@dataclass(frozen=True)
class PromptOrder:
    """An endless sequence of prompts: each pass over all of them is a permutation addressed by (seed, pass)."""

    prompts: int
    seed: int
    shuffle: bool

    def at(self, position: int) -> int:
        """Return the prompt id at a position of the sequence: pass * prompts + index, so that ids are unique."""
        return self.batch(position, 1)[0]

    def batch(self, iteration: int, size: int) -> list[int]:
        """Return the prompt ids of an iteration of ``size`` prompts."""
        positions = [divmod(position, self.prompts) for position in range(iteration * size, (iteration + 1) * size)]
        passes = {number: self._pass(number) for number in {number for number, _ in positions}}
        return [number * self.prompts + passes[number][rank] for number, rank in positions]

    def index(self, prompt_id: int) -> int:
        """Return the index of the prompt that has an id."""
        return prompt_id % self.prompts

    def _pass(self, number: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.prompts))
        order: list[int] = torch.randperm(
            self.prompts, generator=generator(self.seed, number, 0, 0, 0, Purpose.PERMUTATION)
        ).tolist()
        return order


def training_conditions(section: DataSection, model: ModelAdapter | None = None) -> list[Condition]:
    """Read the prompts to train ``model`` on. Raises DataError."""
    return load_conditions(section.prompts, section.column, section.split, section.folder, "data", media_of(model))


def held_out_conditions(section: EvaluationSection | None, model: ModelAdapter | None = None) -> list[Condition]:
    """Read the prompts of an evaluation of ``model``, at most ``limit``; none without a section. Raises DataError."""
    if section is None:
        return []
    media = media_of(model)
    prompts = load_conditions(section.prompts, section.column, section.split, section.folder, "evaluation", media)
    return prompts[: section.limit]


def media_of(model: ModelAdapter | None) -> Collection[str]:
    """Return the keys of images and videos that a model reads: all of them, unless it names its own.

    ``images`` is among them if it takes more than one image.
    """
    return model.media if isinstance(model, NamesItsMedia) else MEDIA


def load_conditions(
    prompts: str | Sequence[str],
    column: str,
    split: str,
    folder: str | None = None,
    section: str = "data",
    media: Collection[str] = MEDIA,
) -> list[Condition]:
    """Read prompts from a list, a .txt, .jsonl or .parquet file, or ``hub:org/name``.

    Args:
        prompts: The prompts, or where they are.
        column: The key or column of the prompt.
        split: The split of a hub dataset.
        folder: The data folder, to which the paths of images and videos are relative; by default the folder of the file
            that names them.
        section: The section of the recipe, for messages.
        media: Keys of images and videos to read; columns of a hub dataset with other media are dropped.

    Raises:
        DataError: Something is missing, unreadable or empty, or a path leads out of the data folder; the message names
            file and line.
    """
    files = None if folder is None else user_path(folder)
    if files is not None and not os.path.isdir(files):
        raise DataError(f"{section}.folder: no folder {shortened(str(files))}")
    if not isinstance(prompts, str):
        reader = _Reader(column, files, section)
        conditions = [reader.condition({column: text}, f"{section}.prompts.{i}") for i, text in enumerate(prompts)]
    elif prompts.startswith(HUB):
        rows, name = _hub_rows(prompts, split, media, section)
        conditions = _Reader(column, files, section).table(rows, name)
    else:
        path = Path(prompts)
        conditions = _from_file(path, _Reader(column, path.parent if files is None else files, section))
    if not conditions:
        source = prompts if isinstance(prompts, str) else "the list of prompts"
        raise DataError(f"{source}: holds no prompts; write at least one")
    return conditions


def check_conditions(model: ModelAdapter, conditions: Iterable[Condition]) -> None:
    """Let a model check conditions before it is loaded, each image, video, negative prompt and metadata once.

    Raises DataError with a line for each of the first few that it refuses.
    """
    media = media_of(model)
    different: dict[object, Condition] = {}
    for one in conditions:
        different.setdefault((one.files, one.negative_prompt, one.metadata_text), one)

    def check(condition: Condition) -> None:
        if condition.further_images and "image" in media and "images" not in media:
            raise DataError(f"{condition} has {len(condition.images)} images, and the model takes one; give one.")
        model.check(condition)

    refuse(_refused(check, different.values()))


def check_for_rewards(rewards: Iterable[RewardAdapter], conditions: Sequence[Condition]) -> None:
    """Let the rewards that need more than a prompt check all conditions that they are to score, before they are loaded.

    Raises DataError with a line for each of the first few that one refuses.
    """
    refuse([why for one in rewards if isinstance(one, ChecksConditions) for why in _refused(one.check, conditions)])


def _refused(check: Callable[[Condition], None], conditions: Iterable[Condition]) -> list[str]:
    reasons: list[str] = []
    for condition in conditions:
        try:
            check(condition)
        except DataError as error:
            reasons.append(str(error))
    return reasons


@dataclass(frozen=True)
class _Reader:
    """Turns rows of a file into conditions."""

    column: str
    folder: Path | None  # of images and videos
    section: str

    def table(self, rows: Iterable[Mapping[str, Any]], name: str) -> list[Condition]:
        return self.rows([(f"{name}: row {number}", row) for number, row in enumerate(rows, 1)])

    def rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Condition]:
        """Return the conditions of the rows of one file, which are given with their locations."""
        conditions = [self.condition(row, location) for location, row in rows]
        warn_of_near_keys(rows, (self.column, "negative_prompt", *MEDIA), self.column)
        return conditions

    def condition(self, row: Mapping[str, Any], location: str) -> Condition:
        prompt, negative = row.get(self.column), row.get("negative_prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{location}: needs a non-empty text under '{self.column}'; {self._instead(row)}")
        if not isinstance(negative, str | None):
            raise DataError(f"{location}: negative_prompt: write a text or null, not {_kind(negative)}")
        require_characters(prompt, f"{location}: {self.column}")
        require_characters(negative or "", f"{location}: negative_prompt")
        images = self._images(row, location)
        return Condition(
            prompt=prompt.strip(),
            negative_prompt=negative,
            image=next(iter(images), None),
            further_images=tuple(images[1:]),
            last_image=self._file("last_image", row.get("last_image"), location),
            video=self._file("video", row.get("video"), location),
            metadata={key: row[key] for key in row if key not in (self.column, "negative_prompt", *MEDIA)},
            location=location,
        )

    def _instead(self, row: Mapping[str, Any]) -> str:
        """Say what a row has instead of a prompt."""
        if self.column in row:
            value = row[self.column]
            return "it is empty" if isinstance(value, str) else f"it is {_kind(value)}"
        return f"it has {shortened(', '.join(map(str, row))) or 'nothing'}"

    def _images(self, row: Mapping[str, Any], location: str) -> list[Path]:
        """Return the path, or the list of paths, under ``image``; none without one."""
        value = row.get("image")
        if not isinstance(value, list):
            path = self._file("image", value, location)
            return [] if path is None else [path]
        if not value or None in value:
            what = "it is empty" if not value else f"entry {value.index(None) + 1} is null"
            raise DataError(f"{location}: image: write the paths of files into the list, or leave it out; {what}")
        found = [self._file(f"image {number}", entry, location) for number, entry in enumerate(value, 1)]
        return [path for path in found if path is not None]

    def _file(self, key: str, value: Any, location: str) -> Path | None:
        """Return the path under ``key``. It must stay inside the data folder, also after links are followed."""
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            what = "an empty text" if isinstance(value, str) else _kind(value)
            raise DataError(f"{location}: {key}: write the path of a file as a text, or leave it out; it is {what}")
        if self.folder is None:
            raise DataError(
                f"{location}: {key} '{value}': in which folder? Set {self.section}.folder to the one that holds the "
                "files"
            )
        path = self.folder / value
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL character
            raise DataError(f"{location}: {key} '{value}': is no path: {error}") from None
        if not inside:
            raise DataError(
                f"{location}: {key} '{value}' lies outside the data folder '{self.folder}'; move the file into it, or "
                f"set {self.section}.folder to a folder that holds all files"
            )
        return path


def require_characters(text: str, location: str) -> None:
    """Raise DataError, beginning with the location, for a text with characters that no tokenizer or file accepts."""
    wrong = "a NUL character" if "\0" in text else half_character(text)
    if wrong:
        raise DataError(f"{location}: holds {wrong}, which cannot be shown; leave it out")


def _kind(value: object) -> str:
    """Return the kind of a value in words, those of JSON where there are any."""
    names = {
        dict: "an object",
        list: "a list",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        bytes: "bytes",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _from_file(path: Path, reader: _Reader) -> list[Condition]:
    suffix = path.suffix.lower()
    name = shortened(str(path))
    require_file(
        path, DataError(f"no prompt file {name}; set {reader.section}.prompts to a .txt, .jsonl or .parquet file")
    )
    if suffix == ".parquet":
        return reader.table(_parquet_rows(path), str(path))
    if suffix not in {".txt", ".jsonl"}:
        raise DataError(f"{path}: prompts are read from .txt, .jsonl and .parquet files")
    numbered = numbered_lines(path)
    if suffix == ".txt":
        return [Condition(prompt=line.strip(), location=location) for location, line in numbered]
    return reader.rows([(location, json_object(line, location)) for location, line in numbered])


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    column = ""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        columns = []
        for name, values in zip(table.column_names, table.columns, strict=True):
            column = f"column '{name}': "
            columns.append([_json_value(value) for value in values.to_pylist()])
    except Exception as error:  # for damaged files the library raises errors of many classes
        reason = shortened(" ".join(str(error).split()))
        raise DataError(f"{path}: not a readable parquet file: {column}{reason}") from None
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: two columns are named '{twice[0]}'; rename one")
    for row in zip(*columns, strict=True):
        yield dict(zip(table.column_names, row, strict=True))


def _json_value(value: Any) -> Any:
    """Return a value of a table in JSON's types where possible: times become texts, and NaN and infinity null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date too
        return value.isoformat()
    return value if isinstance(value, str | int | bytes | None) else str(value)


def _hub_rows(name: str, split: str, media: Collection[str], section: str) -> tuple[Iterable[Mapping[str, Any]], str]:
    """Return the rows of a dataset of the hub, and its name for messages.

    Columns of media that are not wanted are dropped, and so are those that contain pictures, sounds or videos
    themselves, not their paths: nothing is decoded.
    """
    datasets = _datasets(name)
    try:
        data = datasets.load_dataset(name.removeprefix(HUB), split=split)
    except Exception as error:  # the library raises errors of many classes; each means that it cannot be loaded
        if "scripts are no longer supported" in str(error):
            hub_id = name.removeprefix(HUB)
            raise DataError(
                f"{name}: this dataset is a loading script, a program that 'datasets' no longer runs; download the "
                f"file that holds its prompts (hf download {hub_id} FILE --repo-type dataset), write them to a .txt "
                f"file, one a line, and set {section}.prompts to it"
            ) from None
        raise DataError(f"{name}: split '{split}' cannot be loaded: {error}") from error
    unwanted = set(MEDIA) - set(media)
    embedded = {column for column, feature in data.features.items() if _holds_media(feature)}
    rows = data.remove_columns([column for column in data.column_names if column in unwanted | embedded])
    missed = " and ".join(f"'{column}'" for column in MEDIA if column in embedded - unwanted)
    found = [{str(key): _json_value(value) for key, value in row.items()} for row in rows.to_list()]
    return found, f"{name} (without {missed}, no paths of files)" if missed else name


def _datasets(name: str) -> Any:
    """Import 'datasets'. Raises DataError if it is missing, or so old that it may run a dataset's own code."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: reading hub datasets needs the 'datasets' package; install the 'hub' extra") from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise DataError(
            f"{name}: reading hub datasets needs version 4 or later of 'datasets', and {datasets.__version__} is "
            "installed; install the 'hub' extra again"
        )
    return datasets


def _holds_media(feature: object) -> bool:
    """Return whether a column's type in 'datasets' has values that the library would decode, at any depth."""
    if isinstance(feature, Mapping):
        return any(map(_holds_media, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_holds_media, feature))
    return hasattr(feature, "decode_example") or _holds_media(getattr(feature, "feature", ()))
