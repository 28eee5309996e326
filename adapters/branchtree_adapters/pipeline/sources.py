"""What the adapters of diffusers pipelines share: finding, reading, loading and counting their parts."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from branchtree.errors import ModelError, nearest, reason_of
from branchtree.files.checksums import verify_checksums
from branchtree.files.reading import user_path
from branchtree_adapters.pipeline.component_configs import read_json
from branchtree_adapters.pipeline.components import build_pipeline

BUNDLED = "bundled:"
Configs = Mapping[str, Mapping[str, Any]]
Built = TypeVar("Built")
ASSUMED = "assumed"
LORA_FILE = "pytorch_lora_weights.safetensors"


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
    """Tell a local folder, a model shipped with the package (``bundled:NAME``) and a hub id apart.

    A path that exists or begins with ``/``, ``./``, ``../`` or ``~`` is a folder; ``org/name`` is a hub id.
    Raises ModelError for a missing folder, an unknown bundled name, a revision of a folder, or anything else.
    """
    folder = user_path(path)
    if path.startswith(BUNDLED):
        folder = _bundled(path.removeprefix(BUNDLED))
    elif not os.path.exists(folder) and not path.startswith(("/", "./", "../", "~")):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            return ModelSource(path, None, revision)
        raise ModelError(
            f"model path '{path}' is neither an existing folder nor a hub id; "
            f"give a folder such as './my-model', a hub id such as 'org/name', or '{BUNDLED}NAME'."
        )
    if not os.path.isdir(folder):
        raise ModelError(f"model folder '{folder}' does not exist; give a folder written by save_pretrained.")
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"model folder '{folder}' holds no model_index.json; "
            "give the top folder of a complete diffusers pipeline, not one of its parts."
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


def read_configs(source: ModelSource, assumed: Configs, model: str) -> tuple[Configs, str]:
    """The contents of a pipeline's JSON files named by the keys of ``assumed``, and where they come from, in words.

    For a hub id that is not in the local cache, they are ``assumed`` itself, the configuration of ``model``.
    Raises ModelError for a file that is missing or not JSON.
    """
    from huggingface_hub import try_to_load_from_cache

    if source.folder is None:
        cached = [try_to_load_from_cache(source.name, name, revision=source.revision) for name in assumed]
        files = [Path(file) for file in cached if isinstance(file, str)]
        if len(files) < len(assumed):
            return assumed, f"{ASSUMED} to be those of {model}, since '{source.name}' is not in the local cache"
    else:
        files = [source.folder / name for name in assumed]
    if source.folder is not None:
        verify_checksums(source.folder, ModelError, assumed)
    configs = {name: read_json(file) for name, file in zip(assumed, files, strict=True)}
    return configs, f"configuration files of '{source.name}'"


def fetch_configs(source: ModelSource, names: Iterable[str]) -> None:
    """Download those of a hub id's JSON files that it has, so that it can be refused before its weights come.

    What cannot be had is left to the loading of weights, which says why.
    """
    from huggingface_hub import hf_hub_download

    for name in names if source.folder is None else ():
        with suppress(Exception):  # the hub's client has many exceptions for one matter
            hf_hub_download(source.name, name, revision=source.revision)


def is_assumed(path: str, origin: str, known: Iterable[str]) -> bool:
    """Whether figures are those of a model that ``path`` need not be, by where ``read_configs`` says they are from.

    ``known`` are hub ids whose sizes are the assumed ones.
    """
    return origin.startswith(ASSUMED) and path not in known


def on_meta(build: Callable[[], Built]) -> Built:
    """The modules ``build`` makes, without memory for weights. Raises ModelError if the configuration is wrong."""
    try:
        with torch.device("meta"):
            return build()
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the model's config.json describes no model that can be built: {error}") from error


def largest_block(denoiser: Any) -> int:
    """Parameters of what sharding gathers at a time: a block that a diffusers model names, or all the rest."""
    names = denoiser._no_split_modules or ()
    blocks = [count_parameters(part) for part in denoiser.modules() if type(part).__name__ in names]
    return max([count_parameters(denoiser) - sum(blocks), *blocks])


def count_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of ``module``, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def load_pipeline(
    pipeline: Any,
    source: ModelSource,
    dtype: torch.dtype,
    others: Mapping[str, torch.dtype],
    without: Iterable[str] = (),
) -> Any:
    """Load ``pipeline`` (a diffusers class) on the CPU from safetensors files, with no code from the source.

    Its parts are in ``dtype``, but for those that ``others`` names. The files of the parts named in ``without`` are
    neither read nor downloaded; the pipeline has None in their place. Raises ModelError.
    """
    absent = tuple(without)
    with no_progress_bars() if source.folder else nullcontext():
        folder = source.folder or _download(pipeline, source, absent)
        try:
            loaded = build_pipeline(pipeline, folder, dtype, others, absent)
        except Exception as error:  # every library below has exceptions of its own for a file that is not right
            raise ModelError(f"cannot load '{source.location}': {reason_of(error)}") from error
    loaded.register_to_config(_name_or_path=source.location)
    return loaded


def _download(pipeline: Any, source: ModelSource, without: Iterable[str]) -> Path:
    """Return the folder of a hub id's files, downloaded but for some components. Raises ModelError."""
    try:
        absent = dict.fromkeys(without)
        return Path(pipeline.download(source.name, revision=source.revision, use_safetensors=True, **absent))
    except Exception as error:  # the hub's client has many exceptions for one matter
        raise ModelError(
            f"cannot load '{source.location}' ({type(error).__name__}: {error}); check the hub id, the network and, "
            "for a gated model, that its licence is accepted on its page and that you are logged in (hf auth login), "
            "or download the model and give its folder."
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """A context without the progress bars of diffusers and transformers, which say nothing about local files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    try:
        for library in libraries:
            library.disable_progress_bar()
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@torch.no_grad()
def own_storage(module: nn.Module, device: torch.device) -> None:
    """Copy every parameter and buffer of ``module`` to memory of its own on ``device``.

    Weights mapped from a file may be unaligned, which changes the last bits of what is computed from them.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data = tensor.detach().to(device, copy=True)


@torch.no_grad()
def channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions over images and videos out with channels last, which a CPU is fastest in."""
    layouts = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for part in module.modules():
        for kind, layout in layouts.items():
            if isinstance(part, kind):
                part.weight.data = part.weight.detach().contiguous(memory_format=layout)


def on_device(module: Any, device: torch.device) -> Any:
    """Move ``module`` (a diffusers or transformers model) to ``device`` unless it is there: asking costs much less."""
    return module if module.device == device else module.to(device)


def require_multiple(name: str, size: int, multiple: int, offset: int = 0) -> None:
    """Raise ModelError, naming the nearest sizes, unless ``size`` is ``offset`` plus a multiple of ``multiple``."""
    steps = (size - offset) // multiple
    if size != offset + steps * multiple:
        near = " or ".join(str(offset + n * multiple) for n in (steps, steps + 1) if offset + n * multiple > 0)
        rule = f"{offset} plus a multiple" if offset else "a multiple"
        raise ModelError(f"{name} {size} is not {rule} of {multiple}; the nearest sizes are {near}.")
