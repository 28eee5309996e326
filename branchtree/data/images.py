"""Pictures read from files as 8-bit RGB. What would have to be clipped, or is several pictures, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from branchtree.errors import DataError
from branchtree.files.reading import require_content

if TYPE_CHECKING:
    from PIL import Image

CAMERA = "MPO"  # a camera's JPEG, whose second picture is a preview
SIXTEEN_BITS = frozenset({"PNG", "PPM"})  # formats whose pictures of Pillow's mode "I" have 16 bits
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF files
WHITE_IS_ZERO = 0


def read_image(path: Path, at: str, upright: bool = False) -> Image.Image:
    """Read the picture in a file as RGB.

    Alpha channels and colour profiles are dropped, as by Pillow's ``convert("RGB")``. A grey picture with more than 8
    bits is reduced to the highest 8, as Pillow does with colours of 16 bits.

    Args:
        path: The file; its format is found from its content, not its name.
        at: The beginning of an error's message.
        upright: Whether to turn the picture as its EXIF data asks. Pillow itself turns TIFF and AVIF pictures.

    Raises:
        DataError: The file is missing, damaged, no picture, several pictures, or has numbers without a stated range.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    require_content(path, at)
    try:
        with Image.open(path) as image:
            _require_one(image, path, at)
            bits = _grey_bits(image, path, at)
            shown = ImageOps.exif_transpose(image) if upright else image
            if bits is not None:
                shown = Image.fromarray((np.asarray(shown) >> (bits - 8)).astype(np.uint8))
            shown.load()
            shown.info.pop("transparency", None)  # which colour cannot be seen; Pillow warns where it is left out
            return shown.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{at}file '{path}' is no image; give a PNG or JPEG file") from None
    except Image.DecompressionBombError:
        raise DataError(f"{at}image '{path}' has too many pixels for Pillow to read; give a smaller one") from None
    except Exception as error:  # decoders raise many kinds; each means that the picture cannot be read
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"{at}image '{path}' cannot be read: {reason}; give a whole PNG or JPEG file") from None


def _require_one(image: Image.Image, path: Path, at: str) -> None:
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == CAMERA:
        return
    if image.format == "TIFF":
        raise DataError(f"{at}image '{path}' holds {count} pages; give one of them, as a file of its own")
    raise DataError(f"{at}image '{path}' is an animation; give one frame of it, or the whole as an MP4 video")


def _grey_bits(image: Image.Image, path: Path, at: str) -> int | None:
    """Return the number of bits of white in a grey picture that Pillow would clip to 8; None for other pictures."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise DataError(f"{at}image '{path}' has more than 8 bits, and 0 for white; save it with 0 for black")
        return int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    if image.mode == "I" and image.format in SIXTEEN_BITS:
        return 16
    if image.mode in {"I", "F"}:
        what = "32-bit whole numbers" if image.mode == "I" else "decimal numbers"
        raise DataError(
            f"{at}image '{path}' is made of {what}, and does not state which of them is white; save it as a PNG file "
            "of 8 or 16 bits"
        )
    return None
