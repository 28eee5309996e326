"""Loading the components of a diffusers pipeline strictly: what the libraries would fill in silently is refused."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from branchtree.core.finite import is_finite
from branchtree.errors import ModelError, nearest
from branchtree.files.checksums import verify_checksums
from branchtree.plugins.completeness import unexpected_keys
from branchtree_adapters.pipeline.component_configs import (
    INCOMPLETE,
    check_config,
    check_image_processor,
    check_scheduler,
    read_json,
)
from branchtree_adapters.pipeline.tokenizers import check_tokenizer, check_tokenizer_files

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes a model_index.json may name; no other code is run."""
ANY_TOKENIZER = ("AutoTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that stand for a tokenizer of whatever kind."""
SHOWN = 3


@dataclass(frozen=True)
class Component:
    """One component of a pipeline: its name, the class that model_index.json gives for it, and its folder."""

    name: str
    kind: Any
    folder: Path

    @property
    def is_model(self) -> bool:
        """Return whether it has weights."""
        return issubclass(self.kind, nn.Module)


def build_pipeline(pipeline: Any, folder: Path, dtypes: Mapping[str, torch.dtype], without: Collection[str]) -> Any:
    """Build ``pipeline`` (a diffusers class) from a folder, on the CPU.

    Args:
        pipeline: The class.
        folder: Its files, as ``save_pretrained`` writes them.
        dtypes: Those of its models by the component's name, and of all others under ``default``.
        without: Components whose files are not read; the pipeline has None for them.

    Raises:
        ModelError: A file is missing or damaged, or the weights do not account for every tensor of their model.
    """
    loaded = load_components(pipeline, folder, dtypes, without)
    index, parameters = read_json(folder / INDEX), _parameters(pipeline)
    named = {name: index[name] for name in parameters if name in index}
    settings = {name: entry for name, entry in named.items() if not is_component(entry)}
    absent = dict.fromkeys(name for name in parameters if is_component(index.get(name)) or name in without)
    return pipeline(**{**settings, **absent, **loaded, **left_out(pipeline)})


def _parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(pipeline.__init__).parameters.items())[1:])


def load_components(
    pipeline: Any, folder: Path, dtypes: Mapping[str, torch.dtype], without: Collection[str]
) -> dict[str, Any]:
    """Load the components of ``pipeline`` by name, but for those named in ``without``; see build_pipeline."""
    verify_checksums(folder, ModelError, [INDEX])
    index, parameters, skipped = read_json(folder / INDEX), _parameters(pipeline), left_out(pipeline)
    entries = {name: index[name] for name in parameters if is_present(index.get(name)) and name not in skipped}
    found = [_component(pipeline, name, entry, folder) for name, entry in entries.items()]
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    required |= {"transformer"} & parameters.keys()  # optional to some, which then run without their first denoiser
    for name in [name for name in parameters if name in required and name not in skipped]:
        if name not in {component.name for component in found}:
            raise not_named(pipeline, name, f"'{folder / INDEX}'")
    read = [component for component in found if component.name not in without]
    verify_checksums(folder, ModelError, [component.name for component in read])
    loaded = {each.name: load_component(each, dtypes.get(each.name, dtypes["default"])) for each in read}
    for component in read:
        _check_against_encoder(component, loaded[component.name])
    return loaded


def left_out(pipeline: Any) -> dict[str, Any]:
    """Return what a pipeline is given in place of components that are never loaded.

    They are those by which Stable Diffusion blackens samples.
    """
    if "requires_safety_checker" not in inspect.signature(pipeline.__init__).parameters:
        return {}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _check_against_encoder(component: Component, loaded: Any) -> None:
    """Refuse a tokenizer or image processor that does not fit its encoder, by the encoder's config.json.

    Raises ModelError. An encoder that is not downloaded yet is looked at when it is read.
    """
    encoder = component.name.replace("tokenizer", "text_encoder").replace("image_processor", "image_encoder")
    file = component.folder.parent / encoder / "config.json"
    config = read_json(file) if encoder != component.name and file.is_file() else {}
    if component.name.startswith("tokenizer"):
        check_tokenizer(loaded, component.folder, config.get("text_config", config))
    elif component.name == "image_processor":
        check_image_processor(loaded, component.folder, config.get("vision_config", config))


def is_component(entry: Any) -> bool:
    """Return whether an entry of a model_index.json is of a component, there or not, and no setting."""
    pair = isinstance(entry, list | tuple) and len(entry) == 2
    return pair and all(word is None or isinstance(word, str) for word in entry)


def is_present(entry: Any) -> bool:
    """Return whether an entry of a model_index.json names a component's class, not null or a list of two nulls."""
    return is_component(entry) and None not in entry


def _component(pipeline: Any, name: str, entry: Any, folder: Path) -> Component:
    kind = component_class(pipeline, name, entry, f"'{folder / INDEX}'")
    if not (folder / name).is_dir():
        raise ModelError(f"'{folder}' has no folder '{name}', which its {INDEX} names; {INCOMPLETE}.")
    return Component(name, kind, folder / name)


def not_named(pipeline: Any, name: str, index: str) -> ModelError:
    """Make the error for a file ``index`` that names no class for a component that the pipeline needs."""
    return ModelError(f"{index} names no {name}, which {pipeline.__name__} needs; {INCOMPLETE}.")


