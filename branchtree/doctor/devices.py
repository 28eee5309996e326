"""PyTorch, the driver, GPUs and their free memory, and a matrix product on the device that runs would use."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from branchtree.doctor.check import Check

if TYPE_CHECKING:
    import torch

    from branchtree.recipe import Recipe

DRIVER = Path("/proc/driver/nvidia/version")
SECONDS = 2.0
"""How long matrices are multiplied."""
SIZES = {"cpu": 1024, "cuda": 8192}
ROUNDINGS = 32
"""The relative error of a product that is still taken for rounding, in units of the precision."""
BUSY = 0.5
"""The fraction of a GPU's memory that others may use before it is worth a warning."""
CPU_ONLY = "recipes of published models need a GPU; bundled small models, and --smoke of any recipe, run on a CPU"


def check_torch() -> Iterator[Check]:
    """Import PyTorch, and see whether it can use an accelerator."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.accelerator.is_available()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    text = f"PyTorch {torch.__version__}, built for {built}; {driver_version()}"
    if available:
        yield Check("accelerator", "ok", text)
        return
    why = " ".join(" ".join(str(each.message).split()) for each in caught)
    if torch.version.cuda and (why or DRIVER.is_file()):
        remedy = "install a driver for this CUDA version, or the build of PyTorch for this driver (pytorch.org)"
        yield Check("accelerator", "fail", f"{text}, and PyTorch cannot use it: {why or 'no device is seen'}", remedy)
    else:
        yield Check("accelerator", "warn", f"{text}; no accelerator is found", CPU_ONLY)


def driver_version() -> str:
    """Return the NVIDIA driver's version in words."""
    if not DRIVER.is_file():
        return "no NVIDIA driver"
    found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text(encoding="utf-8", errors="replace"))
    return f"NVIDIA driver {found[1] if found else 'of unknown version'}"


def check_memory(recipe: Recipe | None) -> Iterator[Check]:
    """Look at each accelerator's free memory, and compare it with the plan of a recipe.

    Raises DeviceMemoryError where a run would not start.
    """
    import torch

    from branchtree.planning.gpus import GIB, all_device_memory, device_memory
    from branchtree.planning.preflight import TrainingNeed, require_memory

    for memory in all_device_memory():
        library = torch.get_device_module(torch.device(memory.name))
        named = library.get_device_name(torch.device(memory.name)) if hasattr(library, "get_device_name") else ""
        text = f"{memory.name} {named}: {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB are free"
        busy = memory.free < BUSY * memory.total
        remedy = "end what else uses it (nvidia-smi), or choose others by CUDA_VISIBLE_DEVICES" if busy else ""
        yield Check("memory", "warn" if busy else "ok", text, remedy)
    here = device_memory()
    if recipe is not None and here is not None:
        require_memory(recipe, force=False)
        need = TrainingNeed.of(recipe).estimate().device / GIB
        yield Check("memory", "ok", f"{recipe.name} needs {need:.1f} GiB of {here.name} by the plan's estimate")


def check_product() -> Iterator[Check]:
    """Multiply matrices for some seconds, and compare the result with another product of the same numbers."""
    import torch

    from branchtree.planning.devices import named_device

    device = named_device("auto")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    size = SIZES[device.type]
    first, second = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    product, rate = _products(first, second)
    rows = product[:8].double().cpu()
    wanted = first[:8].double().cpu() @ second.double().cpu()
    error = ((rows - wanted).norm() / wanted.norm()).item()
    named = f"{rate / 1e12:.0f} TFLOP/s" if rate > 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
    text = f"{named} in {str(dtype).removeprefix('torch.')} on {device}, relative error {error:.1e}"
    if error < ROUNDINGS * torch.finfo(dtype).eps:
        yield Check("matrix product", "ok", text)
    else:
        yield Check("matrix product", "fail", text, "the device computes wrongly: update its driver, or test the card")


def _products(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the product, and the operations a second of repeating it."""
    import torch

    def synchronised() -> float:
        if first.device.type == "cuda":
            torch.cuda.synchronize(first.device)
        return time.perf_counter()

    product = first @ second
    start, done = synchronised(), 0
    while (elapsed := synchronised() - start) < SECONDS:
        product = first @ second
        done += 1
    return product, 2 * len(first) ** 3 * done / elapsed
