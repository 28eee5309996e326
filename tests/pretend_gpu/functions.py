"""Calls of torch's functions that concern the device: factories, transfers, attention and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pretend_gpu.counts import Event
from pretend_gpu.tensor import DEVICE, GPU, PretendTensor

HALF = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu addmm addmv addr matmul einsum mm
    mv linear addbmm baddbmm bmm chain_matmul multi_dot scaled_dot_product_attention __matmul__
    __rmatmul__""".split()  # noqa: SIM905
)
FLOAT = frozenset(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus
    layer_norm group_norm norm cosine_similarity nll_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
    binary_cross_entropy_with_logits cross_entropy dist cdist logsumexp prod softmax log_softmax cumprod cumsum
    vector_norm sum interpolate""".split()  # noqa: SIM905
)
"""Functions that CUDA's autocast runs in the reduced dtype, and in float32 (torch's "CUDA Ops" lists)."""

CAST = HALF | FLOAT


class PretendFunctions(TorchFunctionMode):
    """While it is entered, a thread's calls of torch see the pretended GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = SPECIAL.get(func)
        if special is not None:
            return special(func, args, kwargs)
        if kwargs:
            if kwargs.get("generator") is not None:
                _check_generator(args, kwargs)
            if kwargs.get("pin_memory"):
                return GPU.pin(func(*args, **{**kwargs, "pin_memory": False}))
            if _is_cuda(kwargs.get("device")):
                return _made(func, args, kwargs)
        if getattr(func, "__name__", None) in CAST and torch.is_autocast_enabled("cuda"):
            args, kwargs = _autocast(func, args, kwargs)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """What a factory such as ``torch.zeros`` makes on the device."""
    if args and isinstance(args[0], PretendTensor):  # ``zeros_like``, ``new_zeros``: already where it should be
        return func(*args, **{**kwargs, "device": None})
    if func in (torch.tensor, torch.as_tensor, torch.asarray):
        GPU.wait(Event.TO_DEVICE)
    grad = kwargs.pop("requires_grad", False)
    made = func(*args, **{**kwargs, "device": "cpu"})
    return made if isinstance(made, PretendTensor) else PretendTensor(made.detach()).requires_grad_(grad)


def _check_generator(args: Any, kwargs: Any) -> None:
    """Refuse a generator of another device than the tensor's."""
    target = args[0] if args and isinstance(args[0], Tensor) else None
    device = kwargs.get("device")
    on_device = _is_cuda(device) if device is not None else isinstance(target, PretendTensor)
    wanted, found = "cuda" if on_device else "cpu", kwargs["generator"].device.type
    if wanted != found:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")


