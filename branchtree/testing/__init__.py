"""Promises that every model adapter and every reward keeps, as tests for any package to run over its own: needs pytest.

Give a fixture ``case`` and inherit::

    import pytest
    from branchtree.testing import AdapterCase, ModelAdapterPromises, TrainingPromises

    @pytest.fixture(scope="module")
    def case() -> AdapterCase:
        return AdapterCase(model={"adapter": "my_model"}, reward={"reward": "my_reward"}, prompts=("a cat", "a dog"))

    class TestMyModel(ModelAdapterPromises, TrainingPromises):
        pass

A reward's tests are made in the same way of ``RewardCase`` and ``RewardPromises``.
"""

import pytest

# Before the modules are imported: only then does pytest show the values of a failed assertion in them.
pytest.register_assert_rewrite(
    "branchtree.testing.loading",
    "branchtree.testing.probe",
    "branchtree.testing.rewards",
    "branchtree.testing.sampling",
    "branchtree.testing.training",
    "branchtree.testing.weights",
)

from branchtree.testing.case import AdapterCase  # noqa: E402
from branchtree.testing.loading import LoadingPromises  # noqa: E402
from branchtree.testing.rewards import RewardCase, RewardPromises, noise_media  # noqa: E402
from branchtree.testing.sampling import SamplingPromises  # noqa: E402
from branchtree.testing.training import TrainingPromises  # noqa: E402
from branchtree.testing.weights import WeightPromises  # noqa: E402

__all__ = [
    "AdapterCase",
    "LoadingPromises",
    "ModelAdapterPromises",
    "RewardCase",
    "RewardPromises",
    "SamplingPromises",
    "TrainingPromises",
    "WeightPromises",
    "noise_media",
]


class ModelAdapterPromises(LoadingPromises, SamplingPromises, WeightPromises):
    """What ``branchtree.plugins.ModelAdapter`` asks of the methods of an adapter, taken one by one."""