def component_class(pipeline: Any, name: str, entry: Any, index: str) -> Any:
    """Return the class that an entry of the file ``index`` names. Raises ModelError for one of another kind."""
    library, kind_name = entry
    where = f"{index} names {library}.{kind_name} for {name}"
    kind = getattr(_library(library, where), kind_name, None)
    wanted = {each.__name__ for each in wanted_classes(pipeline, name)}
    if not inspect.isclass(kind):
        raise ModelError(f"{where}, and {library} has no such class{nearest(kind_name, wanted)}")
    if wanted and not _suits(name, kind, wanted):
        raise ModelError(f"{where}, and {pipeline.__name__} takes {' or '.join(sorted(wanted))}; {INCOMPLETE}.")
    return kind


def _library(name: str, where: str) -> Any:
    """Return a library's module, or that of a pipeline of diffusers, which may have models of its own."""
    import diffusers.pipelines

    if name in LIBRARIES:
        return importlib.import_module(name)
    own = getattr(diffusers.pipelines, name, None)
    if not inspect.ismodule(own):
        raise ModelError(f"{where}; only classes of {' and '.join(LIBRARIES)} are loaded.")
    return own


def wanted_classes(pipeline: Any, name: str) -> list[Any]:
    """Return the classes that a pipeline's annotation gives for a component."""
    hint = typing.get_type_hints(pipeline.__init__).get(name)
    return [each for each in (typing.get_args(hint) or (hint,)) if inspect.isclass(each) and each is not type(None)]


def _suits(name: str, kind: Any, wanted: set[str]) -> bool:
    """Whether a class is of the kind that a pipeline wants; schedulers may be others, and tokenizers fast or not."""
    lineage = {each.__name__ for each in kind.__mro__}
    if name.startswith("scheduler"):
        return "SchedulerMixin" in lineage
    if name.startswith("tokenizer"):
        plain = {each.removesuffix("Fast") for each in lineage | {kind.__name__}}
        families = {each.removesuffix("Fast") for each in wanted}
        return "AutoTokenizer" in wanted or kind.__name__ in ANY_TOKENIZER or bool(plain & families)
    if name.endswith("_processor"):
        return any("ImageProcess" in each for each in lineage)
    if name == "image_encoder":  # of which only the hidden states are taken
        return any(kind.__name__.startswith(each) for each in wanted)
    return bool(lineage & wanted)


def load_component(component: Component, dtype: torch.dtype) -> Any:
    """Load one component by its own class. Raises ModelError that names it."""
    if component.name.startswith("scheduler"):
        check_scheduler(component.kind, component.folder)
    if component.name.startswith("tokenizer"):
        check_tokenizer_files(component.kind, component.folder)
    if component.is_model:
        check_config(component.kind, component.folder)
    try:
        if not component.is_model:
            return component.kind.from_pretrained(component.folder)
        with quiet():  # wrong shapes are let through only to be named below
            model, info = component.kind.from_pretrained(
                component.folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **{"dtype" if is_of_transformers(component.kind) else "torch_dtype": dtype},
            )
    except Exception as error:  # each library below has exceptions of its own for a file that is not right
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load {component.name} from '{component.folder}' ({type(error).__name__}: {reason}); {INCOMPLETE}, "
            "with its weights as safetensors."
        ) from error
    _require_complete(component, model, info)
    return model


def is_of_transformers(kind: Any) -> bool:
    """Return whether a class is one of transformers, not of diffusers."""
    return bool(kind.__module__.startswith("transformers."))


def _require_complete(component: Component, model: nn.Module, info: Mapping[str, Iterable[Any]]) -> None:
    """Refuse weights that lack a tensor, have one too many, or one of another shape. Raises ModelError."""
    state = model.state_dict()
    unset = {name for name, value in state.items() if value.is_meta}
    mismatched = {
        str(name): f"{name} is {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]
    }
    problems = {
        "lack": sorted(({*map(str, info["missing_keys"])} | unset) - mismatched.keys()),
        "hold unknown": unexpected_keys(model, info),
        "have in another shape": sorted(mismatched.values()),
    }
    found = [
        f"they {what} {len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:SHOWN])}"
        f"{', ...' if len(names) > SHOWN else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise ModelError(
            f"the weights of {component.name} in '{component.folder}' do not fit {component.kind.__name__}: "
            f"{'; '.join(found)}; {INCOMPLETE}."
        )


@torch.no_grad()
def own_component(module: nn.Module, device: torch.device, where: str) -> None:
    """Copy every parameter and buffer of ``module`` to memory of its own on ``device``.

    Weights mapped from a file may be unaligned, which changes the last bits of what is computed from them. Raises
    ModelError, naming tensors, if some hold NaN or infinity. ``where`` names the files.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data = tensor.detach().to(device, copy=True)
    state = module.state_dict()
    wrong = [name for name, value in state.items() if not is_finite(value)]
    if wrong:
        dtype = str(state[wrong[0]].dtype).removeprefix("torch.")
        raise ModelError(
            f"the weights in '{where}' hold NaN or infinity, read as {dtype}, in {len(wrong)} of {len(state)} tensors: "
            f"{', '.join(wrong[:SHOWN])}{', ...' if len(wrong) > SHOWN else ''}; get the files again, or use a wider "
            "precision."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Have diffusers and transformers log nothing and show no progress bars.

    What they warn of is accounted for, or raised; their bars are of local files.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(logging.CRITICAL)
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
