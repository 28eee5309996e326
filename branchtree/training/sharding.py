"""Weights sharded over processes with torch's ``fully_shard``, as accelerate's FSDP2 settings ask for.

accelerate prepares FSDP only where there is a GPU, and falls back to DDP without one. So its settings are read from
accelerate and carried out here: one path for CPU and GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from branchtree.errors import RecipeError
from branchtree.recipe.schema import Recipe
from branchtree.training.engine import Engine, Stepped, WholeWeights, share_of, trained_parameters, whole


@dataclass(frozen=True)
class ShardSettings:
    """How weights are sharded."""

    blocks: tuple[str, ...] | None  # class names of what is gathered at a time; None: those the model names itself
    one_unit: bool  # gather all weights at once instead
    reshard_after_forward: bool
    offload: OffloadPolicy


def sharding_asked() -> bool:
    """Return whether ``accelerate launch`` was asked to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def read_shard_settings(accelerator: Any) -> ShardSettings:
    """Read accelerate's configuration. Raises RecipeError for what is not supported rather than ignore it."""
    from accelerate.utils import DynamoBackend, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    refused = {
        "fsdp_version: must be 2": plugin.fsdp_version != 2,
        "fsdp_auto_wrap_policy: must be TRANSFORMER_BASED_WRAP or NO_WRAP": policy == "SIZE_BASED_WRAP",
        "fsdp_activation_checkpointing: use the recipe's run.gradient_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules: not supported": plugin.ignored_modules is not None,
        "dynamo_backend: not supported together with FSDP": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        "parallelism_config: not supported": getattr(accelerator, "parallelism_config", None) is not None,
    }
    for message, wrong in refused.items():
        if wrong:
            raise RecipeError(f"accelerate's configuration: {message}")
    names = plugin.transformer_cls_names_to_wrap
    return ShardSettings(
        blocks=tuple(names) if names else None,
        one_unit=policy == "NO_WRAP",
        reshard_after_forward=bool(plugin.reshard_after_forward),
        offload=plugin.cpu_offload if isinstance(plugin.cpu_offload, OffloadPolicy) else OffloadPolicy(),
    )


def shard(module: nn.Module, settings: ShardSettings, mesh: DeviceMesh, reduced: torch.dtype | None) -> FSDPModule:
    """Shard a module in place over the processes of ``mesh``; its parameters become DTensors.

    ``reduced`` is the dtype in which float32 weights are gathered, but for those that the model keeps in float32 when
    it is loaded in less; None gathers each weight as it is. Gradients are always reduced in float32. Raises
    RecipeError if the model has no block of the named classes.
    """
    kept = _kept_in_float32(module) if reduced else frozenset[nn.Parameter]()
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": settings.reshard_after_forward,
        "offload_policy": settings.offload,
    }
    for block in _blocks(module, settings):
        _shard_unit(block, kept, reduced, options)
    return _shard_unit(module, kept, reduced, options)


def _shard_unit(
    unit: nn.Module, kept: frozenset[nn.Parameter], reduced: torch.dtype | None, options: Mapping[str, Any]
) -> FSDPModule:
    """Shard a unit that is gathered at a time; where it holds weights kept in float32, those apart from the others."""

    def sharded(module: nn.Module, dtype: torch.dtype | None) -> FSDPModule:
        # Inputs stay as they are: a time step rounded to bfloat16 would be another one.
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        result: FSDPModule = fully_shard(module, mp_policy=policy, **options)
        return result

    if kept.isdisjoint(unit.parameters()):
        return sharded(unit, reduced)
    for child in _modules_without(unit, kept):  # one dtype is all that torch gathers a unit's trained weights in
        sharded(child, reduced)
    return sharded(unit, None)


def _kept_in_float32(module: nn.Module) -> frozenset[nn.Parameter]:
    """The parameters that a model of diffusers names as too delicate for half precision."""
    names = frozenset[str](getattr(module, "_keep_in_fp32_modules", None) or ())
    return frozenset(value for name, value in module.named_parameters() if names.intersection(name.split(".")))


