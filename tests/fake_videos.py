"""Small clips as files: what a run of a video model leaves behind, written without the library's own writer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageChops

FRAMES, FPS = 9, 8
STRIP = (0, 1, 2, 3, 5, 6, 7, 8)


def clip(still: Image.Image, turn: float) -> list[Image.Image]:
    """A picture that slides along a circle, starting where ``turn`` of it is done."""
    angles = [math.tau * (turn + place / FRAMES) for place in range(FRAMES)]
    return [ImageChops.offset(still, round(5 * math.cos(a)), round(5 * math.sin(a))) for a in angles]


def write_mp4(path: Path, frames: Sequence[Image.Image], codec: str = "h264") -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    path.write_bytes(buffer.getvalue())


def write_webp(path: Path, frames: Sequence[Image.Image]) -> None:
    first, *rest = [frame.convert("RGB") for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=1000 // FPS, loop=0, lossless=True)


def side_by_side(frames: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = frames[0].size
    sheet = np.zeros((height * -(-len(frames) // columns), width * columns), np.uint8)
    for place, frame in enumerate(frames):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = np.asarray(frame)
    return Image.fromarray(sheet)
