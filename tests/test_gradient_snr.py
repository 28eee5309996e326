"""The statistics of benchmarks/gradient_snr.py on gradients whose signal and noise are known."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "gradient_snr.py"
    spec = importlib.util.spec_from_file_location("gradient_snr", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["gradient_snr"] = module
    spec.loader.exec_module(module)
    return module


DIMENSIONS, COUNT = 400, 24
SIGNAL, NOISE = 0.5, 1.0  # squared length of the mean gradient, and the noise's mean squared length


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Inner products of gradients with a known mean, and their components along half of it and a right angle."""
    source = torch.Generator().manual_seed(seed)
    mean = torch.zeros(DIMENSIONS, dtype=torch.float64)
    mean[0] = math.sqrt(SIGNAL)
    noise = torch.randn(COUNT, DIMENSIONS, generator=source, dtype=torch.float64) * math.sqrt(NOISE / DIMENSIONS)
    vectors = mean + noise
    slanted = torch.zeros(DIMENSIONS, dtype=torch.float64)
    slanted[:2] = math.sqrt(0.5)
    return vectors @ vectors.T, vectors @ slanted


def test_figures_are_right_on_average_and_their_errors_are_the_spread(benchmark: ModuleType) -> None:
    """Over 200 data sets the mean lies within 4 standard errors; jackknife errors within a quarter of the spread."""
    wanted = {"snr": SIGNAL / NOISE, "useful": 0.5 * SIGNAL / (SIGNAL + NOISE)}
    for name, truth in wanted.items():
        values, errors = [], []
        for seed in range(200):
            gram, onto = drawn(seed)
            measure = (
                (lambda chosen, gram=gram: benchmark.snr(gram[chosen][:, chosen]))
                if name == "snr"
                else (lambda chosen, gram=gram, onto=onto: benchmark.useful(gram[chosen][:, chosen], onto[chosen]))
            )
            value, error = benchmark.jackknife(measure, COUNT)
            values.append(value)
            errors.append(error)
        found, spread = torch.tensor(values), float(torch.tensor(values).std())
        # The ratio of two estimates has a bias of the order of its variance.
        assert abs(float(found.mean()) - truth) < 4 * spread / math.sqrt(200) + spread**2
        assert float(torch.tensor(errors).mean()) == pytest.approx(spread, rel=0.25)


def test_cosine_is_the_mean_over_pairs(benchmark: ModuleType) -> None:
    vectors = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    expected = (0 + math.sqrt(0.5) + math.sqrt(0.5)) / 3
    assert benchmark.cosine(vectors @ vectors.T) == pytest.approx(expected)


def test_as_many_prompts_as_the_rows_pay_for(benchmark: ModuleType) -> None:
    """A Dense tree: 203 rows and 187 trained ones, which count three times."""
    assert benchmark.prompts_within("quickstart+branchgrpo", 3 * (203 + 3 * 187)) == 3
    assert benchmark.prompts_within("quickstart+branchgrpo", 10) == 1
