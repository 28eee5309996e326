"""Media files of every kind, each with what a player or Pillow shows of it, known without the library's readers."""

from __future__ import annotations

import io
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
FRAMES, RATE = 24, 24
ONE = 1 << 16
TURNS: dict[str, tuple[int, int, int, int]] = {  # a pixel at (x, y) is shown at (a x + c y, b x + d y)
    "as it is": (1, 0, 0, 1),
    "quarter": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "three quarters": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}
LOSSLESS: dict[str, tuple[str, str, dict[str, str]]] = {  # codec, pixels and options that keep RGB exactly
    ".mp4": ("libx264rgb", "rgb24", {"qp": "0", "g": "8", "bf": "2"}),
    ".m4v": ("libx264rgb", "rgb24", {"qp": "0", "g": "8", "bf": "2"}),
    ".mov": ("png", "rgb24", {}),
    ".mkv": ("libx264rgb", "rgb24", {"qp": "0", "g": "8"}),
    ".webm": ("libvpx-vp9", "gbrp", {"lossless": "1"}),
    ".avi": ("png", "rgb24", {}),
}


@dataclass(frozen=True)
class Coding:
    """How frames are written."""

    codec: str = "libx264"
    pixels: str = "yuv420p"
    rate: Fraction = Fraction(RATE)
    options: Mapping[str, str] = field(default_factory=dict)
    muxer: Mapping[str, str] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    format: str | None = None


def moving(frames: int = FRAMES, height: int = 32, width: int = 48, seed: int = 0) -> list[Pixels]:
    """Smooth colours that move, each frame different from all others."""
    y, x = np.mgrid[:height, :width].astype(float)
    shift = 7 * seed
    waves = [
        [np.sin((x + 2 * step + shift) / 9), np.cos((y + step) / 7), np.sin((x + y - 3 * step) / 11)]
        for step in range(frames)
    ]
    return [np.stack([(127 + 100 * wave).astype(np.uint8) for wave in colours], axis=-1) for colours in waves]


def write(path: Path, frames: Sequence[Pixels], coding: Coding, times: Sequence[int] | None = None) -> Path:
    """Write RGB frames, at the times given in milliseconds or at the coding's rate."""
    return write_frames(path, [av.VideoFrame.from_ndarray(one, format="rgb24") for one in frames], coding, times)


def write_frames(
    path: Path, frames: Sequence[av.VideoFrame], coding: Coding, times: Sequence[int] | None = None
) -> Path:
    with av.open(str(path), "w", format=coding.format, options=dict(coding.muxer)) as container:
        stream: Any = container.add_stream(coding.codec, rate=coding.rate, options=dict(coding.options))
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, coding.pixels
        for name, value in coding.context.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def lossless(path: Path, frames: Sequence[Pixels], times: Sequence[int] | None = None, **changes: Any) -> Path:
    """Write frames so that each comes back exactly."""
    codec, pixels, options = LOSSLESS[path.suffix]
    changes["options"] = options | changes.get("options", {})
    return write(path, frames, Coding(codec, pixels, **changes), times)


def patched(path: Path, box: str, offset: int, numbers: str, *values: int) -> None:
    """Overwrite big-endian numbers ``offset`` bytes after the name of the first box of that name."""
    content = bytearray(path.read_bytes())
    struct.pack_into(f">{numbers}", content, content.index(box.encode()) + offset, *values)
    path.write_bytes(content)


