"""Starting a run from the weights of another: which files a path stands for, and putting them into the model."""

from __future__ import annotations

from pathlib import Path

from branchtree.errors import CheckpointError, RecipeError
from branchtree.files.checksums import verify_checksums
from branchtree.files.reading import user_path
from branchtree.plugins.protocols import ModelAdapter, StartsFromWeights
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import read_yaml
from branchtree.run.checkpoint import STATE, newest_whole, require_usable
from branchtree.run.directory import RunDirectory


def with_start(recipe: Recipe, start: Path | None, resumed: RunDirectory | None) -> Recipe:
    """Return the recipe with the file or folder of weights that its run starts from, in absolute form.

    ``start`` is what a person names in place of the recipe's ``model.start``; without either, a run that is
    ``resumed`` keeps the start that it had. Raises RecipeError or CheckpointError if there are no weights.
    """
    found = None if resumed is None or start is not None else _recorded(resumed)
    named = start or (Path(recipe.model.start) if recipe.model.start is not None else None)
    if named is not None and not (found is not None and Path(found).is_relative_to(named)):
        found = str(find_start(user_path(named)).absolute())
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"start": found})})


def _recorded(run: RunDirectory) -> str | None:
    """Return the start that a run recorded."""
    if not run.holds_run:
        return None
    model = read_yaml(run.recipe_file).data.get("model")
    start = model.get("start") if isinstance(model, dict) else None
    return start if isinstance(start, str) else None


def find_start(path: Path) -> Path:
    """Return the file or folder of weights that a path stands for.

    A run's directory stands for its ``final/``, or, before there is one, for its newest whole checkpoint; a
    checkpoint's folder for the weights in it, not their average. Raises RecipeError if nothing is there, and
    CheckpointError for a damaged checkpoint.
    """
    if not path.exists():
        raise RecipeError(f"model.start: there is no file or folder {path}; name a run, a checkpoint or a LoRA")
    run = RunDirectory(path)
    if run.recipe_file.is_file():
        if run.final.is_dir():
            return run.final
        newest = newest_whole(run.checkpoints)
        if newest is None:
            raise CheckpointError(f"model.start: the run {path} holds neither final/ nor a checkpoint to start from")
        return newest / "model"
    if (path / STATE).is_file():
        require_usable(path)
        return path / "model"
    return path


def load_start(model: ModelAdapter, path: Path) -> None:
    """Put the weights to start from into a loaded model.

    Raises CheckpointError if they are not as the list of digests beside them says, or do not fit what is trained.
    """
    try:
        source = find_start(path)
        _verify(source)
        if isinstance(model, StartsFromWeights):
            model.start_from(source)
        else:
            model.restore(source)
    except CheckpointError as error:
        raise CheckpointError(f"model.start: {str(error).removeprefix('model.start: ')}") from error


def _verify(source: Path) -> None:
    """Compare weights with the digests in their folder or the one above. Raises CheckpointError."""
    verify_checksums(source.parent, CheckpointError, [source.name])
    if source.is_dir():
        verify_checksums(source, CheckpointError)
