"""The model keeps the promises that branchtree relies on."""

import pytest

from branchtree.testing import AdapterCase, ModelAdapterPromises, TrainingPromises


@pytest.fixture(scope="module")
def case() -> AdapterCase:
    return AdapterCase(
        model={"adapter": "guest_gaussian"},
        reward={"reward": "guest_brightness"},
        prompts=["a lamp", "the sun", "a candle"],
    )


class TestGuestGaussian(ModelAdapterPromises, TrainingPromises):
    """Nothing to add: every test is inherited."""
