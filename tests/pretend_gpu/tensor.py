"""A tensor that claims to be on a GPU: arithmetic on the CPU, and CUDA's refusals and costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretend_gpu.counts import Counts, Event

DEVICE = torch.device("cuda", 0)
COPIES = {"_to_copy", "to", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations whose result's size or value the host must know."""


@dataclass
class Gpu:
    """The one pretended GPU: what was counted on it, and what it has not finished yet."""

    counts: Counts = field(default_factory=Counts)
    pinned: dict[int, Any] = field(default_factory=dict)  # storages by address; held, so that no address comes again
    _pending: list[Callable[[], None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, event: Event) -> None:
        """Count something that makes the host wait, and finish all copies."""
        self.counts.add(event)
        with self._lock:
            pending, self._pending = self._pending, []
        for finish in pending:
            finish()

    def pin(self, tensor: Tensor) -> Tensor:
        """Mark a host tensor's memory as page-locked."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a host tensor lies in page-locked memory."""
        return tensor.untyped_storage().data_ptr() in self.pinned

    def upload(self, tensor: Tensor, asynchronous: bool) -> PretendTensor:
        """Copy to the device; a copy from memory that is not page-locked makes the host wait, whatever was asked."""
        if not (asynchronous and self.is_pinned(tensor)):
            self.wait(Event.TO_DEVICE)
            return PretendTensor(tensor.detach().clone())
        self.counts.add(Event.ASYNC_TO_DEVICE)
        source = tensor.detach()
        copy = source.clone()

        def check() -> None:
            if not torch.equal(source.view(-1).view(torch.uint8), copy.view(-1).view(torch.uint8)):
                raise RuntimeError("page-locked memory was written to while it was being copied to the device")

        if copy.dim() > 0 and copy.is_contiguous():
            self._later(check)
        return PretendTensor(copy.clone())

    def download(self, tensor: PretendTensor, asynchronous: bool) -> Tensor:
        """Copy to the host; what comes asynchronously is rubbish until the device was waited for."""
        if not asynchronous:
            self.wait(Event.TO_HOST)
            return tensor.host.detach().clone()
        self.counts.add(Event.ASYNC_TO_HOST)
        source = tensor.host.detach().clone()
        rubbish = torch.nan if source.is_floating_point() else torch.iinfo(source.dtype).max
        result = torch.full_like(source, rubbish)
        self._later(lambda: result.copy_(source))
        return result

    def _later(self, finish: Callable[[], object]) -> None:
        with self._lock:
            self._pending.append(finish)  # type: ignore[arg-type]


GPU = Gpu()


class PretendTensor(Tensor):
    """A tensor on ``cuda:0`` whose numbers are in ``host``.

    To torch's own C++ it is on the meta device, for there autograd asks no driver; Python code sees CUDA. Autograd
    works above it as it always does, and operations reach ``__torch_dispatch__`` below it.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> PretendTensor:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device("meta"),
        )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # functions.py sees every call

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return DEVICE.index

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        GPU.wait(Event.TO_HOST)
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        copy = PretendTensor(self.host.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copy
        return copy  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


class PretendBackward(TorchDispatchMode):
    """While it is entered, which is in backward passes alone, numbers that C++ makes on the meta device are ours."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return operate(func, args, kwargs or {})


def operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry an operation out on the tensors' numbers, or refuse it as CUDA does."""
    name, mutable = _described(func)
    if name in COPIES:
        return _copied(func, name, args, kwargs)
    kinds: set[type] = set()
    host_args = _lowered(args, kinds)
    host_kwargs = {key: _lowered(value, kinds) for key, value in kwargs.items()}
    on_device = PretendTensor in kinds
    if name in INDEXING:
        on_device = _check_index(name, args)
    elif on_device and Tensor in kinds:
        _refuse(name)
    if on_device and name in WAITS:
        GPU.wait(Event.SYNCHRONISE)
    if host_kwargs.get("device") is not None:  # a factory, "like" a tensor or not
        on_device = torch.device(host_kwargs["device"]).type in ("cuda", "meta")
        host_kwargs["device"] = torch.device("cpu")
    host_kwargs.pop("pin_memory", None)
    result = func(*host_args, **host_kwargs)
    if mutable:
        return _same(result, args, kwargs)
    return _raised(result) if on_device else result


@cache
def _described(func: Any) -> tuple[str, bool]:
    """An operation's name without its library, and whether it changes its arguments."""
    return func._schema.name.split("::")[1], func._schema.is_mutable


def _lowered(value: Any, kinds: set[type]) -> Any:
    """A value with the numbers of pretended tensors in their place.

    Notes in ``kinds`` what was met: tensors of the device, and tensors of the host but for single numbers.
    """
    kind = type(value)
    if kind is PretendTensor:
        kinds.add(PretendTensor)
        return value.host
    if kind is tuple or kind is list:
        return [_lowered(item, kinds) for item in value]
    if isinstance(value, Tensor):
        _refuse_lost(value)
        if value.dim() > 0:
            kinds.add(Tensor)
    return value


def _raised(value: Any) -> Any:
    """A result as tensors on the device."""
    if isinstance(value, Tensor):
        return PretendTensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_raised(item) for item in value)
    return value


