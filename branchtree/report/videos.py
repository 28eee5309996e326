"""Videos as data URIs, after a check that they are complete and of the expected format."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from branchtree.report.files import content, data_uri

LARGEST_VIDEO = 8 * 1024**2  # bytes; a page has two


@dataclass(frozen=True)
class Video:
    """An embedded video and the size of its frames."""

    uri: str
    width: int
    height: int


def embed_video(path: Path, folder: Path) -> Video | None:
    """Embed an MP4 file under ``folder``; None if it is missing, too large, cut off, or not H.264."""
    import av

    data = content(path, folder, LARGEST_VIDEO)
    if data is None:
        return None
    try:
        # The format is named, as guessing may find a playlist, and a playlist makes the reader open other files.
        with av.open(io.BytesIO(data), "r", format="mp4") as container:
            stream = container.streams.video[0]
            if stream.codec_context.name != "h264":
                return None
            packets = [packet for packet in container.demux(stream) if packet.size]
            if len(packets) != stream.frames or any(packet.is_corrupt for packet in packets):
                return None
            container.seek(0)
            frame = next(container.decode(stream))
    except (av.error.FFmpegError, OSError, ValueError, IndexError, StopIteration):
        return None
    return Video(data_uri("video/mp4", data), frame.width, frame.height)
