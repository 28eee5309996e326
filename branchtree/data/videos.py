"""Videos read from files: the frames that a player shows, or an error that says why they cannot be read.

Axis letters: H height, W width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from branchtree.errors import DataError
from branchtree.files.reading import require_content

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

OPENING = {
    # Formats are named, as guessing may find a playlist, and a playlist makes the reader open other files.
    "format_whitelist": "mov,matroska,avi",
    "protocol_whitelist": "file",
}
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}  # damage is an error, not an invented frame
UNEVEN = Fraction(5, 4)
"""The longest time between two frames must be less than this many times the shortest."""
SOUND = 0.1  # the most seconds of a packet of sound
SQUARE = 0.01  # how far from 1 the ratio of a pixel's width to its height may be
HDR = {16: "PQ", 18: "HLG"}  # transfer curves, by their numbers in ITU-T H.273
ONE = 1 << 16  # 1 in the numbers of a display matrix
Axes = tuple[int, int, int, int]
"""Signs a, b, c, d: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
WHOLE = "give a whole MP4 file with H.264 video"


@dataclass(frozen=True)
class Clip:
    """The number, size and rate of a video file's frames."""

    frames: int
    height: int
    width: int
    fps: float | None  # None for a single frame whose file states no rate


def inspect_video(path: Path, at: str) -> Clip:
    """Decode a whole video to find its number, size and rate of frames; one frame is in memory at a time.

    Raises DataError, which begins with ``at`` and names the file, for a video that has no frames, is damaged or cut
    off, changes its size, has frames at uneven times, or must be turned by other angles than quarters to be shown.
    """
    frames, height, width = 0, 0, 0
    with _opened(path, at) as video:
        for frame in video.frames():
            frames += 1
            height, width = (frame.height, frame.width) if _axes(frame)[0] else (frame.width, frame.height)
        video.require_all(frames)
        return Clip(frames, height, width, video.rate())


def video_frames(path: Path, at: str) -> Generator[NDArray[np.uint8], None, None]:
    """Decode a video's frames in the order in which they are shown, as RGB bytes (H, W, 3), one at a time.

    Raises DataError as ``inspect_video`` does, except for what is known only at the end: that frames are missing, or
    come at uneven times.
    """
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()
    with _opened(path, at) as video:
        for frame in video.frames():
            pixels = convert.reformat(frame, format="rgb24").to_ndarray()
            yield _turned(pixels.astype(np.uint8, copy=False), _axes(frame))


@contextmanager
def _opened(path: Path, at: str) -> Iterator[_Video]:
    """Open a video file. Raises DataError for a file that is no video, or has no video track."""
    import av
    from av.stream import Disposition

    require_content(path, at)
    unknown = DataError(
        f"{at}video '{path}' cannot be opened: it is no video, is damaged or cut off, or is coded in a way that is not "
        f"known here; {WHOLE}"
    )
    try:
        # Opened here, since the library reads some names as addresses or as numbered series of files.
        with path.open("rb") as file, av.open(file, "r", options=OPENING, metadata_errors="replace") as container:
            stream: Any = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:
                raise DataError(f"{at}file '{path}' has no video in it; {WHOLE}")
            if stream.codec_context is None:
                raise unknown
            stream.codec_context.options = STRICT
            yield _Video(container, stream, path, at)
    except (av.error.FFmpegError, EOFError):
        raise unknown from None
    except OSError as error:
        raise DataError(f"{at}file '{path}' cannot be read: {error.strerror}") from None


