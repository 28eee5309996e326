"""A branchtree plug-in in miniature: two model families, one reward, one callback and one recipe.

The entry point in pyproject.toml names this module; branchtree calls its hooks.
"""

from collections.abc import Callable
from pathlib import Path

from branchtree.plugins import Register, hookimpl
from branchtree_guest.model import GuestGaussian, GuestGaussianConfig
from branchtree_guest.reward import Brightness, BrightnessConfig
from branchtree_guest.sd3 import SD3, SD3Config
from branchtree_guest.watch import BestIteration, BestIterationConfig


@hookimpl
def register_models(register: Register) -> None:
    """Register the model families ``guest_gaussian`` and ``guest_sd3``."""
    register("guest_gaussian", build=GuestGaussian, config=GuestGaussianConfig, summary="A Gaussian for each prompt.")
    register("guest_sd3", build=SD3, config=SD3Config, summary="Stable Diffusion 3 (diffusers).")


@hookimpl
def register_rewards(register: Register) -> None:
    """Register the reward ``guest_brightness``."""
    register("guest_brightness", build=Brightness, config=BrightnessConfig, summary="How bright an image is.")


@hookimpl
def register_callbacks(register: Register) -> None:
    """Register the callback ``guest_best``."""
    register("guest_best", build=BestIteration, config=BestIterationConfig, summary="Notes the best iteration.")


@hookimpl
def register_recipes(register: Callable[[Path], None]) -> None:
    """Register the folder that holds ``guest.yaml``."""
    register(Path(__file__).parent / "recipes")
