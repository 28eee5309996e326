"""Loads a recipe: finds its file, merges ``extends``, applies overrides, and validates with file and line."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from branchtree.errors import RecipeError, nearest, shortened, shown
from branchtree.files.reading import require_file, user_path
from branchtree.recipe.paths import make_absolute
from branchtree.recipe.schema import PluginSection, Recipe, RewardSection
from branchtree.recipe.source import KeyPath, Origin, Source, override, read_yaml

if TYPE_CHECKING:
    from branchtree.plugins.registry import Entry

SUFFIXES = (".yaml", ".yml")
METHOD_SIGN = "+"
METHODS = "methods"  # the folder beside recipes with the keys of each method
LARGEST = 2**63
"""Integers below this fit into tensors and files."""
SHOWN = 20
"""The most mistakes, or steps of a circle, that one message lists."""


def load_recipe(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    smoke: bool = False,
    folders: Sequence[Path] | None = None,
) -> Recipe:
    """Load a recipe by name or YAML path; ``quickstart+mixgrpo`` is ``quickstart`` under that method's settings.

    Args:
        recipe: A name or path, and methods; or a loaded recipe, of which a copy is made.
        overrides: Values by dotted key; of a loaded recipe they replace those that it has.
        smoke: Whether to apply the recipe's ``smoke`` section, with its small model and rewards.
        folders: Where names are looked up; by default the library's folder and those of installed plug-ins.

    Returns:
        The recipe with absolute paths: in a file they are relative to its folder, in an override to the working
        directory.

    Raises:
        RecipeError: Something is wrong; the message has file and line.
    """
    if isinstance(recipe, Recipe):
        if smoke:
            raise TypeError("a loaded recipe takes no smoke: give it to load_recipe with the recipe's name or path")
        # As it was given: values that follow from other keys then follow from the overrides too.
        source = Source(recipe.model_dump(mode="json", exclude_unset=True))
    else:
        source = _read(recipe, smoke, folders)
    override(source, overrides or {})
    make_absolute(source)
    return validate(source)


def load_base(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None, smoke: bool) -> Recipe | None:
    """Return a named recipe without the methods after its name, its own tree and sampler not overridden.

    None for a recipe without methods, and where the overrides do not suit it alone.
    """
    base, methods = ("", []) if isinstance(recipe, Recipe) else split_methods(str(recipe))
    if not methods:
        return None
    kept = {key: value for key, value in (overrides or {}).items() if not key.startswith(("tree", "sampler"))}
    try:
        return load_recipe(base, kept, smoke)
    except RecipeError:
        return None


def resolve_recipe(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None, smoke: bool) -> Recipe:
    """Load a recipe, or return a loaded one as it is. Raises TypeError for overrides or smoke of a loaded one."""
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, smoke=smoke)
    if overrides or smoke:
        raise TypeError("a loaded recipe takes neither overrides nor smoke: give them to load_recipe")
    return recipe


def _read(recipe: str | Path, smoke: bool, folders: Sequence[Path] | None) -> Source:
    """Read a recipe's file, what it extends, and the methods that it is put under."""
    base, methods = split_methods(str(recipe))
    source = _extended(find_recipe(base, folders), folders)
    for method in methods:
        name, description = source.data["name"], source.data["description"]
        source.update(_extended(find_method(method, folders), folders))
        source.data["name"] = f"{name}{METHOD_SIGN}{method}"
        source.data["description"] = f"{description}; {source.data['description']}"
    swaps = source.data.pop("smoke", None)
    if smoke:
        source.update(_smoke(swaps, source, recipe))
    source.origins = {path: origin for path, origin in source.origins.items() if path[:1] != ("smoke",)}
    return source


def recipe_folders() -> list[Path]:
    """Return the folder of the library's recipes, then those of plug-ins."""
    from branchtree.plugins.registry import registry

    return [builtin_folder(), *registry().recipe_folders]


def _plugin_failures() -> str:
    from branchtree.plugins.registry import registry

    return registry().failures


def builtin_folder() -> Path:
    """Return the folder of the library's recipes: in the installed package, or beside it in an editable install."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Return the file of every recipe that can be named, by name. Raises RecipeError if two have one name."""
    names: dict[str, Path] = {}
    for folder in recipe_folders() if folders is None else folders:
        for path in sorted(path for path in folder.glob("*.yaml") if path.is_file()):
            if path.stem in names:
                raise RecipeError(f"two recipes are named '{path.stem}': {names[path.stem]} and {path}")
            names[path.stem] = path
    return names