class _Video:
    """An open video, which can be decoded once."""

    def __init__(self, container: InputContainer, stream: VideoStream, path: Path, at: str) -> None:
        self._container, self._stream = container, stream
        self._path, self._at = path, at
        self._times: list[int] = []  # when frames are shown, in ticks of the stream's clock
        self._span: tuple[Fraction, Fraction] | None = None  # begin and end of all tracks, in seconds

    def frames(self) -> Iterator[VideoFrame]:
        """Decode the frames that are shown. Raises DataError."""
        import av

        size, count = None, 0
        try:
            for packet in self._container.demux():
                self._note(packet, count)
                if packet.stream_index != self._stream.index:
                    continue
                for frame in self._stream.decode(packet):
                    if frame.is_corrupt:
                        raise self._damaged(count)
                    size = size or (frame.width, frame.height)
                    self._require_plain(frame, size)
                    count += 1
                    yield frame
        except (av.error.FFmpegError, EOFError):
            raise self._damaged(count) from None
        if count == 0:
            raise self._refused("has no frames", WHOLE)

    def require_all(self, frames: int) -> None:
        """Raise DataError unless as many frames were decoded as the file says that it holds."""
        if frames != len(self._times):
            raise self._refused(f"is damaged: it has {len(self._times)} frames, and {frames} can be decoded", WHOLE)
        rate = self.rate()
        missing = self._missing(frames, rate) if rate else 0
        # With sound, the stated duration may be the sound's, whose last packet does not always state its length.
        tolerance = 0.5 if len(self._container.streams) == 1 or rate is None else max(0.5, SOUND * rate)
        if missing > tolerance:
            raise self._refused(f"is cut off: {missing:.0f} of its frames are missing", WHOLE)

    def _missing(self, frames: int, rate: float) -> float:
        """Count the frames that a file states but lacks; a cut-off file of another format already fails to decode."""
        stated = self._container.duration  # microseconds
        if "matroska" in self._container.format.name and stated and self._span:
            begin, end = self._span
            return (stated / 10**6 - float(end - begin)) * rate
        return self._stream.frames - frames if self._container.format.name == "avi" else 0

    def rate(self) -> float | None:
        """Return the number of frames a second. Raises DataError if frames come at uneven times."""
        stated, tick = self._stream.average_rate, self._stream.time_base
        if len(self._times) < 2 or tick is None:
            return float(stated) if stated else None
        times = sorted(self._times)
        steps = [later - earlier for earlier, later in pairwise(times)]
        if max(steps) >= UNEVEN * min(steps):
            raise self._refused(
                f"shows its frames at uneven times, {float(min(steps) * tick):.3g} to {float(max(steps) * tick):.3g} "
                "seconds apart",
                "give one of a constant rate (ffmpeg -i IN -vf fps=24 OUT)",
            )
        span = (times[-1] - times[0]) * tick
        if stated and abs(len(steps) / stated - span) <= tick:
            return float(stated)  # more exact, since times are rounded to ticks
        return float(len(steps) / span)

    def _note(self, packet: Packet[Any], count: int) -> None:
        """Record when a packet's frame is shown, if it is shown."""
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or packet.is_discard or time is None:  # outside the trim, or no packet but the file's end
            return
        if packet.stream_index == self._stream.index:
            if packet.is_corrupt:
                raise self._damaged(count)
            if self._stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10:
                return  # a frame that others are decoded from, not shown itself
            self._times.append(time)
        begin, end = time * packet.time_base, (time + (packet.duration or 0)) * packet.time_base
        self._span = (min(begin, self._span[0]), max(end, self._span[1])) if self._span else (begin, end)

    def _require_plain(self, frame: VideoFrame, size: tuple[int, int]) -> None:
        """Refuse a frame that a player would stretch or recolour."""
        if (frame.width, frame.height) != size:
            raise self._refused("changes the size of its frames", "give one that keeps its size")
        shape = self._stream.sample_aspect_ratio
        if shape and abs(float(shape) - 1) > SQUARE:
            raise self._refused(
                f"has pixels that are not square ({shape.numerator}:{shape.denominator})",
                "give one whose pixels are (ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT)",
            )
        if curve := HDR.get(self._stream.codec_context.color_trc):
            raise self._refused(f"is HDR ({curve}), whose colours are not those of 8-bit RGB", "give it as SDR video")
        if not any(_axes(frame)):
            raise self._refused("is to be shown turned by other than quarters, or scaled", "give it as it is shown")

    def _damaged(self, count: int) -> DataError:
        return self._refused(f"is damaged: frame {count}, or one soon after it, cannot be decoded", WHOLE)

    def _refused(self, what: str, remedy: str) -> DataError:
        return DataError(f"{self._at}video '{self._path}' {what}; {remedy}")


def _axes(frame: VideoFrame) -> Axes:
    """Return how a frame is turned, which phones state instead of turning it; zeros for other than quarter turns."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / ONE
    axes = matrix.round().astype(int)
    if np.abs(matrix - axes).max() > SQUARE or np.abs(axes @ axes.T - np.eye(2)).any():
        return 0, 0, 0, 0
    (a, b), (c, d) = axes.tolist()
    return a, b, c, d


def _turned(pixels: NDArray[np.uint8], axes: Axes) -> NDArray[np.uint8]:
    """Turn and mirror a frame (H, W, 3) as it is shown."""
    a, b, c, d = axes
    return np.ascontiguousarray(pixels[::d, ::a] if a else pixels.swapaxes(0, 1)[::b, ::c])
