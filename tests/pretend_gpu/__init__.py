"""A pretended GPU for the test suite; README.md beside this file says what it does and what it cannot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from pretend_gpu.counts import Counts, Event, Site
from pretend_gpu.cuda import ACCELERATOR, CUDA, PretendGenerator
from pretend_gpu.functions import PretendFunctions
from pretend_gpu.tensor import GPU, PretendBackward, PretendTensor

__all__ = ["Counts", "Event", "PretendTensor", "Site", "pretend_gpu"]


@contextmanager
def pretend_gpu(device: str = "cuda") -> Iterator[Counts]:
    """A context in which there is one GPU, which accelerate calls ``device``: ``cuda``, or with an index.

    Gives what is counted. All that is changed is put back at the end.
    """
    from accelerate.state import AcceleratorState

    GPU.counts.clear()
    run, backward = threading.Thread.run, torch.autograd._engine_run_backward

    def run_pretending(thread: threading.Thread) -> None:
        with PretendFunctions():
            run(thread)

    def backward_pretending(*args: Any, **options: Any) -> Any:
        # It is called where calls are not seen, since it is one itself; blocks that are computed again must be.
        with PretendFunctions(), PretendBackward():
            return backward(*args, **options)

    swapped = torch.__future__.get_swap_module_params_on_conversion()
    named = {} if device == "cuda" else {"ACCELERATE_TORCH_DEVICE": device}
    patches = [
        mock.patch.dict("os.environ", {"ACCELERATE_USE_CPU": "false", **named}),
        mock.patch.multiple(torch.cuda, **CUDA),
        mock.patch.multiple(torch.accelerator, **ACCELERATOR),
        mock.patch.object(torch, "Generator", PretendGenerator),
        mock.patch.object(threading.Thread, "run", run_pretending),
        mock.patch.object(torch.autograd, "_engine_run_backward", backward_pretending),
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for patch in patches:
            patch.start()
        torch.__future__.set_swap_module_params_on_conversion(True)
        with PretendFunctions():
            yield GPU.counts
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        for patch in reversed(patches):
            patch.stop()
        AcceleratorState._reset_state(reset_partial_state=True)
        GPU.pinned.clear()
