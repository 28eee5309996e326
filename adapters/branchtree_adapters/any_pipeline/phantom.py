"""Components without weights in memory: a phantom takes what its model takes, and returns zeros of the right shapes.

A phantom's parameters are torch's fake tensors, which have a shape and a dtype alone. Its class is a subclass of the
model's own, so that a pipeline finds the configuration, attributes and methods that it looks for. A pipeline of
phantoms runs its own ``__call__`` on real, small tensors, without weights and within seconds at any size.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

ENTRANCES = ("__call__", "encode", "decode")
"""The methods by which pipelines call a component."""
REMEMBERED = 8
"""Outputs that a phantom remembers: a pipeline that is learnt encodes the same prompts again and again."""
CONSTANT = 2**12
"""Numbers up to which a buffer has values, all of them ones."""
LARGE = 2**24
"""Numbers from which a tensor is fake though its values are known."""
NESTED = frozenset({tuple, list, dict})
"""What an operation's arguments are in."""


class ShapesOnly(FakeTensorMode):
    """Computes shapes alone of what depends on weights, and values of the rest, where these are not large.

    Masks and positions do not depend on weights. Their values decide which way a model goes, or how large a tensor is,
    so that a model that asks for them cannot run on shapes alone.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.building = True  # a model, whose tensors are its weights; their initialisation may look at them
        self.known = False  # whether values are computed

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run one operation of torch."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _numbered(cast("list[Any]", args[1])))
        if self.building and func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if cast(Tensor, args[0]).is_floating_point() else 0
        shapes = functools.partial(self._shapes, func, types, args, kwargs)
        if not self.known or any(
            _is_fake(leaf) or (isinstance(leaf, Tensor) and leaf.numel() > LARGE) for leaf in _leaves((args, kwargs))
        ):
            return shapes()
        try:
            found = shapes()
            if any(isinstance(leaf, Tensor) and leaf.numel() > LARGE for leaf in tree_leaves(found)):
                return found
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _shapes(self, func: Any, types: Sequence[type], args: Any, kwargs: Any) -> object:
        """Run one operation on shapes alone, with all those that torch makes of it."""
        known, self.known = self.known, False
        if not self.building:
            args, kwargs = _mapped(self._without_values, (args, kwargs))
        try:
            return super().dispatch(func, types, args, kwargs)
        finally:
            self.known = known

    def _without_values(self, leaf: Any) -> Any:
        """Return a fake tensor of a real one's shape; torch's own way takes milliseconds, and its outputs no cache."""
        if type(leaf) not in (Tensor, nn.Parameter) or leaf.dim() == 0 or leaf.layout != torch.strided:
            return leaf
        if leaf.device.type != "cpu" or leaf.is_conj() or leaf.is_neg():
            return leaf
        with no_dispatch():
            meta = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            return FakeTensor(self, meta, leaf.device)


def _is_fake(leaf: Any) -> bool:
    return isinstance(leaf, FakeTensor)


def _leaves(arguments: Any) -> Iterator[Any]:
    """Yield what an operation's arguments hold, which are in tuples, lists and dictionaries: torch's way is slower."""
    if type(arguments) not in NESTED:
        yield arguments
    else:
        for each in arguments.values() if type(arguments) is dict else arguments:
            yield from _leaves(each)


def _mapped(change: Callable[[Any], Any], arguments: Any) -> Any:
    """Return an operation's arguments with ``change`` made to each that they hold."""
    kind = type(arguments)
    if kind not in NESTED:
        return change(arguments)
    if kind is dict:
        return {name: _mapped(change, each) for name, each in arguments.items()}
    return kind([_mapped(change, each) for each in arguments])


def _numbered(indices: list[Any]) -> list[Any]:
    """Replace masks with known values, which choose a number of entries that no shape says, by the entries' numbers."""
    numbered: list[Any] = []
    with unset_fake_temporarily():
        for index in indices:
            known_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not _is_fake(index)
            numbered.extend(index.nonzero(as_tuple=True) if known_mask else [index])
    return numbered


@dataclass(frozen=True)
class Call:
    """One call of a phantom."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def digest(self) -> bytes:
        """Return what is the same for calls with the same values."""
        found = hashlib.blake2b(self.method.encode())
        leaves, tree = tree_flatten((self.args, dict(self.kwargs)))
        found.update(str(tree).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                found.update(f"{leaf.shape} {leaf.dtype}".encode())
            else:
                found.update(repr(leaf).encode())
            if isinstance(leaf, Tensor) and not _is_fake(leaf):
                found.update(
                    leaf.detach().contiguous().as_strided((leaf.numel(),), (1,)).view(torch.uint8).numpy().data
                )
        return found.digest()


@dataclass
class _Body:
    """What a phantom has beside its model's attributes."""

    mode: ShapesOnly
    calls: list[Call] | None = None  # where they are recorded: their arguments may take gigabytes
    outputs: dict[bytes, Any] = field(default_factory=dict)  # of the latest calls, by their digest
    running: bool = False
    stops: bool = False  # whether a call leaves what made it


