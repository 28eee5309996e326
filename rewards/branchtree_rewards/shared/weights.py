"""Reading weights safely and loading them strictly: every tensor of a file is used, or is named as dropped."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.core.finite import is_finite
from branchtree.errors import RewardError
from branchtree.plugins.completeness import unexpected_keys
from branchtree_rewards.shared.source import WeightsSource, cause

State = dict[str, Tensor]
SHOWN = 5
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder of transformers


def read_weights(file: Path) -> Any:
    """Return the content of a .safetensors file, or of one that torch.load reads with ``weights_only``, on the CPU.

    Raises RewardError for a file that is damaged, or holds anything but tensors in plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with file.open("rb") as stream:
            mapped = stream.read(2) == b"PK"  # files of torch before 1.6 are no zip archives and cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch, zip, pickle and safetensors each have exceptions of their own for a bad file
        raise RewardError(
            f"cannot read weights from '{file}' ({cause(error)}); it is damaged, or holds more than tensors"
        ) from error


def state_dict(content: Any, file: Path) -> State:
    """Return ``content`` if it maps names to tensors. Raises RewardError otherwise."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RewardError(f"'{file}' holds no state dict: names with tensors")
    return dict(content)


def read_state_dict(file: Path) -> State:
    """Return the state dict that a file holds. Raises RewardError if it holds none."""
    return state_dict(read_weights(file), file)


def without(state: Mapping[str, Tensor], dropped: Iterable[str]) -> State:
    """Return ``state`` less the names for which the model is known to have no use."""
    gone = set(dropped)
    return {name: value for name, value in state.items() if name not in gone}


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> State:
    """Return ``state`` under new names. Raises RewardError if two tensors come to the same name."""
    result: State = {}
    for name, value in state.items():
        if (new := rename(name)) in result:
            raise RewardError(f"two tensors of the checkpoint come to the name '{new}'")
        result[new] = value
    return result


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise RewardError unless names and shapes of ``state`` are exactly those ``wanted``, and its numbers finite."""
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    found = [f"{len(names)} {problem}: {_shown(names)}" for problem, names in problems.items() if names]
    if found:
        raise RewardError(f"the weights of '{where}' do not fit the model: {'; '.join(found)}")
    require_finite_weights(state, where)


def require_finite_weights(state: Mapping[str, Tensor], where: str) -> None:
    """Raise RewardError for weights that are NaN or infinite, as those of a damaged file are."""
    broken = [name for name, value in state.items() if not value.is_meta and not is_finite(value)]
    if broken:
        named = _shown(broken)
        raise RewardError(f"the weights of '{where}' are not finite in {named}; the file is damaged: get it again")


def _shown(names: Sequence[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give a module, which may be on the meta device, copies of weights that fit it exactly, in float32.

    Raises RewardError if names or shapes differ, or a weight is not finite.
    """
    check_fit(state, module.state_dict(), where)
    owned = {  # not mapped from a file; what counts stays whole
        name: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }
    module.load_state_dict(owned, assign=True)


def build_pretrained(model: Any, config: Any, state: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> Any:
    """Return a transformers ``model`` of ``config`` holding exactly ``state``, without initialising it first.

    Raises RewardError if names or shapes differ, or a weight is not finite.
    """
    with torch.device("meta"):
        wanted = model(config).state_dict()
    check_fit(state, wanted, where)
    with quiet_libraries():
        return model.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype)


def from_pretrained(model: Any, location: str, dtype: torch.dtype, **settings: Any) -> Any:
    """Call ``model.from_pretrained``, and refuse what it would otherwise replace at random or leave unused.

    Raises RewardError if the folder or hub id cannot be read, or its weights do not fit the model or are not finite.
    """
    try:
        with quiet_libraries():  # wrong sizes are let through here only to be named below
            loaded, info = model.from_pretrained(
                location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
    except Exception as error:  # each library below has exceptions of its own for a file that is not right
        raise RewardError(
            f"cannot load '{location}' ({cause(error)}); give a hub id that can be reached, or a complete folder"
        ) from error
    problems = {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": unexpected_keys(loaded, info),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
    }
    found = [f"{problem}: {', '.join(names[:SHOWN])}" for problem, names in problems.items() if names]
    if found:
        raise RewardError(f"the weights of '{location}' do not fit the model: {'; '.join(found)}")
    require_finite_weights(loaded.state_dict(), location)
    return loaded


def load_folder(model: Any, source: WeightsSource) -> tuple[Any, Path]:
    """Return the network of a folder or hub id in float32 on the CPU, and the one file that its weights came from.

    Raises RewardError if there is no such file, or it does not fit its config.json.
    """
    if source.only:
        raise RewardError(f"'{source.only}' is one file; give the folder that holds it with its config.json")
    file = source.find(*WEIGHTS)
    network = from_pretrained(
        model,
        source.location,
        torch.float32,
        revision=source.revision,
        use_safetensors=file.suffix == ".safetensors",  # so that the file which is pinned is the one that is read
    )
    return network, file


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' progress bars and load reports."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
