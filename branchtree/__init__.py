"""branchtree: tree-structured reinforcement learning for diffusion and flow-matching models.

Implements BranchGRPO (arXiv 2509.06040) on one core for images and videos; models and rewards are plug-ins.
"""

from branchtree.api import (
    compare,
    convert_config,
    diversity,
    evaluate,
    export,
    plan,
    register,
    score,
    train,
    write_report,
)
from branchtree.errors import BranchTreeError
from branchtree.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "BranchTreeError",
    "Recipe",
    "compare",
    "convert_config",
    "diversity",
    "evaluate",
    "export",
    "load_recipe",
    "plan",
    "register",
    "score",
    "train",
    "write_report",
]
