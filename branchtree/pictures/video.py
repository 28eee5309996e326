"""Frames as files that play in a browser: MP4 for samples, animated WebP for thumbnails."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

CRF = "18"  # x264's constant quality: artefacts of the codec are not to be taken for the model's
WEBP_QUALITY = 80
LOSSLESS = 64  # pixels of the longer side up to which a thumbnail is kept exactly
# As H.264 numbers them (ITU-T H.273): the sRGB primaries and curve, and the matrix that players without a tag assume.
BT709, BT601, LIMITED_RANGE = 1, 6, 1


def mp4(frames: Iterable[Image.Image], fps: float) -> bytes:
    """RGB frames of one size as an H.264 MP4 file's content; an odd width or height gets one more pixel of its edge."""
    import av

    rate = Fraction(fps).limit_denominator(1001)
    stream = None
    with tempfile.TemporaryDirectory() as folder:
        # In a file, not in memory: putting the index first, so that a browser can start early, rewrites the file.
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            for place, frame in enumerate(frames):
                pixels = _even(np.asarray(frame))
                stream = stream or _stream(container, rate, pixels)
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601")
                picture.pts, picture.time_base = place, 1 / rate
                container.mux(stream.encode(picture))
            if stream is not None:
                container.mux(stream.encode())
        return path.read_bytes()


def _stream(container: OutputContainer, rate: Fraction, pixels: NDArray[np.uint8]) -> VideoStream:
    stream = container.add_stream("h264", rate=rate, options={"crf": CRF, "preset": "fast"})
    stream.height, stream.width = pixels.shape[:2]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.colorspace, context.color_range = BT601, LIMITED_RANGE
    context.color_primaries = context.color_trc = BT709
    return stream


def _even(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) with both lengths even: half the resolution of colour needs pairs."""
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def webp(frames: Sequence[Image.Image], fps: float) -> bytes:
    """RGB frames of one size as an animated WebP file's content that plays for ever; exact if they are small."""
    ends = [round(1000 * place / fps) for place in range(len(frames) + 1)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=[end - start for start, end in pairwise(ends)],  # milliseconds
        loop=0,
        lossless=max(frames[0].size) <= LOSSLESS,
        quality=WEBP_QUALITY,
    )
    return buffer.getvalue()


def spread_evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced, the first and the last among them."""
    shown = min(count, most)
    return [round(place * (count - 1) / max(shown - 1, 1)) for place in range(shown)]
