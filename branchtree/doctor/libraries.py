"""Python, the versions of packages against what this distribution supports, and plug-ins."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from branchtree.doctor.check import Check

DISTRIBUTION = "branchtree-grpo"
NAMED = ("torch", "diffusers", "transformers", "accelerate", "peft")
"""Packages whose versions are always shown."""


def check_python() -> Iterator[Check]:
    """Compare Python's version with what the distribution supports."""
    supported = str(importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"])
    version = platform.python_version()
    if SpecifierSet(supported).contains(version, prereleases=True):
        yield Check("Python", "ok", f"{version} on {platform.system()} {platform.machine()}")
    else:
        remedy = f"make a virtual environment with Python {supported}, and install branchtree there"
        yield Check("Python", "fail", f"{version}, and branchtree needs {supported}", remedy)


def check_packages() -> Iterator[Check]:
    """Compare installed packages with the distribution's requirements, those of extras where they are installed."""
    required, wrong = 0, 0
    for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ()):
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        required += not optional
        check = _requirement(requirement, optional)
        if check is not None:
            wrong += not optional
            yield check
    versions = ", ".join(f"{name} {version}" for name in NAMED if (version := installed_version(name)))
    if not wrong:
        yield Check("packages", "ok", f"all {required} that are required have supported versions: {versions}")


def _requirement(requirement: Requirement, optional: bool) -> Check | None:
    """Return what is wrong with a requirement; None if nothing is, or it is of an extra and not installed."""
    version = installed_version(requirement.name)
    if version is None and optional:
        return None
    if version is not None and requirement.specifier.contains(version, prereleases=True):
        return None
    found = "is not installed" if version is None else f"is {version}"
    text = f"{requirement.name} {found}, and branchtree needs {requirement.name}{requirement.specifier}"
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    return Check("packages", "warn" if optional else "fail", text, remedy)


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, by its metadata; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_plugins() -> Iterator[Check]:
    """Load all plug-ins. Raises PluginError where two clash or one has an unknown hook."""
    from branchtree.plugins.registry import registry

    found = registry()
    for broken in found.broken:
        remedy = f"install {broken.distribution} again with what it needs, or uninstall it"
        yield Check("plug-ins", "fail", " ".join(str(broken).split()), remedy)
    entries = [*found.models.values(), *found.rewards.values()]
    distributions = ", ".join(sorted({entry.distribution for entry in entries}))
    yield Check("plug-ins", "ok", f"{len(found.models)} models and {len(found.rewards)} rewards, of {distributions}")