class Phantom:
    """What is mixed into a model's class to make a phantom of it."""

    body: _Body

    def dry_run(self, call: Call) -> Any:
        """Return what a call returns, as fake tensors."""
        self.body.running = True
        try:
            with self.body.mode, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The .grad attribute")  # which torch reads of what it makes fake
                return getattr(self, call.method)(*call.args, **call.kwargs)
        finally:
            self.body.running = False


@functools.cache
def _phantom_class(kind: type) -> type:
    entrances = {name: _entrance(name) for name in ENTRANCES if hasattr(kind, name)}
    return type(kind.__name__, (Phantom, kind), {"__module__": kind.__module__, **entrances})


def _entrance(method: str) -> Callable[..., Any]:
    """Return what stands for a method of a model."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.body.running:
            return getattr(super(Phantom, self), method)(*args, **kwargs)
        made = Call(method, args, kwargs)
        if self.body.calls is not None:
            self.body.calls.append(made)
        if self.body.stops:
            raise _CallError
        # Hooks are to see every call, and outputs under gradients hold their graph.
        known = {} if self._forward_pre_hooks or torch.is_grad_enabled() else self.body.outputs
        if (digest := made.digest()) not in known:
            known[digest] = self.dry_run(made)  # fake, since a large encoder's output may take gigabytes
            if len(known) > REMEMBERED:
                known.pop(next(iter(known)))
        return without_fakes(tree_map(_copy, known[digest]))  # pipelines write into what they are given

    return call


def phantom(build: Callable[[], nn.Module]) -> Any:
    """Return the phantom of a model, which ``build`` builds with fresh weights."""
    mode = ShapesOnly()
    with mode:
        module = build().eval()
    mode.building, mode.known = False, True
    for each in module.modules():
        each._buffers.update(_constants(each))
    kind: Any = type(module)
    module.__class__ = _phantom_class(kind)
    module.__dict__["body"] = _Body(mode)
    return module


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and not _is_fake(leaf) else leaf


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Return ones for buffers with which pipelines may compute themselves, as with the means of a VAE's latents."""
    floats = {name: each for name, each in module.named_buffers(recurse=False) if each.is_floating_point()}
    return {name: torch.ones(each.shape, dtype=each.dtype) for name, each in floats.items() if each.numel() <= CONSTANT}


@contextmanager
def recorded_calls(component: Any) -> Iterator[list[Call]]:
    """A context that yields a list of the calls of a phantom in it."""
    calls: list[Call] = []
    before, component.body.calls = component.body.calls, calls
    try:
        yield calls
    finally:
        component.body.calls = before


class _CallError(BaseException):
    """Leaves what called a phantom. No handler of a pipeline's may catch it."""


def first_call(component: Any, run: Callable[[], Any]) -> Call | None:
    """Return the first call that ``run`` makes of a phantom, and leave it there; None if it makes none."""
    with recorded_calls(component) as calls:
        component.body.stops = True
        try:
            run()
        except _CallError:
            pass
        finally:
            component.body.stops = False
    return calls[0] if calls else None


def _zeros(like: Tensor) -> Tensor:
    """Return zeros of a tensor's shape, which take memory only where they are written; torch's own do at once."""
    numbers = torch.from_numpy(np.zeros(like.numel() * like.dtype.itemsize, dtype=np.uint8))
    return numbers.view(like.dtype).view(like.shape)


class _Zeros(torch.autograd.Function):
    """Zeros of a fake tensor's shape, whose graph goes on through what the fake tensor was computed from."""

    @staticmethod
    def forward(ctx: Any, fake: Tensor) -> Tensor:
        return _zeros(fake)


def without_memory(leaf: Any) -> Any:
    """Return a large tensor of zeros, as phantoms' outputs lead to, as one that takes no memory yet."""
    large = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.numel() > LARGE
    return _zeros(leaf) if large and not bool(leaf.any()) else leaf


def without_fakes(output: Any) -> Any:
    """Return an output with zeros for its fake tensors, also in attributes of objects such as a VAE's distribution.

    What the zeros depend on is what the fake tensors do: a graph leads from them to the parameters.
    """

    def real(leaf: Any) -> Any:
        if _is_fake(leaf):
            return _Zeros.apply(leaf)
        if hasattr(leaf, "__dict__") and any(map(_is_fake, vars(leaf).values())):
            vars(leaf).update({name: real(value) for name, value in vars(leaf).items()})
        return leaf

    return tree_map(real, output)
