"""A pipeline as its configuration files describe it: which components have weights, and how large they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from branchtree.errors import ModelError
from branchtree_adapters.pipeline.components import (
    INDEX,
    component_class,
    is_of_transformers,
    is_present,
    left_out,
    not_named,
    wanted_classes,
)
from branchtree_adapters.pipeline.sources import CHECK_HUB, Configs, ModelSource, fetch_configs, read_configs

TRANSFORMER, VAE = "transformer/config.json", "vae/config.json"
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}


@dataclass(frozen=True)
class Published:
    """A published model whose configuration files stand for those of a hub id that is not in the local cache."""

    name: str
    configs: Configs
    alike: tuple[str, ...] = ()  # hub ids whose sizes are the same
    source: str = ""  # where the configuration comes from, if a reader has to know


@dataclass(frozen=True)
class Blueprint:
    """The configuration files of a pipeline, by name, and the classes of its components with weights."""

    classes: Mapping[str, Any]
    configs: Configs  # of diffusers' classes with the defaults of these
    origin: str  # where the files come from, in words
    assumed: bool  # whether they are those of another model
    denoisers: tuple[str, ...] = ("transformer",)  # components that are trained

    @property
    def encoders(self) -> list[str]:
        """Names of the components that ``encode`` alone needs."""
        return [name for name in self.classes if name not in {*self.denoisers, "vae"}]

    def build(self, name: str) -> Any:
        """Return a component with fresh weights. Raises ModelError if its config.json describes none."""
        kind, config = self.classes[name], dict(self.configs[f"{name}/config.json"])
        with described():
            return kind(kind.config_class.from_dict(config)) if is_of_transformers(kind) else kind.from_config(config)

    def with_loaded(self, pipeline: Any) -> Blueprint:
        """Return the blueprint with the configuration of components that were loaded."""
        loaded = {f"{name}/config.json": getattr(pipeline, name).config for name in (*self.denoisers, "vae")}
        return replace(self, configs={**self.configs, **loaded}, assumed=False)


def read_blueprint(
    pipeline: Any,
    source: ModelSource,
    denoisers: tuple[str, ...],
    others: Sequence[str],
    published: Published | None,
    *,
    fetch: bool = False,
) -> Blueprint:
    """Read the configuration files of ``pipeline``, a diffusers class.

    Args:
        pipeline: The class.
        source: Where the files are.
        denoisers: The components that are trained.
        others: JSON files to read beside those of components with weights.
        published: What is assumed of a hub id that is not in the local cache.
        fetch: Whether to download the files of a hub id; they are also where nothing is assumed.

    Raises:
        ModelError: A file is missing or not JSON, or a class is not one that the pipeline takes.
    """

    index = read_index(source, published, fetch=fetch)
    classes = _classes(pipeline, index, denoisers, f"'{source.location}/{INDEX}'")
    names = [*(f"{name}/config.json" for name in classes), *others]
    described = read_described(source, names, published, fetch=fetch)
    ours = {f"{name}/config.json": kind for name, kind in classes.items() if not is_of_transformers(kind)}
    filled = {name: {**class_defaults(kind), **described.configs[name]} for name, kind in ours.items()}
    configs = {**described.configs, INDEX: index, **filled}
    return Blueprint(classes, configs, described.origin, described.assumed, denoisers)


@dataclass(frozen=True)
class Described:
    """Configuration files, by name, and where they come from; see Blueprint."""

    configs: Configs
    origin: str
    assumed: bool


def read_index(source: ModelSource, published: Published | None, *, fetch: bool = False) -> Mapping[str, Any]:
    """Return the model_index.json of a source, over what is published; see read_blueprint. Raises ModelError."""
    known = {} if published is None else published.configs
    return {**known, **(_read(source, [INDEX], published, fetch) or {})}.get(INDEX, {})


def read_described(
    source: ModelSource, names: Sequence[str], published: Published | None, *, fetch: bool = False
) -> Described:
    """Read other configuration files by name, or take the published ones; see read_blueprint. Raises ModelError."""
    configs = _read(source, names, published, fetch)
    if configs is not None:
        return Described(configs, f"configuration files of '{source.name}'", False)
    if published is None:
        raise ModelError(f"the configuration files of '{source.name}' cannot be read; {CHECK_HUB}.")
    origin = f"assumed to be those of {published.name}, since '{source.name}' is not in the local cache"
    origin += f" (from {published.source})" if published.source else ""
    configs = {**{name: {} for name in names}, **published.configs}
    return Described(configs, origin, source.name not in published.alike)


def _read(source: ModelSource, names: Sequence[str], published: Published | None, fetch: bool) -> Configs | None:
    if fetch or published is None:
        fetch_configs(source, names)
    return read_configs(source, names)


def _classes(pipeline: Any, index: Mapping[str, Any], denoisers: Sequence[str], where: str) -> dict[str, Any]:
    """Return the classes of the components with weights that a model_index.json names, or the pipeline asks for.

    The denoisers come first.
    """
    classes: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        if name in left_out(pipeline):
            continue
        required = parameter.default is parameter.empty or name in denoisers
        present = is_present(index.get(name))
        kinds = [component_class(pipeline, name, index[name], where)] if present else wanted_classes(pipeline, name)
        if not (present or required) or not any(issubclass(kind, nn.Module) for kind in kinds):
            continue
        if not present and name in index:
            raise not_named(pipeline, name, where)
        classes[name] = kinds[0]
    return {**{name: classes.pop(name) for name in denoisers}, **classes}


def class_defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a class's constructor, by argument."""
    parameters = inspect.signature(kind.__init__).parameters.items()
    return {name: one.default for name, one in parameters if one.default is not one.empty}


@contextmanager
def described() -> Iterator[None]:
    """Raise ModelError for what goes wrong with the contents of a config.json."""
    try:
        yield
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the model's config.json describes no model that can be built: {error}") from error


def largest_block(denoiser: Any) -> int:
    """Return the parameters of what sharding gathers at a time: a block that a model names, or all the rest."""
    names = denoiser._no_split_modules or ()
    blocks = [count_parameters(module) for module in denoiser.modules() if type(module).__name__ in names]
    return max([count_parameters(denoiser) - sum(blocks), *blocks])


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers the parameters of ``module`` hold, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def require_multiple(name: str, size: int, multiple: int, offset: int = 0) -> None:
    """Raise ModelError, naming the nearest sizes, unless ``size`` is ``offset`` plus a multiple of ``multiple``."""
    steps = (size - offset) // multiple
    if size != offset + steps * multiple:
        near = " or ".join(str(offset + n * multiple) for n in (steps, steps + 1) if offset + n * multiple > 0)
        rule = f"{offset} plus a multiple" if offset else "a multiple"
        raise ModelError(f"{name} {size} is not {rule} of {multiple}; the nearest sizes are {near}.")
