"""What the adapters of diffusers pipelines share: finding, loading, counting, LoRA, saving and restoring."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError, ModelError, nearest
from branchtree.protocols import LoraSettings

BUNDLED = "bundled:"
Configs = Mapping[str, Mapping[str, Any]]
Built = TypeVar("Built")
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


def locate(path: str, revision: str | None = None) -> ModelSource:
    """Tell a local folder, a model shipped with the package (``bundled:NAME``) and a hub id apart.

    A path that exists or begins with ``/``, ``./``, ``../`` or ``~`` is a folder; ``org/name`` is a hub id.
    Raises ModelError for a missing folder, an unknown bundled name, a revision of a folder, or anything else.
    """
    folder = Path(path).expanduser()
    if path.startswith(BUNDLED):
        folder = _bundled(path.removeprefix(BUNDLED))
    elif not folder.exists() and not path.startswith(("/", "./", "../", "~")):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            return ModelSource(path, None, revision)
        raise ModelError(
            f"model path '{path}' is neither an existing folder nor a hub id; "
            f"give a folder such as './my-model', a hub id such as 'org/name', or '{BUNDLED}NAME'."
        )
    if not folder.is_dir():
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
            return assumed, f"assumed to be those of {model}, since '{source.name}' is not in the local cache"
    else:
        files = [source.folder / name for name in assumed]
    configs = {name: _read_json(file) for name, file in zip(assumed, files, strict=True)}
    return configs, f"configuration files of '{source.name}'"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read '{file}': {error}; the model folder is incomplete or damaged.") from error
    return content


def on_meta(build: Callable[[], Built]) -> Built:
    """The modules ``build`` makes, without memory for weights. Raises ModelError if the configuration is wrong."""
    try:
        with torch.device("meta"):
            return build()
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the model's config.json describes no model that can be built: {error}") from error


def count_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of ``module``, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def load_pipeline(
    pipeline: Any, source: ModelSource, dtype: torch.dtype, denoiser: str, denoiser_dtype: torch.dtype
) -> Any:
    """Load ``pipeline`` (a diffusers class) on the CPU from safetensors files, with no code from the source.

    The part named ``denoiser`` is in ``denoiser_dtype``, the others in ``dtype``. Raises ModelError.
    """
    try:
        with no_progress_bars() if source.folder else nullcontext():
            return pipeline.from_pretrained(
                source.location,
                revision=source.revision,
                dtype={denoiser: denoiser_dtype, "default": dtype},
                use_safetensors=True,
            )
    except Exception as error:  # every library below has exceptions of its own for a file that is not right
        remedy = (
            "check the hub id, the network and, for a gated model, that you are logged in; "
            "or download the model and give its folder"
            if source.folder is None
            else "give a complete folder of this model family with its weights as safetensors"
        )
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"cannot load '{source.location}' ({reason}); {remedy}.") from error


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


def on_device(module: Any, device: torch.device) -> Any:
    """Move ``module`` (a diffusers or transformers model) to ``device`` unless it is there: asking costs much less."""
    return module if module.device == device else module.to(device)


def lora_sites(denoiser: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    """The linear layers whose names end in one of ``targets``. Raises ModelError for a target that finds none."""
    linear = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for target in targets:
        here = {n: m for n, m in linear.items() if n == target or n.endswith(f".{target}")}
        if not here:
            endings = {re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in linear}
            raise ModelError(f"LoRA target '{target}' names no linear layer{nearest(target, endings)}")
        found |= here
    return list(found.values())


def lora_parameters_per_rank(denoiser: nn.Module, targets: Sequence[str]) -> int:
    """Numbers that each unit of LoRA rank adds on ``targets``: inputs plus outputs of every linear layer."""
    return sum(layer.in_features + layer.out_features for layer in lora_sites(denoiser, targets))


def add_lora(denoiser: Any, settings: LoraSettings, targets: Sequence[str], seed: int) -> None:
    """Freeze ``denoiser`` (a diffusers model) and put trainable float32 LoRA weights on ``targets``.

    They are initialised from ``seed`` alone, and torch's random state is left as it was. Raises ModelError.
    """
    from peft import LoraConfig

    lora_sites(denoiser, targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets))
    denoiser.requires_grad_(False)
    devices = [denoiser.device] if denoiser.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def lora_disabled(denoiser: nn.Module) -> Iterator[None]:
    """A context in which ``denoiser`` (wrapped or not) acts without its LoRA. Raises ModelError if it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ModelError("this model has no LoRA layers to switch off; keep a frozen copy of it instead.")
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def trained_state(denoiser: nn.Module, replacement: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The trainable parameters by name, or ``replacement`` in their dtypes.

    Raises CheckpointError if the names or shapes of ``replacement`` are not theirs.
    """
    live = {name: p.detach() for name, p in denoiser.named_parameters() if p.requires_grad}
    if replacement is None:
        return live
    _require_same("the weights to save", live, replacement)
    return {name: replacement[name].detach().to(live[name].dtype) for name in live}


def _require_same(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if expected.keys() != found.keys():
        lacking, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise CheckpointError(
            f"{what} do not belong to this model: {len(lacking)} missing (first: {lacking[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]})."
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"shape {tuple(found[name].shape)}, the model's is {tuple(tensor.shape)}"
            raise CheckpointError(f"{what} do not belong to this model: '{name}' has {shapes}.")


def has_lora(denoiser: nn.Module) -> bool:
    """Whether ``add_lora`` has been called on ``denoiser``."""
    return any("lora_" in name for name, _ in denoiser.named_parameters())


def save_lora(pipeline: Any, denoiser: Any, directory: Path, replacement: Mapping[str, Tensor] | None) -> None:
    """Write the LoRA weights, or ``replacement``, and their alpha, as ``pipeline.load_lora_weights`` reads them.

    Raises CheckpointError if ``replacement`` belongs to another model.
    """
    from peft import get_peft_model_state_dict

    pipeline.save_lora_weights(
        directory,
        transformer_lora_layers=get_peft_model_state_dict(denoiser, state_dict=trained_state(denoiser, replacement)),
        transformer_lora_adapter_metadata=denoiser.peft_config["default"].to_dict(),
    )


def with_weights(denoiser: Any, replacement: Mapping[str, Tensor] | None) -> Any:
    """A second model like ``denoiser``, with ``replacement`` in place of its trained weights; copies no weights.

    Raises CheckpointError if ``replacement`` belongs to another model.
    """
    twin = on_meta(lambda: type(denoiser).from_config(denoiser.config))
    state = {**denoiser.state_dict(), **trained_state(denoiser, replacement)}
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.requires_grad_(False).eval()


def restore_lora(denoiser: Any, directory: Path) -> None:
    """Read into ``denoiser`` what ``save_lora`` wrote. Raises CheckpointError if it is missing or another's."""
    from peft import get_peft_model_state_dict

    live = get_peft_model_state_dict(denoiser, state_dict=trained_state(denoiser, None))
    _copy_exactly({f"transformer.{name}": tensor for name, tensor in live.items()}, [directory / LORA_FILE])


def restore_denoiser(denoiser: nn.Module, folder: Path) -> None:
    """Read into ``denoiser`` what its save_pretrained wrote to ``folder``. Raises CheckpointError likewise."""
    _copy_exactly(denoiser.state_dict(), sorted(folder.glob("*.safetensors")))


@torch.no_grad()
def _copy_exactly(live: Mapping[str, Tensor], files: Sequence[Path]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved: dict[str, Tensor] = {}
    try:
        for file in files:
            saved |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read trained weights from '{file}': {error}") from error
    if not files:
        raise CheckpointError("the checkpoint holds no safetensors file of trained weights.")
    _require_same(f"the trained weights in '{files[0].parent}'", live, saved)
    for name, tensor in live.items():
        if tensor.dtype != saved[name].dtype:
            dtypes = f"{saved[name].dtype} in the checkpoint and {tensor.dtype} in the model"
            raise CheckpointError(f"'{name}' is {dtypes}; load the model in the checkpoint's precision.")
    for name, tensor in live.items():
        tensor.copy_(saved[name])