def find_recipe(recipe: str | Path, folders: Sequence[Path] | None = None) -> Path:
    """Return the file of a recipe given by name or path. Raises RecipeError."""
    path = user_path(recipe)
    if path.suffix in SUFFIXES:
        require_file(path, RecipeError(f"no recipe file {path}"))
        return path
    names = recipe_names(folders)
    if str(recipe) not in names:
        failures = _plugin_failures() if folders is None else ""
        hint = nearest(shortened(str(recipe)), names)
        raise RecipeError(f"no recipe '{shortened(str(recipe))}'{hint} A path must end in .yaml.{failures}")
    return names[str(recipe)]


def split_methods(recipe: str) -> tuple[str, list[str]]:
    """Return a recipe's name or path, and its methods; a path itself may contain the sign, as a run's folder does."""
    base, methods = recipe, list[str]()
    while METHOD_SIGN in base and not base.endswith(SUFFIXES):
        base, _, method = base.rpartition(METHOD_SIGN)
        methods.insert(0, method)
    return base, methods


def method_names(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Return the file of every method that a recipe can be combined with, by name."""
    return recipe_names([folder / METHODS for folder in (recipe_folders() if folders is None else folders)])


def find_method(method: str, folders: Sequence[Path] | None = None) -> Path:
    """Return the file of a method given by name. Raises RecipeError."""
    names = method_names(folders)
    if method not in names:
        raise RecipeError(f"no method '{shortened(method)}'{nearest(shortened(method), names)}")
    return names[method]


def _extended(path: Path, folders: Sequence[Path] | None) -> Source:
    """Return a file merged over the files that it extends; each file is read once."""
    files: dict[Path, tuple[Path, Source, list[Path]]] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file.resolve() not in files:
            source = read_yaml(file)
            files[file.resolve()] = (file, source, _bases(source, file, folders))
            waiting += files[file.resolve()][2]
    graph = {resolved: [base.resolve() for base in bases] for resolved, (_, _, bases) in files.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = [str(step) for step in reversed(error.args[1])]
        shown_steps = circle if len(circle) <= SHOWN else [*circle[: SHOWN - 1], "...", circle[-1]]
        raise RecipeError(f"{path}: extends itself through {' -> '.join(shown_steps)}") from None
    merged: dict[Path, Source] = {}
    for resolved in order:
        merged[resolved] = _over_bases(*files[resolved][:2], [merged[base] for base in graph[resolved]])
    return merged[path.resolve()]


def _over_bases(path: Path, source: Source, bases: Sequence[Source]) -> Source:
    """Return one file's keys merged over those of the files that it extends."""
    whole = Source()
    for base in bases:
        whole.update(copy.deepcopy(base))  # several files may extend it
    whole.update(source)
    whole.origins[()] = Origin(str(path), path.parent)
    # A recipe's name and description are its own; a base's would be wrong for it.
    for key, default in (("name", path.stem), ("description", "")):
        whole.data[key] = source.data.get(key, default)
        if not isinstance(whole.data[key], str):
            raise RecipeError(f"{whole.origin((key,))}: {key}: write a text (it is {shown(whole.data[key])})")
    return whole


def _bases(source: Source, path: Path, folders: Sequence[Path] | None) -> list[Path]:
    """Return the files that a recipe extends; a relative path is relative to the recipe's own folder."""
    origin, bases = source.origin(("extends",)), source.data.pop("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{origin}: extends: write a recipe's name or path, or a list of them (it is {shown(bases)})")
    files = []
    try:
        for name in names:
            base, methods = split_methods(name)
            files.append(find_recipe(path.parent / user_path(base) if base.endswith(SUFFIXES) else base, folders))
            files += [find_method(method, folders) for method in methods]
        return files
    except RecipeError as error:
        raise RecipeError(f"{origin}: extends: {error}") from None


def _smoke(swaps: Any, source: Source, recipe: str | Path) -> Source:
    if not isinstance(swaps, dict):
        raise RecipeError(f"recipe '{recipe}' has no 'smoke' section: it has no small version")
    inside = {path[1:]: origin for path, origin in source.origins.items() if path[:1] == ("smoke",) and len(path) > 1}
    # A model or reward of the smoke section gets none of the options of the one that it replaces.
    for section in ("model", "evaluation"):
        if section in swaps:
            source.data.pop(section, None)
            source.forget((section,))
    return Source(swaps, inside)


def validate(source: Source) -> Recipe:
    """Check a recipe's keys and values. Raises RecipeError that names each wrong one with file and line."""
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError(_explain_all(error, source.data, source, Recipe)) from None
    _require_plain(source.data, recipe, source)
    _check_options(recipe, source)
    return recipe


def _check_options(recipe: Recipe, source: Source) -> None:
    """Check the keys of installed plug-ins, while the file and line of each key are known."""
    from branchtree.plugins.registry import registry

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
    for index, callback in enumerate(recipe.callbacks):
        sections.append((("callbacks", index), callback, found.callbacks.get(callback.callback)))
    for path, section, entry in sections:
        if entry is not None:
            validate_options(entry.config, section.options, path, source)


def validate_options(
    config: type[BaseModel], options: Mapping[str, Any], at: KeyPath, source: Source | None = None
) -> BaseModel:
    """Check a plug-in's own keys, those of the section ``at``. Raises RecipeError that names each wrong one."""
    source = source or Source()
    try:
        checked = config.model_validate(dict(options))
    except ValidationError as error:
        raise RecipeError(_explain_all(error, options, source, config, at)) from None
    _require_plain(options, checked, source, at)
    return checked


def _require_plain(given: Mapping[str, Any], checked: BaseModel, source: Source, at: KeyPath = ()) -> None:
    """Refuse values in the section ``at`` that pydantic converts silently, and numbers that cannot be used.

    A quoted number is not a number here, and neither is ``true``. Raises RecipeError that names each wrong key.
    """
    problems = [
        f"{_where(source, (*at, *path))}{_dotted((*at, *path))}: {problem} (it is {shown(value)})"
        for path, value, problem in _bent(given, checked, ())
    ]
    if problems:
        raise RecipeError(_listed(problems))


def _bent(given: Any, checked: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any, str]]:
    """Yield the path of each value of the wrong type or out of all bounds, the value, and what is wrong."""
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
    """Return the entry of a section, mapping or list; None if there is none, or if it belongs to a plug-in."""
    if isinstance(checked, BaseModel):
        return getattr(checked, str(name)) if name in type(checked).model_fields else None
    if isinstance(checked, Mapping):
        return checked.get(name)
    return checked[int(name)] if isinstance(checked, list | tuple) and int(name) < len(checked) else None


