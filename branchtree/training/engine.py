"""Where the trained weights lie, how they are stepped, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


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
        """Return whether a forward or a backward is a call that all processes must make."""

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

    def forget_copies(self) -> None:
        """Drop gathered copies of the weights, before and after they are changed from outside."""

    def denoiser_state(self) -> dict[str, Tensor] | None:
        """The trained weights to save, on the main process; None: those in the denoiser. All processes must call it."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's whole state, on the main process. All processes must call it."""

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take up what ``optimizer_state`` gave, of any number of processes."""


class Stepped:
    """Steps an optimiser that holds this process's share of the weights, or all of them."""

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

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients are reduced once per step, in its last backward."""
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            yield
        if last and isinstance(self.module, DistributedDataParallel):
            # After the first reduction torch sends the order of its buckets, by default in the next forward. A process
            # that differentiates early makes that one while others wait elsewhere.
            self.module.reducer._rebuild_buckets()

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> float:
        """Scale the gradient to a norm of at most ``limit``; returns the norm before."""
        return float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))

    def forget_copies(self) -> None:
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


def trained_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in denoiser.named_parameters() if value.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, in the same memory: all of it where it is not sharded."""
    with torch.no_grad():
        share: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return share.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on the CPU. Where it is sharded, every process must call this."""
    with torch.no_grad():
        full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def share_of(full: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has in full, laid out as ``like`` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    shared: Tensor = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return shared


def gathered(share: Tensor, like: Tensor) -> Tensor:
    """Return all of a tensor, on the CPU, of which each process holds the share that it holds of ``like``."""
    if not isinstance(like, DTensor):
        return share
    on_device = share.to(like.device_mesh.device_type)
    return whole(
        DTensor.from_local(
            on_device, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    )


class WeightAverage:
    """An exponential moving average of the trained weights, kept on the CPU.

    average = d * average + (1 - d) * weight, after each optimiser step, in float32.

    After ``n`` earlier steps d is min(decay, (1 + n) / (10 + n)), and 0 at the first, as in diffusers' ``EMAModel``:
    the average follows the weights from the start, however short the run. Where weights are sharded, each process keeps
    the average of its own share, and nothing is sent but when it is written.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._decay = decay
        self.steps = 0  # that the average has taken in
        self._parameters = dict(parameters)
        self._average = {name: local(value).float().cpu().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        self.steps += 1
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(local(parameter).float().cpu(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return the whole averages by parameter name, float32. Sharded, all processes must call this."""
        return {name: gathered(value, self._parameters[name]) for name, value in self._average.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the averages in the parameters' own dtypes, ready to be written instead of them."""
        return {name: value.to(self._parameters[name].dtype) for name, value in self.state().items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Hold the averages in the model, as ``final/`` will, while the context lasts."""
        originals = {name: local(parameter).cpu().clone() for name, parameter in self._parameters.items()}
        try:
            self._assign(self._average)
            yield
        finally:
            self._assign(originals)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give another module of the same parameters the averages."""
        parameters = dict(module.named_parameters())
        for name, value in self._average.items():
            parameters[name].copy_(value)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter).copy_(values[name])

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a saved state, of any number of processes, that has taken in ``steps``."""
        self.steps = steps
        for name, average in self._average.items():
            average.copy_(local(share_of(state[name], self._parameters[name])))

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights as they are now."""
        self.steps = 0
        for name, parameter in self._parameters.items():
            self._average[name].copy_(local(parameter))