def _same(result: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that changes its arguments: those arguments themselves."""
    given = [*args, *kwargs.values()]
    flat = [item for value in given for item in (value if isinstance(value, list | tuple) else [value])]
    by_host = {id(item.host): item for item in flat if isinstance(item, PretendTensor)}
    for item in by_host.values():
        if item.shape != item.host.shape:
            raise NotImplementedError("the pretended GPU cannot resize a tensor in place")

    def found(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(found(item) for item in value)
        return by_host.get(id(value), value) if isinstance(value, Tensor) else value

    return found(result)


def _copied(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A copy between dtypes or devices."""
    if name == "copy_":
        target, source = args[0], args[1]
        _refuse_lost(source)
        if isinstance(target, PretendTensor) == isinstance(source, PretendTensor):
            number = source.host if isinstance(source, PretendTensor) else source
        elif isinstance(target, PretendTensor):
            number = GPU.upload(source, bool(args[2:] and args[2])).host
        else:
            GPU.wait(Event.TO_HOST)
            number = source.host
        (target.host if isinstance(target, PretendTensor) else target).copy_(number)
        return target
    options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    tensor, device = args[0], kwargs.get("device")
    to_device = device is None or torch.device(device).type in ("cuda", "meta")
    if isinstance(tensor, PretendTensor) and not to_device:
        return GPU.download(PretendTensor(func(tensor.host, **options)), bool(kwargs.get("non_blocking")))
    if not isinstance(tensor, PretendTensor):  # in the backward of a copy to the host
        return GPU.upload(func(tensor, **options), bool(kwargs.get("non_blocking")))
    return PretendTensor(func(tensor.host, **options))


def _check_index(name: str, args: Any) -> bool:
    """Refuse and count as CUDA does; returns whether the indexed tensor is on the device."""
    target, indices = args[0], [index for index in args[1] if index is not None]
    on_device = isinstance(target, PretendTensor)
    if not on_device and any(isinstance(index, PretendTensor) for index in indices):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if on_device and any(not isinstance(index, PretendTensor) and index.dim() > 0 for index in indices):
        GPU.wait(Event.TO_DEVICE)  # torch sends the index
    if on_device and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        GPU.wait(Event.SYNCHRONISE)  # it counts how many are chosen
    if len(args) > 2 and isinstance(args[2], PretendTensor) != on_device and args[2].dim() > 0:
        _refuse(name)
    return on_device


def _refuse_lost(tensor: Tensor) -> None:
    if tensor.is_meta and not isinstance(tensor, PretendTensor):
        raise NotImplementedError("the pretended GPU has lost a number that C++ put on the meta device")


def _refuse(name: str) -> None:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({name})"
    )
