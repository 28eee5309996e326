"""Frames that condition a video: read from real image and video files, and refused with the place of what is wrong."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from branchtree.data.frames import first_frame, last_frame
from branchtree.errors import DataError
from branchtree.plugins import Condition

SIZE = (48, 32)  # width, height
Pixels = NDArray[np.uint8]


def picture(shift: int = 0) -> Pixels:
    """Smooth colours (32, 48, 3), which codecs keep well, moved by ``shift`` pixels."""
    x, y = np.meshgrid(np.arange(SIZE[0]) + shift, np.arange(SIZE[1]))
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    return np.stack([(127 + 100 * wave).astype(np.uint8) for wave in waves], axis=-1)


def write_video(path: Path, frames: list[Pixels], codec: str = "libx264", **options: str) -> Path:
    size = frames[0].shape[:2] if frames else SIZE[::-1]
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        container.start_encoding()
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if frames:
            container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def encoded(pixels: Pixels, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def clip(path: Path) -> Path:
    return write_video(path, [picture(4 * step) for step in range(9)])


def condition(**files: Path) -> Condition:
    return Condition("a wave", location="p.jsonl:3", **files)


def refusal(**files: Path) -> str:
    with pytest.raises(DataError) as refused:
        first_frame(condition(**files)) if "last_image" not in files else last_frame(condition(**files))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


# --- what is read ---


def test_no_file_is_no_frame() -> None:
    assert first_frame(Condition("a wave")) is None
    assert last_frame(condition(image=Path("x.png"), video=Path("x.mp4"))) is None
    assert first_frame(condition(last_image=Path("x.png"))) is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_images_of_every_kind_become_rgb(mode: str, tmp_path: Path) -> None:
    whole = Image.fromarray(picture()).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    whole.save(path)
    expected = np.asarray(whole.convert("RGB"))
    for frame in (first_frame(condition(image=path)), last_frame(condition(last_image=path))):
        assert frame is not None
        assert (frame.mode, frame.size) == ("RGB", SIZE)
        assert np.array_equal(np.asarray(frame), expected)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned; a quarter turn clockwise shows it upright
    path = tmp_path / "x.png"
    path.write_bytes(encoded(picture(), "PNG", exif=exif))
    frame = first_frame(condition(image=path))
    assert frame is not None
    assert np.array_equal(np.asarray(frame), np.rot90(picture(), -1))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9", "libsvtav1"])
def test_a_video_gives_its_first_frame(codec: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    path = write_video(tmp_path / "x.mp4", [picture(10 * step) for step in range(9)], codec)
    frame = first_frame(condition(video=path))
    assert frame is not None
    assert (frame.mode, frame.size) == ("RGB", SIZE)
    distance = [np.abs(np.asarray(frame, float) - picture(10 * step)).mean() for step in range(9)]
    assert distance[0] < 5  # of 255: what the codec and its halved colour resolution lose
    assert min(distance[1:]) > 3 * distance[0]


@pytest.mark.parametrize("width", [16, 32, 48, 66, 130])
def test_videos_of_every_width_are_read(width: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", [np.tile(picture(), (1, 3, 1))[:, :width]] * 2)
    frame = first_frame(condition(video=path))
    with av.open(str(path)) as container:
        expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(np.asarray(frame), expected)


def test_an_image_goes_before_a_video(tmp_path: Path) -> None:
    Image.fromarray(picture(30)).save(tmp_path / "x.png")
    frame = first_frame(condition(image=tmp_path / "x.png", video=clip(tmp_path / "x.mp4")))
    assert np.array_equal(np.asarray(frame), picture(30))


# --- what is refused ---

Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize("key", ["image", "last_image", "video"])
def test_a_missing_file_is_named(key: str, tmp_path: Path) -> None:
    for path in (tmp_path / "x.png", tmp_path, tmp_path / "x" / "y.png"):
        assert refusal(**{key: path}) == f"p.jsonl:3: 'a wave': there is no file '{path}'"
    assert "cannot be read: File name too long" in refusal(**{key: tmp_path / ("x" * 300)})


@pytest.mark.parametrize("key", ["image", "last_image", "video"])
def test_an_empty_file_is_named(key: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    assert refusal(**{key: path}) == f"p.jsonl:3: 'a wave': file '{path}' is empty (0 bytes)"


@pytest.mark.parametrize("key", ["image", "last_image"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_truncated_image_is_refused(key: str, kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "x", encoded(picture(), kind)
    path.write_bytes(content[: len(content) // 2])
    assert refusal(**{key: path}).startswith(f"p.jsonl:3: 'a wave': image '{path}' cannot be read: ")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "x.png"
    text.write_text("a picture of a cat\n" * 20)
    for path in (text, clip(tmp_path / "x.mp4")):
        assert refusal(image=path) == f"p.jsonl:3: 'a wave': file '{path}' is no image; give a PNG or JPEG file"


def test_what_has_no_frames_is_refused(tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "text.mp4").write_text("a video of a cat\n" * 20)
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "image.mp4").write_bytes(b"\0" * 5000)
    write_sound(tmp_path / "sound.mp4")
    write_video(tmp_path / "frameless.mp4", [], movflags="empty_moov+default_base_moof")
    for name in ("text", "half", "image"):
        path = tmp_path / f"{name}.mp4"
        assert refusal(video=path).startswith(f"p.jsonl:3: 'a wave': video '{path}' cannot be opened: it is no video")
    for name, said in (("sound", "has no video in it; give"), ("frameless", "has no frames; give")):
        assert f"{name}.mp4' {said}" in refusal(video=tmp_path / f"{name}.mp4")


def test_a_first_frame_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    path = clip(tmp_path / "x.mp4")
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + len(content) // 3] = bytes(len(content) // 3)  # the first frame, but not all that follow
    path.write_bytes(content)
    assert refusal(video=path).startswith(f"p.jsonl:3: 'a wave': video '{path}' is damaged: frame 0, or one soon")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "mp4"])
def test_a_damaged_file_is_a_frame_or_a_refusal(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    whole = clip(tmp_path / "x.mp4").read_bytes() if kind == "mp4" else encoded(picture(), kind)
    dice = random.Random(kind)
    for _ in range(60):
        content = bytearray(whole)
        for place in dice.sample(range(len(content)), dice.randint(1, 30)):
            content[place] = dice.randrange(256)
        path.write_bytes(content)
        try:
            frame = first_frame(condition(video=path) if kind == "mp4" else condition(image=path))
        except DataError as error:
            assert str(error).startswith("p.jsonl:3: 'a wave': ")
        else:
            assert frame is not None
            assert frame.mode == "RGB"
