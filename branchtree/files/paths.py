"""Types that mark a setting as the path of a file or folder, which a recipe then keeps in absolute form.

A key of a recipe, or of a plug-in's own settings, has the type ``pathlib.Path`` or ``LocalPath`` where every value is a
path, and ``PathOrName`` where a value may also be a name such as a hub id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

LOCAL = ("/", "./", "../", "~")
"""Beginnings of a text that can only be a path."""


@dataclass(frozen=True)
class PathKey:
    """A mark on the type of a setting whose value is a path: always, or where it looks like one or exists.

    ``names`` are texts that are not paths nevertheless; one that ends with a colon covers all texts that begin with it.
    """

    always: bool
    names: tuple[str, ...] = ()

    def absolute(self, value: str, folders: tuple[Path, ...]) -> str:
        """Return the path in absolute form, or a value that is no path unchanged.

        A relative path is relative to the first of ``folders``; a value that may also be a name, to the first of them
        in which it exists.
        """
        if not value or any(value == name or (name[-1] == ":" and value.startswith(name)) for name in self.names):
            return value
        plain = os.path.expanduser(value)  # leaves the home of an unknown user as it is
        if plain.startswith("~"):
            return value
        if self.always or value in {".", ".."} or value.startswith(LOCAL):
            return str((folders[0] / plain).absolute())
        holding = [folder for folder in folders if os.path.exists(folder / plain)]
        return str((holding[0] / plain).absolute()) if holding else value


LocalPath = Annotated[str, PathKey(always=True)]
"""The path of a file or folder."""
PathOrName = Annotated[str, PathKey(always=False)]
"""A path, which exists or begins with ``/``, ``./``, ``../`` or ``~``, or else a name such as a hub id."""
