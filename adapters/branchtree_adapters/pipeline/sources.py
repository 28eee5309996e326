"""Where a pipeline's files are: a folder, a model shipped with the package, or the hub; and loading it from there."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from branchtree.errors import ModelError, nearest, reason_of
from branchtree.files.checksums import verify_checksums
from branchtree.files.names import has_hub_form
from branchtree.files.reading import user_path
from branchtree_adapters.pipeline.component_configs import read_json
from branchtree_adapters.pipeline.components import INDEX, build_pipeline, left_out, load_components, quiet

BUNDLED, SMALL = "bundled:", "small:"
Configs = Mapping[str, Mapping[str, Any]]
CHECK_HUB = (
    "check the hub id, the network and, for a gated model, that its licence is accepted on its page and that you are "
    "logged in (hf auth login), or download the model and give its folder"
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a local folder, or a hub id where ``folder`` is None."""

    name: str
    folder: Path | None
    revision: str | None = None

    @property
    def location(self) -> str:
        """What ``from_pretrained`` is given."""
        return self.name if self.folder is None else str(self.folder)


def locate_pipeline(path: str, revision: str | None = None) -> ModelSource:
    """Tell a local folder, a hub id, and models that come with the package apart.

    ``bundled:NAME`` is a trained model, ``small:NAME`` one with random weights. A path that exists or begins with
    ``/``, ``./``, ``../`` or ``~`` is a folder; ``org/name`` is a hub id. Raises ModelError for a missing folder, an
    unknown name, a revision of a folder, or anything else.
    """
    folder = user_path(path)
    if path.startswith(BUNDLED):
        folder = _bundled(path.removeprefix(BUNDLED))
    elif path.startswith(SMALL):
        folder = _small(path.removeprefix(SMALL))
    elif not os.path.exists(folder) and not path.startswith(("/", "./", "../", "~")):
        if has_hub_form(path):
            return ModelSource(path, None, revision)
        raise ModelError(
            f"model path '{path}' is neither an existing folder nor a hub id; "
            f"give a folder such as './my-model', a hub id such as 'org/name', '{BUNDLED}NAME' or '{SMALL}NAME'."
        )
    if not os.path.isdir(folder):
        raise ModelError(f"model folder '{folder}' does not exist; give a folder written by save_pretrained.")
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"model folder '{folder}' holds no model_index.json; "
            "give the top folder of a complete diffusers pipeline, not one of its components."
        )
    if revision is not None:
        raise ModelError(f"revision '{revision}' belongs to a hub id, and '{path}' is a folder; remove it.")
    return ModelSource(path, folder)


def _bundled(name: str) -> Path:
    assets = resources.files("branchtree_adapters") / "assets"
    known = [entry.name for entry in assets.iterdir() if entry.is_dir()] if assets.is_dir() else []
    if name not in known:
        raise ModelError(f"no model '{name}' is bundled{nearest(name, known)}")
    return Path(str(assets / name))


@cache
def _small(name: str) -> Path:
    """Write a small pipeline to a folder that is there until the process ends."""
    from branchtree_adapters.small.pipelines import PIPELINES

    if name not in PIPELINES:
        raise ModelError(f"no small model is named '{name}'{nearest(name, PIPELINES)}")
    folder = tempfile.TemporaryDirectory(prefix=f"branchtree_small_{name}_")
    atexit.register(folder.cleanup)
    pipeline = PIPELINES[name].build()
    for component in pipeline.components.values():
        if hasattr(component, "should_save_on_this_rank"):  # transformers would have the first process alone write
            component.should_save_on_this_rank = lambda is_main_process: True
    with quiet():
        pipeline.save_pretrained(folder.name)
    return Path(folder.name)


def read_configs(source: ModelSource, names: Sequence[str]) -> Configs | None:
    """Return the contents of a pipeline's JSON files by name; None if one of a hub id's is not in the local cache.

    Raises ModelError for a file that is missing in a folder, is not as its digest says, or is not JSON.
    """
    if source.folder is not None:
        verify_checksums(source.folder, ModelError, names)
        files = [source.folder / name for name in names]
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(source.name, name, revision=source.revision) for name in names]
        files = [Path(file) for file in cached if isinstance(file, str)]
    return (
        {name: read_json(file) for name, file in zip(names, files, strict=True)} if len(files) == len(names) else None
    )


def fetch_configs(source: ModelSource, names: Sequence[str]) -> None:
    """Download those of a hub id's JSON files that it has, so that it can be refused before its weights come.

    What cannot be had is left to the loading of weights, which says why.
    """
    from huggingface_hub import hf_hub_download

    for name in names if source.folder is None else ():
        with suppress(Exception):  # the hub's client has many exceptions for one matter
            hf_hub_download(source.name, name, revision=source.revision)


def load_pipeline(
    pipeline: Any, source: ModelSource, dtypes: Mapping[str, torch.dtype], without: Collection[str] = ()
) -> Any:
    """Load ``pipeline`` (a diffusers class) on the CPU from safetensors files, with no code from the source.

    ``dtypes`` are those of components by name, and of all others under ``default``. The files of components named in
    ``without`` are neither read nor downloaded; the pipeline has None in their place. Raises ModelError.
    """
    folder = source.folder or _download(pipeline, source, without)
    with _loading(source):
        loaded = build_pipeline(pipeline, folder, dtypes, without)
    loaded.register_to_config(_name_or_path=source.location)
    return loaded


def load_some(
    pipeline: Any, source: ModelSource, dtypes: Mapping[str, torch.dtype], without: Collection[str]
) -> dict[str, Any]:
    """Load the components of ``pipeline`` but for those named in ``without``, by name; see load_pipeline.

    Without the pipeline itself, which may need the others to be made.
    """
    folder = source.folder or _download(pipeline, source, without)
    with _loading(source):
        return load_components(pipeline, folder, dtypes, without)


@contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every library below has exceptions of its own for a file that is not right
        raise ModelError(f"cannot load '{source.location}': {reason_of(error)}") from error


def _download(pipeline: Any, source: ModelSource, without: Collection[str]) -> Path:
    """Return the folder of a hub id's files, downloaded but for some components. Raises ModelError."""
    try:
        absent = dict.fromkeys([*without, *left_out(pipeline)])
        return Path(pipeline.download(source.name, revision=source.revision, use_safetensors=True, **absent))
    except Exception as error:  # the hub's client has many exceptions for one matter
        raise ModelError(f"cannot load '{source.location}' ({type(error).__name__}: {error}); {CHECK_HUB}.") from error


def pinned(source: ModelSource) -> ModelSource:
    """Return the source at the commit that the local cache holds, whatever the hub has by now."""
    commit = cached_commit(source)
    return source if commit is None else replace(source, revision=commit)


def cached_commit(source: ModelSource) -> str | None:
    """Return the commit of a hub id in the local cache; None for a folder, or where it is not there."""
    if source.folder is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.name, INDEX, revision=source.revision)
    return Path(file).parent.name if isinstance(file, str) else None
