"""A recipe that was made of another trainer's settings, and what became of each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchtree.errors import RecipeError, shown
from branchtree.recipe.load import load_recipe
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import write_yaml

PAGE = "docs/migrating.md"
BASES: Mapping[str, str] = {
    "FLUX.1-Kontext": "flux_kontext_edit_branchgrpo",
    "FLUX.1": "flux_t2i_branchgrpo",
    "stable-diffusion-3.5-medium": "sd35_t2i_branchgrpo",
    "Qwen-Image-Edit": "qwen_edit_branchgrpo",
    "Qwen-Image": "qwen_image_t2i_branchgrpo",
    "Wan2.1-T2V": "wan_t2v_motion",
    "Wan2.1-I2V": "wan_i2v_motion",
    "stable-diffusion-xl": "sdxl_t2i_branchgrpo",
    "stable-diffusion-v1-5": "sd15_t2i_branchgrpo",
}
"""The bundled recipe for a model, by a piece of the model's name; the first that fits."""
GUIDANCE = {"flux": "model.guidance", "wan": "model.guidance", "qwen": "model.call.true_cfg_scale"}
"""The key of classifier-free guidance by the beginning of a recipe's name; ``model.call.guidance_scale`` in others."""


@dataclass(frozen=True)
class ConvertedConfig:
    """A recipe out of another trainer's configuration."""

    recipe: str  # YAML, with what became of each setting in comments
    unknown: Mapping[str, str]  # settings without a counterpart, as they were written


@dataclass
class Conversion:
    """What a recipe is made of while a configuration is gone through; every setting is taken once."""

    source: str  # the file, and the configuration in it
    trainer: str
    settings: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)  # of the recipe, dotted
    notes: dict[str, str] = field(default_factory=dict)  # by setting, in which way the recipe's is another

    def take(self, name: str, default: Any = None) -> Any:
        """Return a setting, which is then dealt with."""
        return self.settings.pop(name, default)

    def number(self, name: str, default: float | None = None) -> Any:
        """Return a setting that is a number; one that is none is left among those without a counterpart."""
        value = self.settings.get(name, default)
        if isinstance(value, str):
            try:
                value = float(value) if any(letter in value for letter in ".eE") else int(value)
            except ValueError:
                return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            return default
        self.settings.pop(name, None)
        return value

    def rename(self, names: Mapping[str, str]) -> None:
        """Put numbers under the recipe's keys."""
        for name, key in names.items():
            if (value := self.number(name)) is not None:
                self.keys[key] = value

    def note(self, name: str, text: str) -> None:
        """Say in which way the recipe departs from a setting, which is then dealt with."""
        self.settings.pop(name, None)
        self.notes[name] = text

    def drop(self, names: Iterable[str]) -> None:
        """Deal with settings that hold here whatever they say."""
        for name in names:
            self.settings.pop(name, None)

    def finish(self, name: str, extends: str) -> ConvertedConfig:
        """Return the recipe, with a comment for every setting that is not taken over as it is."""
        unknown = {key: shown(value) for key, value in self.settings.items()}
        lines = [f"Made of {self.source}, a configuration of {self.trainer}; {PAGE} has the reasons."]
        lines += ["", "Not the same here:"] if self.notes else []
        lines += [f"  {key}: {text}" for key, text in self.notes.items()]
        lines += ["", "Without a counterpart, and left out:"] if unknown else []
        lines += [f"  {key} = {value}" for key, value in unknown.items()]
        comment = "".join(f"# {one_line(line)}".rstrip() + "\n" for line in lines)
        described = f"{Path(self.source).name}, made of a configuration of {self.trainer}"
        head = {"extends": extends, "name": name, "description": described}
        return ConvertedConfig(comment + write_yaml({**head, **_nested(self.keys)}), unknown)


def one_line(text: str) -> str:
    """Return a text that stays on one line of a comment."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as sections."""
    data: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, last = key.split(".")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return data


def choose_base(model: str, base: str | None, where: str) -> Recipe:
    """Return the recipe that the converted one extends. Raises RecipeError where none is about the model."""
    found = base or next((name for piece, name in BASES.items() if piece in model), None)
    if found is None:
        raise RecipeError(
            f"{where}: no bundled recipe is about the model '{model}'; name the nearest with --base RECIPE"
        )
    return load_recipe(found)


def guidance_key(recipe: Recipe) -> str:
    """Return the key of a recipe that holds the scale of guidance."""
    return next((key for name, key in GUIDANCE.items() if recipe.name.startswith(name)), "model.call.guidance_scale")


def same_name(one: str, other: Any) -> bool:
    """Return whether two models are called the same, wherever they lie."""
    return Path(one).name.lower() == Path(str(other)).name.lower()
