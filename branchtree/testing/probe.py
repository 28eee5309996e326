"""How the promises handle an adapter: loading it, asking it for predictions, comparing, counting rows.

Axis letters: B rows of a batch. ``*latent`` is the shape of one sample's latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Conditioning, LoraSettings
from branchtree.testing.case import AdapterCase
from branchtree.training.loading import train_all

CPU, HALF, SINGLE = torch.device("cpu"), torch.bfloat16, torch.float32
SIGMAS = (0.9, 0.3, 0.6, 0.1)


def load(case: AdapterCase, dtype: torch.dtype = torch.float32, path: Path | None = None) -> ModelAdapter:
    """Load the case's model, or the one that was exported to ``path``, on the CPU and trainable as a whole."""
    adapter = case.build() if path is None else case.build(**{case.path_key: str(path)})
    adapter.load(CPU, dtype, dtype)
    adapter.denoiser.eval()
    train_all(adapter)
    return adapter


def load_trained(case: AdapterCase, variant: str, dtype: torch.dtype = torch.float32, seed: int = 5) -> ModelAdapter:
    """Load the case's model and change weights: all of them, or (``"lora"``) its LoRA alone."""
    adapter = load(case, dtype)
    if variant == "lora":
        adapter.add_lora(require_lora(case), seed)
    randomise(adapter.denoiser, seed)
    return adapter


def require_lora(case: AdapterCase) -> LoraSettings:
    """Return the case's LoRA; skip the test of a model that takes none."""
    if case.lora is None:
        pytest.skip("this model takes no LoRA")
    return case.lora


class LoadedOnce:
    """Promises about a model that they leave as it is share one loading of it."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, case: AdapterCase) -> ModelAdapter:
        """The case's model in float32; the tests leave it as it is."""
        return load(case)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 5) -> None:
    """Move every trainable weight, LoRA's zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))


@contextmanager
def disturbed(seed: int) -> Iterator[None]:
    """Set torch's global random state from ``seed``, and assert that the block draws nothing from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), before)


def same_samples(first: Samples, second: Samples) -> bool:
    """Return whether samples are equal in all fields, tensors to the bit."""
    if type(first) is not type(second):
        return False
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(
        torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        for one, other in pairs
    )


def trainable_parameters(adapter: ModelAdapter) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: value for name, value in adapter.denoiser.named_parameters() if value.requires_grad}


def state(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return a copy of all the denoiser holds."""
    return {name: value.detach().clone() for name, value in adapter.denoiser.state_dict().items()}


def require_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Assert that two sets of named tensors are equal, to the bit and in their dtypes."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), f"'{name}' differs"


def require_close(found: Tensor, expected: Tensor, tolerance: float, least: float = 1e-3) -> None:
    """Assert that two tensors differ by at most ``tolerance`` of the largest number expected, or of ``least``."""
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()), least)
    assert float((found.float() - expected.float()).abs().max()) <= tolerance * scale


def states_of(adapter: ModelAdapter, case: AdapterCase, rows: int) -> Tensor:
    """Return states (B, *latent): the case's own, or starting latents, another generator for each row."""
    if case.states is not None:
        return case.states(rows)
    return torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(rows)])


@dataclass(frozen=True)
class Question:
    """The arguments of ``predict``: B rows."""

    latents: Tensor  # (B, *latent)
    sigma: Tensor  # (B,)
    conditioning: Conditioning

    def __getitem__(self, rows: Sequence[int]) -> Question:
        chosen = list(rows)
        conditioning = {name: value[chosen] for name, value in self.conditioning.items()}
        return Question(self.latents[chosen], self.sigma[chosen], conditioning)


def make_question(adapter: ModelAdapter, case: AdapterCase) -> Question:
    """Return four rows that differ in everything: latents, noise level, and the first two conditions in turn."""
    encoded = adapter.encode(case.conditions[:2])
    return Question(
        states_of(adapter, case, len(SIGMAS)),
        torch.tensor(SIGMAS),
        {name: value[[0, 1, 0, 1]] for name, value in encoded.items()},
    )


def predict_rows(adapter: ModelAdapter, asked: Question, denoiser: nn.Module | None = None) -> Tensor:
    """Return what the adapter predicts, without a gradient."""
    with torch.no_grad():
        return adapter.predict(asked.latents, asked.sigma, asked.conditioning, denoiser)


@dataclass
class Rows:
    """Rows that went through a module, without and with a gradient."""

    rollout: int = 0
    gradient: int = 0


@contextmanager
def counted_rows(module: nn.Module) -> Iterator[Rows]:
    """Count the rows of all that ``module`` returns in this context."""
    rows = Rows()

    def count(_: nn.Module, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            rows.gradient += _first_axis(output)
        else:
            rows.rollout += _first_axis(output)

    handle = module.register_forward_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def _first_axis(output: Any) -> int:
    """Return the rows of what a module returned: a tensor's, or a list's entries, first in a tuple or a mapping."""
    if isinstance(output, Tensor | list):
        return len(output)
    return _first_axis(next(iter(output.values())) if isinstance(output, Mapping) else output[0])
