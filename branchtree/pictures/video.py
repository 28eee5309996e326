"""Files of frames that play in a browser: MP4 for samples, animated WebP for thumbnails."""

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

CRF = "18"  # x264's constant quality, high enough that the codec's artefacts are not mistaken for the model's
WEBP_QUALITY = 80
LOSSLESS = 64  # thumbnails with at most this many pixels on the longer side are lossless
# Numbers of ITU-T H.273: the sRGB primaries and curve, and the matrix that players assume without a tag.
BT709, BT601, LIMITED_RANGE = 1, 6, 1


def mp4(frames: Iterable[Image.Image], fps: float) -> bytes:
    """Return RGB frames of one size as an H.264 MP4 file's content; an odd side is padded by one pixel."""
    import av

    rate = Fraction(fps).limit_denominator(1001)
    stream = None
    with tempfile.TemporaryDirectory() as folder:
        # In a file, not in memory: moving the index to the front, for an early start in browsers, rewrites the file.
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            for index, frame in enumerate(frames):
                pixels = _even(np.asarray(frame))
                stream = stream or _stream(container, rate, pixels)
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601")
                picture.pts, picture.time_base = index, 1 / rate
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
    """Pad a frame (H, W, 3) to even sides, since colours have half the resolution."""
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def webp(frames: Sequence[Image.Image], fps: float) -> bytes:
    """Return RGB frames of one size as an endless animated WebP file's content; small ones are lossless."""
    ends = [round(1000 * index / fps) for index in range(len(frames) + 1)]
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
    """Return at most ``most`` of ``count`` indices, evenly spaced, including the first and the last."""
    shown = min(count, most)
    return [round(index * (count - 1) / max(shown - 1, 1)) for index in range(shown)]