def _modules_without(unit: nn.Module, kept: frozenset[nn.Parameter]) -> Iterator[nn.Module]:
    """The largest modules inside a unit that hold weights, none of ``kept`` among them, and are not sharded."""
    for child in unit.children():
        if isinstance(child, FSDPModule) or next(child.parameters(), None) is None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or not kept.isdisjoint(child.parameters()):
            yield from _modules_without(child, kept)
        else:
            yield child


def _blocks(module: nn.Module, settings: ShardSettings) -> list[nn.Module]:
    if settings.one_unit:
        return []
    own: list[str] | None = getattr(module, "_no_split_modules", None)  # how models of Hugging Face's libraries say it
    names = settings.blocks or tuple(own or ())
    found = [child for child in module.modules() if type(child).__name__ in names]
    if not found:
        wanted = f"no {' or '.join(names)} in the model" if names else "the model does not name its blocks"
        raise RecipeError(
            f"accelerate's configuration: fsdp_transformer_layer_cls_to_wrap: {wanted}; name the class of its "
            "transformer blocks, or set fsdp_auto_wrap_policy to NO_WRAP"
        )
    return found


@dataclass(frozen=True)
class ShardedWeights(Stepped):
    """An engine whose weights, gradients and optimiser state are spread over all processes."""

    module: Any  # the sharded denoiser
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]  # DTensors
    main: bool
    reduce_once: bool  # whether gradients may wait, whole on every device, until the last backward of a step

    joint = True

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Reduce gradients in the last backward only, if they may wait for it."""
        return self._unreduced() if self.reduce_once and not last else nullcontext()

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient, averaged over processes."""
        loss.backward()

    def clip(self, limit: float) -> float:
        """Scale the gradient to a norm of at most ``limit``; returns the norm before, over all processes."""
        return float(whole(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)))

    def forget_copies(self) -> None:
        """Give up gathered weights, which a change of the sharded ones would leave behind."""
        for child in self.module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def denoiser_state(self) -> dict[str, Tensor]:
        """The trained weights, whole, on the main process; empty on the others. Every process must call this."""
        self.forget_copies()
        return self._on_main(self.parameters)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's ``state_dict`` with whole tensors on the main process. Every process must call this."""
        state = self.optimizer.state_dict()
        return {**state, "state": {index: self._on_main(entry) for index, entry in state["state"].items()}}

    def _on_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # One at a time, so that a process other than the main one holds no more than one whole tensor.
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.main:
                kept[name] = full.clone()
        return kept

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take up what ``optimizer_state`` gave, of any number of processes."""
        parameters = list(self.parameters.values())
        entries = {
            index: {
                name: share_of(value, parameters[index]) if value.shape == parameters[index].shape else value
                for name, value in entry.items()
            }
            for index, entry in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": entries})


MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def make_engine(
    recipe: Recipe, accelerator: Any, denoiser: nn.Module, reference: nn.Module | None, make: MakeOptimizer
) -> Engine:
    """Return the engine that accelerate was configured for; ``reference``, a frozen copy, is sharded alike.

    Raises RecipeError for a configuration that is not supported.
    """
    if sharding_asked():
        if recipe.run.encode_alone:
            raise RecipeError("run.encode_alone: weights that FSDP shards cannot leave their devices; set it to false")
        if accelerator.num_processes == 1:
            raise RecipeError("accelerate's configuration: FSDP shards over processes, and there is only one")
        return _sharded(recipe, accelerator, denoiser, reference, make)
    parameters = trained_parameters(denoiser)
    module, optimizer = accelerator.prepare(denoiser, make(list(parameters.values())))
    return WholeWeights(accelerator, module, optimizer, parameters)


def _sharded(
    recipe: Recipe, accelerator: Any, denoiser: nn.Module, reference: nn.Module | None, make: MakeOptimizer
) -> Engine:
    settings = read_shard_settings(accelerator)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reduced = torch.bfloat16 if recipe.autocast else None
    if reference is not None:
        shard(reference, settings, mesh, reduced)
    module = shard(denoiser, settings, mesh, reduced)
    parameters = trained_parameters(denoiser)
    return ShardedWeights(
        module=module,
        optimizer=make(list(parameters.values())),
        parameters=parameters,
        main=accelerator.is_main_process,
        # Until it is reduced, a gradient is whole on every device: small for low-rank weights, and for all weights
        # what sharding is there to avoid.
        reduce_once=recipe.lora is not None,
    )
