"""The pretended GPU itself: it refuses what CUDA refuses, counts what blocks, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from pretend_gpu import Counts, Event, PretendTensor, pretend_gpu
from torch import Tensor, nn
from torch.nn import functional

from branchtree.core.transfer import fetch_rows, send
from branchtree.planning.devices import indexed, named_device

CUDA = torch.device("cuda:0")


@pytest.fixture
def counts() -> Iterator[Counts]:
    with pretend_gpu() as counted:
        yield counted


def times(counts: Counts, event: Event) -> int:
    return sum(number for (found, _), number in counts.events.items() if found is event)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda a, host: a + host, "Expected all tensors to be on the same device"),
        (lambda a, host: nn.Linear(3, 3)(a), "Expected all tensors to be on the same device"),
        (lambda a, host: host[a.argsort(0)], "indices should be either on cpu"),
        (lambda a, host: a.index_put((torch.tensor([0], device=CUDA),), host[:1]), "Expected all tensors"),
        (lambda a, host: a.numpy(), "can't convert cuda:0 device type tensor to numpy"),
        (lambda a, host: torch.cuda.set_device(torch.device("cuda")), "Expected a torch.device with a specified index"),
        (lambda a, host: torch.cuda.set_device(1), "invalid device ordinal"),
        (lambda a, host: a.normal_(generator=torch.Generator()), "Expected a 'cuda' device type for generator"),
        (lambda a, host: torch.randn(2, generator=torch.Generator(), device="cuda"), "'cuda' device type"),
        (lambda a, host: host.normal_(generator=torch.Generator("cuda")), "Expected a 'cpu' device type"),
        (lambda a, host: attention(a, a.bfloat16()), "to have the same dtype"),
        (lambda a, host: attention(a, a, a.double()), "attn_mask dtype"),
        (lambda a, host: a.pin_memory(), "only dense CPU tensors can be pinned"),
    ],
)
def test_what_cuda_refuses_is_refused(counts: Counts, work: Callable[[Tensor, Tensor], object], message: str) -> None:
    host = torch.ones(3, 3)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        work(host.to("cuda"), host)


def attention(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(query[None, None], key[None, None], key[None, None], attn_mask=mask)


def test_numbers_gradients_and_parameters_are_the_cpus(counts: Counts) -> None:
    torch.manual_seed(0)
    layer, data, choice = nn.Linear(3, 3), torch.randn(2, 4, 3), torch.tensor([1, 0, 0])

    def answers(device: str) -> list[Tensor]:
        inputs = data.to(device)
        out = functional.scaled_dot_product_attention(layer(inputs)[None], inputs[None], inputs[None])[0]
        out = out.where(out > 0, 2.0)[choice.to(device)]
        out[0] = 1.5
        layer.zero_grad()
        out.square().sum().backward()
        assert layer.weight.grad is not None
        return [out.detach().cpu(), layer.weight.grad.cpu().clone()]

    plain, weight = answers("cpu"), layer.weight
    layer.to("cuda")
    assert layer.weight is weight and isinstance(weight, nn.Parameter) and weight.device == CUDA
    assert all(torch.equal(a, b) for a, b in zip(answers("cuda"), plain, strict=True))


def test_autocast_casts_as_cudas_does(counts: Counts) -> None:
    layer, inputs = nn.Linear(3, 3).to("cuda"), torch.ones(2, 3, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(inputs)
        kinds = [out.dtype, (out @ inputs.T).dtype, functional.layer_norm(out, (3,)).dtype, out.softmax(0).dtype]
        assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
        attention(inputs, inputs.bfloat16())  # both are cast


def test_what_blocks_is_counted(counts: Counts) -> None:
    host = torch.ones(4)
    device = host.to("cuda", non_blocking=True)  # not from pinned memory
    assert times(counts, Event.TO_DEVICE) == 1
    host.pin_memory().to("cuda", non_blocking=True)
    assert (times(counts, Event.TO_DEVICE), times(counts, Event.ASYNC_TO_DEVICE)) == (1, 1)
    device[torch.tensor([0, 1])]
    device[[0, 1]]
    assert times(counts, Event.TO_DEVICE) == 3
    device[device > 0]
    float(device.sum())
    torch.cuda.synchronize()
    assert times(counts, Event.SYNCHRONISE) == 3
    device.tolist()
    device.cpu()
    host.copy_(device)
    assert times(counts, Event.TO_HOST) == 3
    device[:2].add_(1).mul_(torch.tensor(2.0))  # a view, and a single number of the host: free
    assert counts.blocking().total() == 9


def test_lines_of_the_library_are_named(counts: Counts) -> None:
    send(torch.ones(2), CUDA)
    fetch_rows(torch.ones(3), torch.tensor([1]), CUDA)
    ((_, first), (_, second)) = counts.events
    assert (first.path, first.function, second.function) == ("branchtree/core/transfer.py", "send", "fetch_rows")
    assert "non_blocking=True" in first.text and not counts.blocking()


def test_what_comes_back_by_itself_is_rubbish_until_the_device_is_done(counts: Counts) -> None:
    early = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert early.isnan().all()
    torch.cuda.synchronize()
    assert early.tolist() == [1, 1]


def test_pinned_memory_must_not_change_while_it_is_sent(counts: Counts) -> None:
    pinned = torch.ones(2, pin_memory=True)
    pinned.to("cuda", non_blocking=True)
    pinned.zero_()
    with pytest.raises(RuntimeError, match="page-locked memory was written to"):
        torch.cuda.synchronize()


def test_threads_see_the_gpu_too(counts: Counts) -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(2, device="cuda")))
    thread.start()
    thread.join()
    assert isinstance(found[0], PretendTensor)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_cuda_device_has_an_index(counts: Counts, name: str) -> None:
    assert named_device(name) == CUDA
    torch.cuda.set_device(named_device(name))


def test_other_devices_stay_as_they_are() -> None:
    assert indexed(torch.device("cpu")) == torch.device("cpu")
    assert indexed(torch.device("cuda:3")).index == 3


def test_nothing_is_left_behind() -> None:
    before = [
        (torch.cuda, dict(vars(torch.cuda))),
        (torch.accelerator, dict(vars(torch.accelerator))),
        (threading.Thread, dict(vars(threading.Thread))),
        (torch.autograd, dict(vars(torch.autograd))),
    ]
    generator, swap = torch.Generator, torch.__future__.get_swap_module_params_on_conversion()
    with pytest.raises(KeyError), pretend_gpu("cuda:0"):
        assert torch.cuda.is_available()
        raise KeyError
    assert all(vars(module)[name] is value for module, names in before for name, value in names.items())
    assert torch.Generator is generator and torch.__future__.get_swap_module_params_on_conversion() is swap
    assert not torch.cuda.is_available() and not torch.overrides._is_torch_function_mode_enabled()
