"""Finding a recipe, following ``extends``, applying overrides, and validating with messages that name the place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from branchtree.errors import RecipeError, nearest
from branchtree.recipe.schema import PluginSection, Recipe, RewardSection
from branchtree.recipe.source import KeyPath, Origin, Source, override, read_yaml

if TYPE_CHECKING:
    from branchtree.plugins import Entry

SUFFIXES = (".yaml", ".yml")
METHOD_SIGN = "+"
METHODS = "methods"  # the folder, beside recipes, of settings that make any recipe follow one method
FILE_KEYS: tuple[KeyPath, ...] = (("data", "prompts"), ("evaluation", "prompts"))
FOLDER_KEYS: tuple[KeyPath, ...] = (("data", "folder"), ("evaluation", "folder"))
PROMPT_SUFFIXES = (".txt", ".jsonl", ".parquet")
LARGEST = 2**63
"""Integers below this fit where tensors and files keep them."""
VALUE_SHOWN = 200
"""Characters of a wrong value in a message."""


def load_recipe(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    smoke: bool = False,
    folders: Sequence[Path] | None = None,
) -> Recipe:
    """Load a recipe by name or YAML path; ``quickstart+mixgrpo`` is ``quickstart`` under that method's settings.

    ``overrides`` maps dotted keys to values; ``smoke`` applies the recipe's own ``smoke:`` section, which swaps in
    small models and rewards. ``folders`` are where names are looked up: by default those of the installed plug-ins
    and the library's own. Raises RecipeError with the file and line of what is wrong.
    """
    base, methods = split_methods(str(recipe))
    source = _extended(find_recipe(base, folders), folders, ())
    for method in methods:
        name, description = source.data["name"], source.data["description"]
        source.update(_extended(find_method(method, folders), folders, ()))
        source.data["name"] = f"{name}{METHOD_SIGN}{method}"
        source.data["description"] = f"{description}; {source.data['description']}"
    swaps = source.data.pop("smoke", None)
    if smoke:
        source.update(_smoke(swaps, source, recipe))
    source.origins = {path: origin for path, origin in source.origins.items() if path[:1] != ("smoke",)}
    override(source, overrides or {})
    return validate(source)


def recipe_folders() -> list[Path]:
    """The library's recipes, then those of plug-ins."""
    from branchtree.plugins import registry

    return [builtin_folder(), *registry().recipe_folders]


def _plugin_failures() -> str:
    from branchtree.plugins import registry

    return registry().failures


def builtin_folder() -> Path:
    """Inside the installed package, or, in an editable install, beside it."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Every recipe that can be named, and its file."""
    names: dict[str, Path] = {}
    for folder in recipe_folders() if folders is None else folders:
        for path in sorted(folder.glob("*.yaml")):
            if path.stem in names:
                raise RecipeError(f"two recipes are named '{path.stem}': {names[path.stem]} and {path}")
            names[path.stem] = path
    return names


def find_recipe(recipe: str | Path, folders: Sequence[Path] | None = None) -> Path:
    """The file of a recipe given by name or path."""
    path = Path(recipe).expanduser()
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}")
        return path
    names = recipe_names(folders)
    if str(recipe) not in names:
        failures = _plugin_failures() if folders is None else ""
        raise RecipeError(f"no recipe '{recipe}'{nearest(str(recipe), names)} A path must end in .yaml.{failures}")
    return names[str(recipe)]


def split_methods(recipe: str) -> tuple[str, list[str]]:
    """A recipe's name or path, and the methods it is put under; a path may hold the sign, as a run's folder does."""
    base, methods = recipe, list[str]()
    while METHOD_SIGN in base and not base.endswith(SUFFIXES):
        base, _, method = base.rpartition(METHOD_SIGN)
        methods.insert(0, method)
    return base, methods


