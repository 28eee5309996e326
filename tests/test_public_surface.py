"""The check of what somebody else's code uses of the library sees each way around it."""

from __future__ import annotations

from textwrap import dedent

import pytest
from public_surface import uses_beyond_the_reference


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from branchtree.plugins import ModelBase, Samples", []),
        ("from branchtree.core.grid import time_grid", []),
        ("from branchtree.plugins.base import ModelBase", []),
        ("from branchtree.plugins import weights", ["branchtree.plugins.weights"]),
        ("from branchtree.plugins.registry import registry", ["branchtree.plugins.registry.registry"]),
        ("from branchtree.core.grid import torch", ["branchtree.core.grid.torch"]),
        ("from branchtree import core", ["branchtree.core"]),
        ("import branchtree.core.grid as grid", ["branchtree.core.grid"]),
        ("import importlib\nimportlib.import_module('branchtree.training')", ["'branchtree.training'"]),
        ("model._denoiser = None", ["._denoiser"]),
        ("getattr(model, '_denoiser')", ["'_denoiser'"]),
        ("class Own:\n    def read(self): return self._denoiser", ["._denoiser"]),
        ("class Own:\n    def _weights_file(self): ...", ["def _weights_file"]),
        ("class Own:\n    def _order(self): ...\n    def read(self): return self._order()", []),
        ("from other import _hidden", ["_hidden"]),
    ],
)
def test_each_way_is_seen(code: str, found: list[str]) -> None:
    assert [what for _, what in uses_beyond_the_reference(dedent(code))] == found