def _autocast(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments in the dtype that CUDA's autocast runs the function in."""
    if func.__name__ in HALF:
        dtype = torch.get_autocast_dtype("cuda")
    elif kwargs.get("dtype") is None:
        dtype = torch.float32
    else:
        return args, kwargs

    def cast(value: Any) -> Any:
        if isinstance(value, PretendTensor):
            eligible = value.is_floating_point() and value.dtype != torch.float64
            return Tensor.to(value, dtype) if eligible and value.dtype != dtype else value
        return type(value)(cast(item) for item in value) if type(value) in (list, tuple) else value

    return cast(args), {key: cast(value) for key, value in kwargs.items()}


class _Upload(torch.autograd.Function):
    """A copy to the device through which gradients come back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, asynchronous: bool) -> Tensor:  # type: ignore[override]
        return GPU.upload(tensor, asynchronous)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient.cpu(), None


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    """``Tensor.to``, with the device as a tensor, a name, or not at all."""
    tensor, *rest = args
    kwargs = dict(kwargs)
    device = kwargs.pop("device", None)
    if rest and isinstance(rest[0], Tensor):
        device, rest[0] = rest[0].device, rest[0].dtype
    elif rest and isinstance(rest[0], str | torch.device | int | None):
        device = rest.pop(0)
    if rest and isinstance(rest[0], torch.dtype):
        kwargs["dtype"] = rest.pop(0)
    flags = dict(zip(("non_blocking", "copy"), rest, strict=False))
    kwargs.update(flags)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if isinstance(tensor, PretendTensor):
        if device is None or _is_cuda(device):
            return Tensor.to(tensor, **kwargs) if kwargs else tensor
        return Tensor.to(tensor, device=device, **kwargs)
    if not _is_cuda(device):
        return func(tensor, **({} if device is None else {"device": device}), **kwargs) if kwargs or device else tensor
    asynchronous = kwargs.pop("non_blocking", False)
    kwargs.pop("copy", None)
    sent = Tensor.to(tensor, **kwargs) if kwargs else tensor
    if sent.requires_grad and torch.is_grad_enabled():
        return _Upload.apply(sent, asynchronous)
    return GPU.upload(sent, asynchronous)


def _cuda(func: Any, args: Any, kwargs: Any) -> Any:
    return _to(Tensor.to, (args[0],), {"device": DEVICE, "non_blocking": kwargs.get("non_blocking", False)})


def _cpu(func: Any, args: Any, kwargs: Any) -> Any:
    return _to(Tensor.to, (args[0],), {"device": "cpu"})


def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(args[0], PretendTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return args[0] if GPU.is_pinned(args[0]) else GPU.pin(args[0].detach().clone())


def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return not isinstance(args[0], PretendTensor) and GPU.is_pinned(args[0])


def _set_data(func: Any, args: Any, kwargs: Any) -> None:
    """``tensor.data = value``, also from one device to the other."""
    tensor, value = args
    if isinstance(tensor, PretendTensor) == isinstance(value, PretendTensor):
        if isinstance(tensor, PretendTensor):
            tensor.host = value.host
            value = value.detach()
        func(tensor, value)
        return
    moved = torch.nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else value
    torch.utils.swap_tensors(tensor, moved)


def _new_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    if not isinstance(args[0], PretendTensor):
        return func(*args, **kwargs)
    GPU.wait(Event.TO_DEVICE)
    return _on_device(args[1], kwargs.get("dtype") or args[0].dtype)


def _on_device(value: Any, dtype: torch.dtype | None = None) -> PretendTensor:
    """Numbers of the host as a tensor on the device, which C++ would put on the meta device and lose."""
    return PretendTensor(torch.tensor(value, dtype=dtype))


def _index(index: Any) -> Any:
    """An index, whose lists are sent to the device."""
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, list) for item in items):
        GPU.wait(Event.TO_DEVICE)
    items = tuple(_on_device(item) if isinstance(item, list) else item for item in items)
    return items if isinstance(index, tuple) else items[0]


def _get_item(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, index = args
    return func(tensor, _index(index) if isinstance(tensor, PretendTensor) else index)


def _set_item(func: Any, args: Any, kwargs: Any) -> None:
    tensor, index, value = args
    if isinstance(tensor, PretendTensor):
        index = _index(index)
        value = value if isinstance(value, Tensor) else _on_device(value, tensor.dtype)
    func(tensor, index, value)


def _where(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.where``, whose numbers C++ would put on the meta device."""
    if len(args) == 3 and any(isinstance(value, PretendTensor) for value in args):
        like = next(value for value in args[1:] if isinstance(value, Tensor))
        args = [value if isinstance(value, Tensor) else _on_device(value, like.dtype) for value in args]
    return func(*args, **kwargs)


def _where_method(func: Any, args: Any, kwargs: Any) -> Any:
    value, condition, other = args
    return _where(torch.where, (condition, value, other), kwargs)


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """Attention by the CPU's kernels, for C++ would look for one of the meta device."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not isinstance(given["query"], PretendTensor):
        return func(*args, **kwargs)
    if torch.is_autocast_enabled("cuda"):
        _, given = _autocast(func, (), given)
    query, key, value = given["query"], given["key"], given["value"]
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got "
            f"query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    mask, scale = given.get("attn_mask"), given.get("scale")
    causal, dropout = given.get("is_causal", False), given.get("dropout_p", 0.0)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype, but got {mask.dtype}")
    hosts = [value.host if isinstance(value, PretendTensor) else value for value in (query, key, value, mask)]
    kernel = torch._fused_sdp_choice(*hosts, dropout, causal, scale=scale)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -torch.inf)
    options = {"attn_mask": mask, "scale": scale}
    if kernel == torch._C._SDPBackend.FLASH_ATTENTION.value and query.dim() == 4:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout, causal, **options)[0]
    return torch._scaled_dot_product_attention_math(query, key, value, mask, dropout, causal, scale=scale)[0]


SPECIAL: dict[Any, Callable[[Any, Any, Any], Any]] = {
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.cpu: _cpu,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.new_tensor: _new_tensor,
    Tensor.__getitem__: _get_item,
    Tensor.__setitem__: _set_item,
    torch.where: _where,
    Tensor.where: _where_method,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
