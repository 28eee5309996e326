"""The reward keeps the promises that branchtree relies on."""

import pytest

from branchtree.plugins import Condition
from branchtree.testing import RewardCase, RewardPromises


@pytest.fixture(scope="module")
def case() -> RewardCase:
    prompts = ["a lamp", "the sun", "a candle", "the moon"]
    return RewardCase(reward={"reward": "guest_brightness"}, conditions=[Condition(prompt) for prompt in prompts])


class TestGuestBrightness(RewardPromises):
    """Nothing to add: every test is inherited."""