def _expected(given: Any, checked: Any) -> str | None:
    """Say what would be right for a value that pydantic converted to another type; None if it did not."""
    if isinstance(checked, bool):
        return None if isinstance(given, bool) else "true or false, without quotes"
    if isinstance(checked, int | float) and isinstance(given, bool | str):
        return "a number, without quotes"
    return None


def _explain_all(
    error: ValidationError, data: Mapping[str, Any], source: Source, root: type[BaseModel], at: KeyPath = ()
) -> str:
    """Return a line for each wrong key, or for the first of very many.

    A union reports an error for each member, and a list for its length and its entries: the innermost one is kept.
    """
    first: dict[KeyPath, ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        first.setdefault(_written_path(detail["loc"], data), detail)
    outer = {path[:length] for path in first for length in range(len(path))}
    wrong = [path for path in first if path not in outer]
    return _listed([_explain(first[path], path, source, root, at) for path in wrong])


def _listed(problems: Sequence[str]) -> str:
    """Return a line for each problem, or for the first of very many."""
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join([*problems[:SHOWN], *more])


def _written_path(location: KeyPath, data: Any) -> KeyPath:
    """Return the key path of an error, without the union members that pydantic puts between the keys."""
    path: KeyPath = ()
    for key in location:
        written = key in data if isinstance(data, Mapping) else False
        if written or isinstance(key, int) or not (key in {"int", "float", "str", "bool"} or "[" in key):
            path = (*path, key)
            entry = isinstance(data, Sequence) and isinstance(key, int) and key < len(data)
            data = data[key] if written or entry else None
    return path


def _explain(detail: ErrorDetails, path: KeyPath, source: Source, root: type[BaseModel], at: KeyPath) -> str:
    key, where = _dotted((*at, *path)), _where(source, (*at, *path))
    if detail["type"] == "extra_forbidden":
        name = shortened(str(path[-1]))
        return f"{where}{key}: unknown key '{name}'{nearest(name, _fields(root, path[:-1]))}"
    if detail["type"] == "missing":
        return f"{where}{key}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    given = f" (it is {shown(value)})" if isinstance(value, str | int | float | bool | list | tuple | None) else ""
    return f"{where}{key}: {message[:1].lower()}{message[1:]}{given}"


def _dotted(path: KeyPath) -> str:
    return shortened(".".join(map(str, path))) or "recipe"


def _where(source: Source, path: KeyPath) -> str:
    origin = source.origin(path)
    return f"{origin}: " if origin else ""


def _fields(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the known keys of the section at ``path``; none if the section is not known."""
    section: type[BaseModel] | None = model
    for key in path:
        if isinstance(key, str):
            field = section.model_fields.get(key) if section else None
            section = _section(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for section in map(_section, get_args(annotation)) if section), None)