def method_names(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Every method that a recipe can be put under, and its file."""
    return recipe_names([folder / METHODS for folder in (recipe_folders() if folders is None else folders)])


def find_method(method: str, folders: Sequence[Path] | None = None) -> Path:
    """The file of a method given by name. Raises RecipeError."""
    names = method_names(folders)
    if method not in names:
        raise RecipeError(f"no method '{method}'{nearest(method, names)}")
    return names[method]


def _extended(path: Path, folders: Sequence[Path] | None, below: tuple[Path, ...]) -> Source:
    """A file merged over what it extends."""
    if path.resolve() in below:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(str(step) for step in below)}")
    source = read_yaml(path)
    _absolute_files(source, path.parent)
    merged = Source()
    for file in _bases(source, path, folders):
        merged.update(_extended(file, folders, (*below, path.resolve())))
    merged.update(source)
    merged.origins[()] = Origin(str(path))
    # A recipe's name and description are its own; a base's would be wrong for it.
    merged.data["name"] = source.data.get("name", path.stem)
    merged.data["description"] = source.data.get("description", "")
    return merged


def _bases(source: Source, path: Path, folders: Sequence[Path] | None) -> list[Path]:
    """The files that a recipe extends; a relative path is relative to the recipe's own folder."""
    place, bases = source.origin(("extends",)), source.data.pop("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{place}: extends: write a recipe's name or path, or a list of them (it is {bases!r})")
    try:
        return [find_recipe(path.parent / name if name.endswith(SUFFIXES) else name, folders) for name in names]
    except RecipeError as error:
        raise RecipeError(f"{place}: extends: {error}") from None


def _absolute_files(source: Source, folder: Path) -> None:
    """Read relative prompt files and data folders as relative to the recipe that names them, also inside ``smoke``."""
    for keys in (*FILE_KEYS, *FOLDER_KEYS):
        for path in (keys, ("smoke", *keys)):
            *sections, last = path
            place: Any = source.data
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            value = place.get(last) if isinstance(place, dict) else None
            if isinstance(value, str) and (keys in FOLDER_KEYS or value.endswith(PROMPT_SUFFIXES)):
                place[last] = str((folder / Path(value).expanduser()).absolute())


def _smoke(swaps: Any, source: Source, recipe: str | Path) -> Source:
    if not isinstance(swaps, dict):
        raise RecipeError(f"recipe '{recipe}' has no 'smoke' section: it has no small version")
    inside = {path[1:]: origin for path, origin in source.origins.items() if path[:1] == ("smoke",) and len(path) > 1}
    # A model or reward that is swapped takes none of the options of the one it replaces.
    for section in ("model", "evaluation"):
        if section in swaps:
            source.data.pop(section, None)
            source.forget((section,))
    return Source(swaps, inside)


def validate(source: Source) -> Recipe:
    """Check a recipe's keys and values. Raises RecipeError naming each wrong one and its place."""
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(detail, source, Recipe) for detail in _one_per_key(error))) from None
    _require_plain(source.data, recipe, source)
    _check_options(recipe, source)
    return recipe


def _check_options(recipe: Recipe, source: Source) -> None:
    """Check the keys that belong to plug-ins, as far as those are installed, while their places are known."""
    from branchtree.plugins import registry

    found = registry()
    sections: list[tuple[KeyPath, PluginSection, Entry | None]] = [
        (("model",), recipe.model, found.models.get(recipe.model.adapter))
    ]
    held_out = recipe.evaluation.rewards if recipe.evaluation else ()
    lists: list[tuple[KeyPath, tuple[RewardSection, ...]]] = [
        (("rewards",), recipe.rewards),
        (("evaluation", "rewards"), held_out),
    ]
    for path, rewards in lists:
        sections += [((*path, i), section, found.rewards.get(section.reward)) for i, section in enumerate(rewards)]
    for place, callback in enumerate(recipe.callbacks):
        sections.append((("callbacks", place), callback, found.callbacks.get(callback.callback)))
    for path, section, entry in sections:
        if entry is not None:
            validate_options(entry.config, section.options, path, source)


