"""Masked diffusion over tokens for branchtree: 4x4 sudoku and three-digit addition, on rewards that verify.

The entry point in pyproject.toml names this module; branchtree calls its hooks.
"""

from collections.abc import Callable
from pathlib import Path

from branchtree.plugins import Register, hookimpl
from branchtree_tokens.model import Addition, Sudoku, TokenConfig
from branchtree_tokens.rewards import AdditionConfig, AdditionReward, SudokuConfig, SudokuReward
from branchtree_tokens.samples import Grids, Texts
from branchtree_tokens.unmask import UnmaskConfig, build_unmask


@hookimpl
def register_models(register: Register) -> None:
    """Register a model family for each task."""
    register("tokens_sudoku", build=Sudoku, config=TokenConfig, summary="Masked diffusion on 4x4 sudoku.")
    register("tokens_addition", build=Addition, config=TokenConfig, summary="Masked diffusion on addition.")


@hookimpl
def register_samples(register: Register) -> None:
    """Register both kinds of samples."""
    register("grid", build=Grids, summary="4x4 sudoku grids.")
    register("text", build=Texts, summary="Sums of three digits.")


@hookimpl
def register_rewards(register: Register) -> None:
    """Register a reward for each task."""
    register("sudoku", build=SudokuReward, config=SudokuConfig, summary="Which rules of a 4x4 sudoku hold.")
    register("addition", build=AdditionReward, config=AdditionConfig, summary="Which digits of a sum are right.")


@hookimpl
def register_transitions(register: Register) -> None:
    """Register ``unmask``."""
    register("unmask", build=build_unmask, config=UnmaskConfig, summary="Reveals tokens in a fixed order.")


@hookimpl
def register_recipes(register: Callable[[Path], None]) -> None:
    """Register the recipes of both tasks."""
    register(Path(__file__).parent / "recipes")