def trim(path: Path, start: int, stop: int) -> Path:
    """Have an MP4 file's edit list show frames ``start`` to ``stop`` alone; its packets stay."""
    content = path.read_bytes()
    at = content.index(b"elst") + 12
    _, begin = struct.unpack_from(">Ii", content, at)
    with av.open(str(path)) as container:
        ticks = int(1 / (container.streams.video[0].time_base * RATE))
    # The duration is in the movie's clock of 1000 ticks a second, the start in the track's.
    patched(path, "elst", 12, "Ii", (stop - start) * 1000 // RATE, begin + start * ticks)
    return path


def edit(path: Path, segments: Sequence[tuple[int, int]]) -> Path:
    """Have an MP4 file's edit list show segments of its frames one after the other; its index must lie at its end."""
    content = path.read_bytes()
    at = content.index(b"elst") - 4
    size = struct.unpack_from(">I", content, at)[0]
    _, begin = struct.unpack_from(">Ii", content, at + 16)
    with av.open(str(path)) as container:
        ticks = int(1 / (container.streams.video[0].time_base * RATE))
    entries = [
        struct.pack(">IiI", (stop - start) * 1000 // RATE, begin + start * ticks, ONE) for start, stop in segments
    ]
    box = struct.pack(">I4sII", 16 + 12 * len(entries), b"elst", 0, len(entries)) + b"".join(entries)
    longer = bytearray(content[:at] + box + content[at + size :])
    for outer in (b"moov", b"trak", b"edts"):
        start = longer.index(outer) - 4
        struct.pack_into(">I", longer, start, struct.unpack_from(">I", longer, start)[0] + len(box) - size)
    path.write_bytes(longer)
    return path


def copy_from(path: Path, target: Path, start: int) -> Path:
    """Copy packets as ``ffmpeg -ss`` with ``-c copy`` does: those before ``start`` get times below 0."""
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        [stream] = source.streams.video
        copied = sink.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                shift = int(start / (stream.time_base * RATE))
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copied
                sink.mux(packet)
    return target


def turn(path: Path, signs: Sequence[float]) -> Path:
    """Write a display matrix into an MP4 file."""
    a, b, c, d = (round(sign * ONE) for sign in signs)
    patched(path, "tkhd", 44, "9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return path


def turned(frame: Pixels, signs: tuple[int, int, int, int]) -> Pixels:
    """Move each pixel where a display matrix says, one at a time."""
    a, b, c, d = signs
    height, width = frame.shape[:2]
    shown = np.empty((height, width, 3) if a else (width, height, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    shown[down - down.min(), across - across.min()] = frame
    return shown


def spoil(path: Path, packet: int, start: float = 0.0, stop: float = 1.0) -> Path:
    """Overwrite the bytes of a video packet, from one share of it to another, with zeros."""
    with av.open(str(path)) as container:
        packets = [(one.pos, one.size) for one in container.demux(video=0) if one.size]
    position, size = packets[packet]
    content = bytearray(path.read_bytes())
    begin, end = position + int(start * size), position + int(stop * size)
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def front(path: Path) -> Path:
    """Put an MP4 file's index before its frames, so that a file that is cut off still has it."""
    target = path.with_name(f"front-{path.name}")
    with av.open(str(path)) as source, av.open(str(target), "w", options={"movflags": "+faststart"}) as sink:
        copied = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                sink.mux(packet)
    shutil.move(target, path)
    return path


def sound(path: Path, frames: Sequence[Pixels] = ()) -> Path:
    """Write silence of a second, alone or beside lossless frames."""
    codec, pixels, options = LOSSLESS[path.suffix]
    with av.open(str(path), "w") as container:
        audio: Any = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000)
        video: Any = container.add_stream(codec, rate=RATE, options=options) if frames else None
        if video:
            video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pixels
            for one in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
            container.mux(video.encode())
        _mux_silence(container, audio)
    return path


def _mux_silence(container: Any, audio: Any) -> None:
    """Write a second of silence as the whole of a track."""
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
    silence.sample_rate = 48000
    container.mux([*audio.encode(silence), *audio.encode()])


def cover(path: Path) -> Path:
    """Write silence of a second with a picture as its cover."""
    with av.open(str(path), "w") as container:
        audio: Any = container.add_stream("aac", rate=48000)
        image: Any = container.add_stream("mjpeg", rate=1)
        image.height, image.width, image.pix_fmt = 32, 48, "yuvj420p"
        image.disposition = Disposition.attached_pic
        for frame in (av.VideoFrame.from_ndarray(moving(1)[0], format="rgb24"), None):
            container.mux(image.encode(frame))
        _mux_silence(container, audio)
    return path


def of_two_sizes(path: Path) -> Path:
    """Write a motion JPEG whose frames grow half way."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        container.start_encoding()
        for index in range(8):
            height = 32 if index < 4 else 64
            buffer = io.BytesIO()
            Image.fromarray(moving(1, height, 48, index)[0]).save(buffer, "JPEG")
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, RATE)
            packet.is_keyframe = True
            container.mux(packet)
    return path


def planes(frames: Sequence[Pixels], bits: int) -> list[NDArray[np.uint16]]:
    """Take RGB bytes for luma and colour differences of that many bits (3, H, W), inside the limited range."""
    return [
        ((16 + one.astype(np.uint16).transpose(2, 0, 1) * 200 // 255) << (bits - 8)).astype(np.uint16) for one in frames
    ]


def rgb_of(yuv: NDArray[np.uint16], bits: int, weights: tuple[float, float], full: bool) -> Pixels:
    """Convert by the formulas of ITU-T H.273: ``weights`` are those of red and blue in the luma."""
    scale = 2 ** (bits - 8)
    y, u, v = (plane.astype(float) / scale for plane in yuv)
    luma, (blue, red) = (
        (y / 255, [(c - 128) / 255 for c in (u, v)])
        if full
        else (
            (y - 16) / 219,
            [(c - 128) / 224 for c in (u, v)],
        )
    )
    red_weight, blue_weight = weights
    r, b = luma + 2 * (1 - red_weight) * red, luma + 2 * (1 - blue_weight) * blue
    g = (luma - red_weight * r - blue_weight * b) / (1 - red_weight - blue_weight)
    return (np.stack([r, g, b], axis=-1).clip(0, 1) * 255).round().astype(np.uint8)


def yuv_frame(yuv: NDArray[np.uint16], bits: int) -> av.VideoFrame:
    if bits == 8:
        return av.VideoFrame.from_ndarray(yuv.astype(np.uint8), format="yuv444p", channel_last=False)
    frame = av.VideoFrame(yuv.shape[2], yuv.shape[1], f"yuv444p{bits}le")
    for plane, values in zip(frame.planes, yuv, strict=True):
        rows = np.zeros((values.shape[0], plane.line_size // 2), np.uint16)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    return frame


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours16(path: Path, pixels: NDArray[np.uint16], kind: str) -> Path:
    """Write a picture of 16 bits a colour, (H, W, 3) or (H, W), as PNG or TIFF; Pillow cannot."""
    order, name = (">", "be") if kind == "png" else ("<", "le")
    form = ("rgb48" if pixels.ndim == 3 else "gray16") + name
    context: Any = av.CodecContext.create(kind, "w")
    context.height, context.width, context.pix_fmt = *pixels.shape[:2], form
    context.time_base = Fraction(1, 24)
    frame = av.VideoFrame(pixels.shape[1], pixels.shape[0], form)
    rows = np.zeros((pixels.shape[0], frame.planes[0].line_size // 2), f"{order}u2")
    rows[:, : pixels[0].size] = pixels.reshape(pixels.shape[0], -1)
    frame.planes[0].update(rows.tobytes())
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)]))
    return path


def tiff(path: Path, pixels: bytes, width: int, height: int, bits: int, photometric: int) -> Path:
    """Write an uncompressed grey TIFF by hand."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4 if value > 65535 else 3, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    path.write_bytes(head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def write_header(path: Path) -> Path:
    """Write an MP4 file that has a video track, and no frame in it."""
    with av.open(str(path), "w", options={"movflags": "empty_moov+default_base_moof"}) as container:
        stream: Any = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.start_encoding()
    return path
