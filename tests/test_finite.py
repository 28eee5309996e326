"""The check for numbers that are not finite, against torch's own flags."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from branchtree.core.finite import is_finite

NUMBERS = st.lists(st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(numbers=NUMBERS)
def test_it_agrees_with_a_flag_for_every_number(dtype: torch.dtype, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=dtype)
    assert is_finite(values) == bool(values.isfinite().all())


def test_whole_numbers_are_finite() -> None:
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor([True, False]))