def validate_options(
    config: type[BaseModel], options: Mapping[str, Any], at: KeyPath, source: Source | None = None
) -> BaseModel:
    """Check a plug-in's own keys, which stand in the section ``at``. Raises RecipeError naming each wrong one."""
    source = source or Source()
    try:
        checked = config.model_validate(dict(options))
    except ValidationError as error:
        details = [_explain(detail, source, config, at) for detail in _one_per_key(error)]
        raise RecipeError("\n".join(details)) from None
    _require_plain(options, checked, source, at)
    return checked


def _require_plain(given: Mapping[str, Any], checked: BaseModel, source: Source, at: KeyPath = ()) -> None:
    """Refuse what pydantic would bend to fit, and numbers that nothing can work with, in the section ``at``.

    A quoted number is no number, and neither is ``true``. Raises RecipeError naming each wrong key and its place.
    """
    problems = [
        f"{_where(source, (*at, *path))}{_dotted((*at, *path))}: {problem} (it is {_shown(value)})"
        for path, value, problem in _bent(given, checked, ())
    ]
    if problems:
        raise RecipeError("\n".join(problems))


def _bent(given: Any, checked: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any, str]]:
    """Yield each value of another kind than was asked for, or out of all bounds: its path, and what is wrong."""
    if isinstance(given, Mapping):
        entries: Iterator[tuple[str | int, Any]] = iter(given.items())
    elif isinstance(given, list | tuple):
        entries = iter(enumerate(given))
    else:
        if (expected := _expected(given, checked)) is not None:
            yield path, given, f"input should be {expected}"
        elif isinstance(given, int) and not -LARGEST <= given < LARGEST:
            yield path, given, "the number is too large"
        elif isinstance(given, float) and not math.isfinite(given):
            yield path, given, "the number should be finite"
        return
    for name, value in entries:
        inner = _inner(checked, name)
        if inner is not None:
            yield from _bent(value, inner, (*path, name))


def _inner(checked: Any, name: str | int) -> Any:
    """Return the entry of a section, mapping or list; None if it has no such one, or it is a plug-in's."""
    if isinstance(checked, BaseModel):
        return getattr(checked, str(name)) if name in type(checked).model_fields else None
    if isinstance(checked, Mapping):
        return checked.get(name)
    return checked[int(name)] if isinstance(checked, list | tuple) and int(name) < len(checked) else None


def _expected(given: Any, checked: Any) -> str | None:
    """Say what would have been right for a value that pydantic took for one of another kind; None if it did not."""
    if isinstance(checked, bool):
        return None if isinstance(given, bool) else "true or false, without quotes"
    if isinstance(checked, int | float) and isinstance(given, bool | str):
        return "a number, without quotes"
    return None


def _one_per_key(error: ValidationError) -> list[ErrorDetails]:
    """A union reports each of its members, a list its length beside its entries: the innermost message is enough."""
    first: dict[KeyPath, ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        first.setdefault(tuple(part for part in detail["loc"] if not _is_union_tag(part)), detail)
    return [
        detail
        for path, detail in first.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in first)
    ]


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and (part in {"int", "float", "str", "bool"} or "[" in part)


def _explain(detail: ErrorDetails, source: Source, root: type[BaseModel], at: KeyPath = ()) -> str:
    path: KeyPath = tuple(part for part in detail["loc"] if not _is_union_tag(part))
    key, where = _dotted((*at, *path)), _where(source, (*at, *path))
    if detail["type"] == "extra_forbidden":
        return f"{where}{key}: unknown key '{path[-1]}'{nearest(str(path[-1]), _fields(root, path[:-1]))}"
    if detail["type"] == "missing":
        return f"{where}{key}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    shown = f" (it is {_shown(value)})" if isinstance(value, str | int | float | bool | list | tuple | None) else ""
    return f"{where}{key}: {message[0].lower()}{message[1:]}{shown}"


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path) or "recipe"


def _where(source: Source, path: KeyPath) -> str:
    origin = source.origin(path)
    return f"{origin}: " if origin else ""


def _shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= VALUE_SHOWN else f"{text[: VALUE_SHOWN - 3]}..."


def _fields(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that the section at ``path`` knows."""
    for part in path:
        if isinstance(part, str):
            model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = [_section(part) for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    return sections[0]
