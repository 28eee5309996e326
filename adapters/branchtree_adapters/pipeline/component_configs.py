"""Configuration files of a pipeline's components: keys that a library would replace by its defaults without a word."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchtree.errors import ModelError
from branchtree.files.json_lines import read_json_object

INCOMPLETE = "the folder is incomplete or damaged: get it again"
DYNAMIC_SHIFT = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
PREPROCESSOR = "preprocessor_config.json"
PREPROCESSING = ("do_resize", "do_center_crop", "do_normalize", "image_mean", "image_std", "resample", "size")
"""Settings of image processors that every version has written; they differ between models."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model. Raises ModelError."""
    try:
        return read_json_object(file, ModelError, infinite=True)
    except ModelError as error:
        raise ModelError(f"{error}; {INCOMPLETE}.") from None


def check_config(kind: Any, folder: Path) -> None:
    """Refuse a model's config.json that is of another class or has a damaged key. Raises ModelError."""
    _check_keys(kind, folder / "config.json", read_json(folder / "config.json"))


def check_scheduler(kind: Any, folder: Path) -> None:
    """Refuse a scheduler's configuration that leaves the time grid to its class's defaults. Raises ModelError."""
    file = folder / "scheduler_config.json"
    content = read_json(file)
    _check_keys(kind, file, content)
    known = inspect.signature(kind.__init__).parameters
    flows = "shift" in known or bool(content.get("use_flow_sigmas"))  # by its class, or where its file says so
    needed = [name for name in ("shift", "flow_shift") if name in known and flows][:1]
    if content.get("use_dynamic_shifting") or any(name in content for name in DYNAMIC_SHIFT):
        needed += [name for name in ("use_dynamic_shifting", *DYNAMIC_SHIFT) if name in known]
    missing = [name for name in needed if name not in content]
    if missing:
        raise ModelError(
            f"'{file}' lacks {', '.join(missing)}, for which {kind.__name__} would take its defaults: another time "
            "grid than the model was trained for; get the file again, or write the keys into it."
        )


def _check_keys(kind: Any, file: Path, content: Mapping[str, Any]) -> None:
    stated = content.get("_class_name", kind.__name__)
    if stated != kind.__name__:
        raise ModelError(
            f"'{file}' is of {stated}, and model_index.json names {kind.__name__}; make the two agree, or get both "
            "files again."
        )
    config = getattr(kind, "config_class", None)
    known = set(inspect.signature(kind.__init__).parameters if config is None else config().to_dict())
    absent = sorted(known - content.keys())
    for key in sorted(content.keys() - known):
        for right in absent:
            if len(key) == len(right) and sum(a != b for a, b in zip(key, right, strict=True)) == 1:
                raise ModelError(
                    f"'{file}' has a key '{key}', and no '{right}'; correct the key, or get the file again."
                )


def check_image_processor(processor: Any, folder: Path, encoder: Mapping[str, Any]) -> None:
    """Refuse an image processor whose file leaves settings to the class's defaults, or gives another image size.

    ``encoder`` is the configuration of what takes the images. Raises ModelError.
    """
    from PIL import Image

    file = folder / PREPROCESSOR
    content = read_json(file)
    missing = [name for name in PREPROCESSING if getattr(processor, name, None) is not None and name not in content]
    if getattr(processor, "do_center_crop", None) and "crop_size" not in content:
        missing.append("crop_size")
    if missing:
        raise ModelError(
            f"'{file}' lacks {', '.join(missing)}, for which {type(processor).__name__} would take its defaults: "
            "images would be prepared for another encoder; get the file again, or write the keys into it."
        )
    made = tuple(processor(Image.new("RGB", (64, 48)), return_tensors="pt").pixel_values.shape[-2:])
    side = encoder.get("image_size", made[0])
    if made != (side, side):
        raise ModelError(
            f"'{file}' makes images of {made[0]} x {made[1]} pixels, and the encoder takes {side} x {side}; get the "
            "file again, or correct its size."
        )
