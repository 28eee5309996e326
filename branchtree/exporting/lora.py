"""The trained weights of a run, as files that other programs read."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from branchtree.errors import CheckpointError, OutputError
from branchtree.exporting import Format
from branchtree.files.checksums import MANIFEST
from branchtree.files.names import folder_name
from branchtree.files.reading import require_name
from branchtree.files.writing import write_atomically, writing
from branchtree.plugins.protocols import ConvertsLora
from branchtree.recipe import load_recipe
from branchtree.recipe.build import make_model
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import RunDirectory

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Exported:
    """What an export wrote: files, or the one folder of a whole model."""

    run: Path
    format: Format
    files: tuple[Path, ...]
    address: str | None = None  # on the hub, where it was uploaded


def export_run(run: Path, form: Format, output: Path | None) -> Exported:
    """Write a run's weights in a format; see ``branchtree.export``. Raises CheckpointError or OutputError."""
    directory = RunDirectory(run)
    final = finished_model(directory)
    recipe = load_recipe(directory.recipe_file)
    target = _target(directory, recipe, form, output)
    if form == "diffusers":
        return Exported(run, form, _copied(final, target))
    return Exported(run, form, _converted(final, recipe, form, target))


def finished_model(directory: RunDirectory) -> Path:
    """Return the folder of a run's trained model. Raises CheckpointError where there is none."""
    if not directory.recipe_file.is_file():
        raise CheckpointError(
            f"{directory.root}: is no run's directory; give the one that 'branchtree train' writes to"
        )
    if not directory.final.is_dir():
        raise CheckpointError(
            f"{directory.root}: holds no {directory.final.name}/ yet, which is written at the end of training; go on "
            "with --resume"
        )
    return directory.final


def _target(directory: RunDirectory, recipe: Recipe, form: Format, output: Path | None) -> Path:
    """Return where to write: by default in the run's directory. Raises OutputError."""
    if output is None:
        return directory.root / "export" / f"{folder_name(recipe.name)}-{form}{SUFFIX if recipe.lora else ''}"
    require_name(output, OutputError)
    if output.exists():
        raise OutputError(f"{output}: is there already; give another --output, or remove it")
    return output


def _copied(final: Path, target: Path) -> tuple[Path, ...]:
    """Copy the model as its own library reads it: the file of a single LoRA, or else the folder."""
    weights = [path for path in final.rglob("*") if path.suffix == SUFFIX]
    whole = any(path.is_dir() for path in final.iterdir()) or len(weights) != 1
    if not whole:
        with writing(target):
            write_atomically(target, weights[0].read_bytes())
        return (target,)
    folder = target.with_suffix("") if target.suffix == SUFFIX else target
    if folder.exists():  # somebody may have put files of their own into an earlier export
        raise OutputError(f"{folder}: is there already; move it away, or give another --output")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(folder):
        try:
            shutil.copytree(final, temporary, ignore=shutil.ignore_patterns(MANIFEST))
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return (folder,)


def _converted(final: Path, recipe: Recipe, form: Format, target: Path) -> tuple[Path, ...]:
    """Write a LoRA under another program's names: a file for each denoiser."""
    from safetensors.torch import save

    if recipe.lora is None:
        raise CheckpointError(
            f"the run trained all weights, and {form} is a format of LoRA files; give --format diffusers, which "
            "copies the whole model"
        )
    model = make_model(recipe)
    if not isinstance(model, ConvertsLora):
        others = ", ".join(name for name in get_args(Format) if name != "diffusers")
        raise CheckpointError(
            f"the model '{recipe.model.adapter}' gives its LoRA no other program's names ({others}); give --format "
            "diffusers, which copies it as it is"
        )
    written = []
    for index, (name, tensors) in enumerate(model.convert_lora(final, form).items()):
        file = target if index == 0 else target.with_name(f"{target.stem}_{name}{target.suffix}")
        content = save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"})
        with writing(file):
            write_atomically(file, content)
        written.append(file)
    return tuple(written)
