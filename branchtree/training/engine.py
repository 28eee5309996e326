"""Where the trained weights lie and how they are stepped: whole on every process, or sharded over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from branchtree.errors import RecipeError
from branchtree.recipe.schema import Recipe

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class Engine(Protocol):
    """Trains the denoiser's weights, wherever they lie."""

    @property
    def module(self) -> Any:
        """What rows of the gradient pass are sent through."""

    @property
    def optimizer(self) -> Any:
        """The optimiser, whose ``param_groups`` tell the learning rate."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters by their names in the denoiser, in the optimiser's order."""

    @property
    def joint(self) -> bool:
        """Whether a forward or a backward is a call that all processes must make."""

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """A context for a forward and backward; ``last`` of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient; the gradient of a step is the mean over processes."""

    def scale(self, factor: float) -> None:
        """Multiply the gradient."""

    def clip(self, limit: float) -> float:
        """Scale the gradient to a norm of at most ``limit``; returns the norm before."""

    def step(self) -> None:
        """Take the optimiser's step and forget the gradient."""

    def discard(self) -> None:
        """Forget the gradient."""

    def settle(self) -> None:
        """Before and after weights are changed from outside: keep no copy of them."""

    def denoiser_state(self) -> dict[str, Tensor] | None:
        """The trained weights to save, on the main process; None: those in the denoiser. All processes must call it."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's whole state, on the main process. All processes must call it."""

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take up what ``optimizer_state`` gave, of any number of processes."""


class Stepped:
    """Steps an optimiser that holds this process's part of the weights, or all of them."""

    optimizer: Any
    parameters: Mapping[str, nn.Parameter]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the gradient."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def step(self) -> None:
        """Take the optimiser's step and forget the gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class WholeWeights(Stepped):
    """An engine of which every process holds all weights: one process, or DDP."""

    accelerator: Any
    module: nn.Module
    optimizer: Any
    parameters: Mapping[str, nn.Parameter]

    joint = False

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced once per step, in its last backward."""
        context: AbstractContextManager[None] = nullcontext() if last else self.accelerator.no_sync(self.module)
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> float:
        """Scale the gradient to a norm of at most ``limit``; returns the norm before."""
        return float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))

    def settle(self) -> None:
        """There are no copies."""

    def denoiser_state(self) -> None:
        """The weights are in the denoiser."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's ``state_dict``."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take up what ``optimizer_state`` gave."""
        self.optimizer.load_state_dict(state)


def make_engine(
    recipe: Recipe, accelerator: Any, denoiser: nn.Module, reference: nn.Module | None, make: MakeOptimizer
) -> Engine:
    """The engine that accelerate was configured for. ``reference``, a frozen copy of the denoiser, goes the same way.

    Raises RecipeError for a configuration that is not supported.
    """
    from branchtree.training.sharding import sharding_asked

    if sharding_asked():
        if accelerator.num_processes == 1:
            raise RecipeError("accelerate's configuration: FSDP shards over processes, and there is only one")
        return _sharded(recipe, accelerator, denoiser, reference, make)
    parameters = trained_parameters(denoiser)
    module, optimizer = accelerator.prepare(denoiser, make(list(parameters.values())))
    return WholeWeights(accelerator, module, optimizer, parameters)


def _sharded(
    recipe: Recipe, accelerator: Any, denoiser: nn.Module, reference: nn.Module | None, make: MakeOptimizer
) -> Engine:
    from torch.distributed.device_mesh import init_device_mesh

    from branchtree.training.sharding import ShardedWeights, read_shard_settings, shard

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


def trained_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
