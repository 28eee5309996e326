"""Over 200 media files through ``branchtree.score``: each scored as what it shows, or refused with the reason.

``python tests/sweep_media.py`` goes through all of them and prints a table; the test suite takes some of each kind.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import media_files as files
import numpy as np
import torch
from branchtree_rewards.clip.pickscore import PickScore, PickScoreConfig
from branchtree_rewards.digits import Digits, DigitsConfig
from branchtree_rewards.motion.reward import MotionConfig, MotionSmoothness
from media_files import FRAMES, LOSSLESS, RATE, TURNS, Coding, Pixels, moving
from PIL import Image, ImageCms

from branchtree import score
from branchtree.errors import DataError
from branchtree.plugins import Condition, Media
from branchtree.studies.score.items import list_items
from branchtree.studies.score.media import find_forms, read

PROMPT = "a seven, 7"
WEIGHTS = {"path": "random:small"}
WIDTH = 64  # of frames that decord reads: it pads the rows of others
FRAMED = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class Shown:
    """What a file shows: (H, W, 3), or (F, H, W, 3) at a rate. ``off``: how far bytes may differ, and on average."""

    pixels: Pixels
    fps: float | None = None
    off: tuple[float, float] = (0, 0)


@dataclass(frozen=True)
class Refused:
    """Words of the message."""

    why: str


@dataclass(frozen=True)
class Case:
    """A file of a kind, and how it is made."""

    kind: str
    name: str
    make: Callable[[Path], Shown | Refused]


def shown(frames: Sequence[Pixels], fps: float = RATE, off: tuple[float, float] = (0, 0)) -> Shown:
    return Shown(np.stack(frames), fps, off)


# --- pictures ---


def colours(height: int = 24, width: int = 32) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def by_pillow(path: Path) -> Shown:
    with Image.open(path) as image:
        return Shown(np.asarray(image.convert("RGB")))


def picture(kind: str, mode: str, path: Path, **options: Any) -> Shown:
    source = Image.fromarray(colours())
    image = source.convert(mode)
    path.write_bytes(files.encoded(image, kind, **options))
    return Shown(np.asarray(source)) if mode == "RGB" and kind in {"PNG", "BMP", "TIFF"} else by_pillow(path)


def see_through(mode: str, kind: str, path: Path) -> Shown:
    """Write a picture whose right half cannot be seen; its colours count as if it could."""
    pixels = colours()
    image = Image.fromarray(pixels)
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[255, 0]]), 16, axis=1).repeat(24, axis=0)))
    image = image.convert(mode)
    path.write_bytes(files.encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    if mode == "RGBA":
        return Shown(pixels)
    return Shown(np.asarray(image.convert("RGB")))


def partly_seen(path: Path) -> Shown:
    """Write a palette of which each colour is seen more or less."""
    image = Image.fromarray(colours()).quantize(16)
    image.save(path, transparency=bytes(range(0, 256, 16)))
    palette = np.reshape(image.getpalette() or [], (-1, 3)).astype(np.uint8)
    return Shown(palette[np.asarray(image)])


def deep(kind: str, channels: int, path: Path) -> Shown:
    source = np.random.default_rng(1).integers(0, 2**16, (24, 32, 3), np.uint16)
    source = source if channels == 3 else source[..., 0]
    files.colours16(path, source, kind)
    top = (source // 256).astype(np.uint8)
    return Shown(top if channels == 3 else np.repeat(top[..., None], 3, axis=2))


def grey16(kind: str, mode: str, path: Path) -> Shown:
    source = np.linspace(0, 2**16 - 1, 24 * 32).astype(np.uint16).reshape(24, 32)
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (32, 24), source.astype(order).tobytes())
    path.write_bytes(files.encoded(Image.fromarray(source.astype(np.int32)) if kind == "PPM" else image, kind))
    return Shown(np.repeat((source // 256).astype(np.uint8)[..., None], 3, axis=2))


def grey12(path: Path) -> Shown:
    values = (np.arange(24 * 32) * 5 % 4096).reshape(-1, 2)
    pairs = [bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.tolist()]
    files.tiff(path, b"".join(pairs), 32, 24, 12, 1)
    return Shown(np.repeat((values.reshape(24, 32) // 16).astype(np.uint8)[..., None], 3, axis=2))


def white_is_zero(bits: int, path: Path) -> Shown | Refused:
    values = np.arange(24 * 32) % 256
    files.tiff(path, values.astype(f"<u{bits // 8}").tobytes(), 32, 24, bits, 0)
    if bits == 16:
        return Refused("0 for white")
    return Shown(np.repeat((255 - values).astype(np.uint8).reshape(24, 32)[..., None], 3, axis=2))


def numbers(mode: str, path: Path) -> Refused:
    values = np.linspace(0, 1, 24 * 32).reshape(24, 32)
    array = values.astype(np.float32) if mode == "F" else (values * 65535).astype(np.int32)
    path.write_bytes(files.encoded(Image.fromarray(array), "TIFF"))
    return Refused("does not state which of them is white")


def many(kind: str, path: Path) -> Shown | Refused:
    first, second = Image.fromarray(colours()), Image.fromarray(255 - colours())
    path.write_bytes(files.encoded(first, kind, save_all=True, append_images=[second]))
    if kind == "MPO":
        return by_pillow(path)
    return Refused("holds 2 pages" if kind == "TIFF" else "is an animation")


def tagged(kind: str, orientation: int, path: Path) -> Shown:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}}.get(kind, {})
    path.write_bytes(files.encoded(Image.fromarray(colours()), kind, exif=exif, **lossless))
    return by_pillow(path) if kind == "JPEG" else Shown(colours())


def profiled(path: Path) -> Shown:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    path.write_bytes(files.encoded(Image.fromarray(colours()), "PNG", icc_profile=profile))
    return Shown(colours())


def cut_picture(kind: str, share: float, path: Path) -> Refused:
    image = Image.fromarray(colours(64, 64))
    path.write_bytes(files.encoded(image, kind))
    files.cut(path, share)
    return Refused("cannot be read")


def written(content: bytes, why: str, path: Path) -> Refused:
    path.write_bytes(content)
    return Refused(why)


def bomb(path: Path) -> Refused:
    path.write_bytes(files.encoded(Image.fromarray(colours()), "BMP"))
    content = bytearray(path.read_bytes())
    content[18:26] = (30_000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    return Refused("has too many pixels")


def sized(height: int, width: int, suffix: str, path: Path) -> Shown:
    Image.fromarray(colours(height, width)).save(path)
    return Shown(colours(height, width))


def pictures() -> Iterator[Case]:  # noqa: PLR0912
    for kind, suffix, modes in [
        ("PNG", ".png", ("1", "L", "P", "RGB")),
        ("BMP", ".bmp", ("1", "L", "P", "RGB")),
        ("TIFF", ".tif", ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB")),
        ("JPEG", ".jpg", ("L", "RGB", "CMYK", "YCbCr")),
        ("WEBP", ".webp", ("L", "RGB")),
        ("GIF", ".gif", ("1", "L", "P", "RGB")),
    ]:
        for mode in modes:
            yield Case("modes of 8 bits", f"{mode}{suffix}", partial(picture, kind, mode))
    for name, kind, mode in [
        ("png", "PNG", "LA"),
        ("png", "PNG", "RGBA"),
        ("tif", "TIFF", "LA"),
        ("tif", "TIFF", "RGBA"),
        ("webp", "WEBP", "RGBA"),
    ]:
        yield Case("transparency", f"{mode}.{name}", partial(see_through, mode, kind))
    yield Case("transparency", "palette.png", partly_seen)
    for kind in ("png", "tiff"):
        for channels in (1, 3):
            yield Case("16 bits", f"{channels}.{kind}", partial(deep, kind, channels))
    for name, kind, mode in [
        ("a.png", "PNG", "I;16"),
        ("b.tif", "TIFF", "I;16"),
        ("c.tif", "TIFF", "I;16B"),
        ("d.png", "PPM", "I;16"),
        ("e.png", "JPEG2000", "I;16"),
    ]:
        yield Case("16 bits", name, partial(grey16, kind, mode))
    yield Case("16 bits", "twelve.tif", grey12)
    for bits in (8, 16):
        yield Case("white is zero", f"{bits}.tif", partial(white_is_zero, bits))
    for mode in ("I", "F"):
        yield Case("numbers without a range", f"{mode}.tif", partial(numbers, mode))
    for kind, suffix in [("TIFF", "tif"), ("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg")]:
        yield Case("several pictures", f"{kind}.{suffix}", partial(many, kind))
    for kind in ("PNG", "JPEG", "WEBP"):
        for orientation in (3, 6, 8):
            yield Case("EXIF orientation", f"{orientation}.{kind.lower()}", partial(tagged, kind, orientation))
    yield Case("colour profile", "profile.png", profiled)
    for kind, suffix in [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
    ]:
        for share in (0.3, 0.7, 0.95):
            yield Case("cut-off pictures", f"{share}.{suffix}", partial(cut_picture, kind, share))
    yield Case("no picture", "text.png", partial(written, b"a cat\n" * 20, "is no image"))
    yield Case("no picture", "empty.png", partial(written, b"", "is empty"))
    yield Case("no picture", "bomb.bmp", bomb)
    yield Case("another name", "jpeg.png", partial(picture, "JPEG", "RGB"))
    yield Case("another name", "png.jpg", partial(picture, "PNG", "RGB"))
    for height, width in [(1, 1), (1, 300), (300, 1), (7, 13), (513, 3)]:
        for suffix in ("png", "bmp"):
            yield Case("sizes of pictures", f"{height}x{width}.{suffix}", partial(sized, height, width, suffix))


# --- videos ---


def plain(frames: Sequence[Pixels], path: Path, rate: Fraction = Fraction(RATE)) -> Shown:
    files.lossless(path, frames, rate=rate)
    return shown(frames, float(rate))


def read_by_decord(path: Path) -> list[Pixels]:
    # Imported last: what comes after it gets its libvpx, and cannot encode.
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return [reader[index].asnumpy() for index in range(len(reader))]


def by_decord(coding: Coding, off: tuple[float, float], path: Path) -> Shown:
    files.write(path, moving(width=WIDTH), coding)
    return shown(read_by_decord(path), off=off)


def by_source(coding: Coding, off: tuple[float, float], path: Path) -> Shown:
    files.write(path, moving(), coding)
    return shown(moving(), off=off)


def by_formula(bits: int, matrix: int, weights: tuple[float, float], full: bool, path: Path) -> Shown:
    sources = files.planes(moving(6), bits)
    context = {"colorspace": matrix, "color_range": 2 if full else 1}
    pixels = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    coding = Coding("libx264", pixels, options={"qp": "0"}, context=context)
    files.write_frames(path, [files.yuv_frame(one, bits) for one in sources], coding)
    return shown([files.rgb_of(one, bits, weights, full) for one in sources], off=(1, 0.5))


def trimmed(start: int, stop: int, group: int, path: Path) -> Shown:
    files.lossless(path, moving(), options={"g": str(group), "bf": "2"})
    files.trim(path, start, stop)
    return shown(moving()[start:stop])


def segmented(segments: Sequence[tuple[int, int]], path: Path) -> Shown:
    files.edit(files.lossless(path, moving(), **({"options": {"g": "1"}} if path.suffix == ".mp4" else {})), segments)
    return shown([one for start, stop in segments for one in moving()[start:stop]])


def copied(start: int, reordered: int, path: Path) -> Shown:
    whole = files.lossless(path.with_name(f"whole-{path.name}"), moving(), options={"bf": str(reordered)})
    files.copy_from(whole, path, start)
    return shown(moving()[start:])


def turned(signs: tuple[int, int, int, int], path: Path) -> Shown:
    files.turn(files.lossless(path, moving()), signs)
    return shown([files.turned(one, signs) for one in moving()])


def tilted(signs: tuple[float, ...], path: Path) -> Refused:
    files.turn(files.lossless(path, moving()), signs)
    return Refused("turned by other than quarters")


def timed(times: Sequence[int], path: Path) -> Refused:
    files.lossless(path, moving(len(times)), times)
    return Refused("shows its frames at uneven times")


def jittered(rate: float, path: Path) -> Shown:
    files.lossless(path, moving(), [round(1000 * index / rate) for index in range(FRAMES)])
    return Shown(np.stack(moving()), rate)


def spoilt(packet: int, path: Path) -> Refused:
    files.spoil(files.lossless(path, moving()), packet)
    return Refused("video ")


def spoilt_lossy(codec: str, packet: int, path: Path) -> Refused:
    files.spoil(files.write(path, moving(), Coding(codec, options={"g": "8"})), packet, 0.1, 0.9)
    return Refused("is damaged")


def undetected(packet: int, path: Path) -> Shown:
    """Damage a file of a coding without checksums so that its decoder makes another picture of it."""
    files.spoil(files.lossless(path, moving(width=WIDTH)), packet, 0.5)
    return shown(read_by_decord(path))


def cut_off(share: float, path: Path) -> Refused:
    whole = files.lossless(path, moving())
    files.cut(files.front(whole) if path.suffix in {".mp4", ".mov"} else whole, share)
    return Refused("video ")


def wrong(write: Callable[[Path], Any], why: str, path: Path) -> Refused:
    write(path)
    return Refused(why)


def beside_sound(path: Path) -> Shown:
    files.sound(path, moving())
    return shown(moving())


def strange(coding: Coding, why: str, path: Path) -> Refused:
    files.write(path, moving(), coding)
    return Refused(why)


def frameless(path: Path) -> Refused:
    files.write_header(path)
    return Refused("has no frames")


def videos() -> Iterator[Case]:  # noqa: PLR0912
    for suffix in LOSSLESS:
        for frames in (3, FRAMES):
            yield Case("containers", f"{frames}{suffix}", partial(plain, moving(frames)))
    for name, coding, off in [
        ("h264.mp4", Coding(), (0, 0)),
        ("h264.avi", Coding(options={"bf": "0"}), (0, 0)),
        ("b.mkv", Coding(options={"bf": "3", "b-pyramid": "normal"}), (0, 0)),
        ("b.avi", Coding(options={"bf": "2"}), (0, 0)),
        ("unlisted.mp4", Coding(options={"bf": "3"}, muxer={"use_editlist": "0"}), (0, 0)),
        ("fragments.mp4", Coding(muxer={"movflags": "frag_keyframe+empty_moov"}, options={"g": "6"}), (0, 0)),
        ("front.mp4", Coding(muxer={"movflags": "+faststart"}), (0, 0)),
        ("mpeg4.mp4", Coding("mpeg4"), (0, 0)),
        ("mpeg4.avi", Coding("mpeg4"), (0, 0)),
        ("mpeg2.mkv", Coding("mpeg2video"), (0, 0)),
        ("vp8.webm", Coding("libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}), (0, 0)),
        ("vp9.webm", Coding("libvpx-vp9"), (0, 0)),
        ("vp9.mp4", Coding("libvpx-vp9"), (0, 0)),
        ("hevc.mp4", Coding("libx265", options={"x265-params": "log-level=none"}), (0, 0)),
        ("mjpeg.avi", Coding("mjpeg", "yuvj420p"), (0, 0)),
        ("prores.mov", Coding("prores_ks", "yuv422p10le"), (30, 2)),
        ("alpha.mov", Coding("prores_ks", "yuva444p10le", options={"profile": "4444"}), (2, 1)),
        ("alpha.webm", Coding("libvpx-vp9", "yuva420p"), (0, 0)),
        ("422.mp4", Coding(pixels="yuv422p"), (0, 0)),
        ("444.mp4", Coding(pixels="yuv444p"), (0, 0)),
        ("ten.mp4", Coding(pixels="yuv420p10le"), (40, 4)),
        ("full.mp4", Coding(pixels="yuvj420p"), (0, 0)),
    ]:
        yield Case("codings", name, partial(by_decord, coding, off))
    yield Case("codings", "av1.mp4", partial(by_source, Coding("libsvtav1"), (90, 9)))
    yield Case("codings", "grey.mkv", grey)
    for bits in (8, 10):
        for matrix, weights in [(1, (0.2126, 0.0722)), (5, (0.299, 0.114)), (9, (0.2627, 0.0593)), (2, (0.299, 0.114))]:
            for full in (False, True):
                name = f"{bits}-{matrix}-{full}.mp4"
                yield Case("colour matrices and ranges", name, partial(by_formula, bits, matrix, weights, full))
    for suffix in (".mp4", ".mov", ".m4v"):
        for start, stop in [(3, FRAMES), (11, FRAMES), (0, 10), (3, 17), (9, 12)]:
            for group in (4, FRAMES):
                if suffix != ".mov" or group == 4:
                    yield Case(
                        "trims by edit list", f"{start}-{stop}-{group}{suffix}", partial(trimmed, start, stop, group)
                    )
    for suffix in (".mp4", ".mov"):
        yield Case("trims by edit list", f"two segments{suffix}", partial(segmented, ((2, 8), (10, 15))))
        yield Case("trims by edit list", f"turned round{suffix}", partial(segmented, ((12, 20), (0, 4))))
    for suffix in (".mp4", ".m4v"):
        for start in (1, 5, 20):
            for reordered in (0, 2):
                yield Case("trims by copying", f"{start}-{reordered}{suffix}", partial(copied, start, reordered))
    for name, signs in TURNS.items():
        for suffix in (".mp4", ".mov"):
            yield Case("rotations", f"{name}{suffix}", partial(turned, signs))
    for name, tilt in {"tilted": (0.7071, 0.7071, -0.7071, 0.7071), "scaled": (0.5, 0, 0, 0.5)}.items():
        yield Case("other matrices", f"{name}.mp4", partial(tilted, tilt))
    for height, width in [(33, 31), (49, 65), (16, 130), (130, 16), (32, 66)]:
        for suffix in (".mp4", ".webm"):
            yield Case("sizes of videos", f"{height}x{width}{suffix}", partial(plain, moving(5, height, width)))
    for rate in (Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(60), Fraction(8), Fraction(1)):
        for suffix in (".mp4", ".mkv"):
            yield Case("constant rates", f"{float(rate):.3f}{suffix}", partial(plain, moving(), rate=rate))
    for suffix in (".mp4", ".mkv", ".webm"):
        yield Case("constant rates", f"rounded{suffix}", partial(jittered, 30.0))
        for name, times in {
            "gap": [0, 40, 80, 160, 200, 240],
            "still": [0, 40, 80, 1080, 1120, 1160],
            "slower": [0, 40, 80, 120, 180, 240, 300],
            "twenty-four in thirty": [0, 33, 67, 100, 167, 200, 233, 267, 333],
        }.items():
            yield Case("variable rates", f"{name}{suffix}", partial(timed, times))
    for suffix in (".mp4", ".mov", ".mkv", ".avi"):
        for packet in (0, 4, 11, FRAMES - 1):
            yield Case("damaged packets", f"{packet}{suffix}", partial(spoilt, packet))
    for codec, suffix in [("libx264", ".mp4"), ("mpeg4", ".mp4"), ("mpeg4", ".avi")]:
        for packet in (0, 5):
            yield Case("damaged packets", f"{codec}-{packet}{suffix}", partial(spoilt_lossy, codec, packet))
    for packet in (0, 5, 20):
        yield Case("damage that no decoder tells", f"{packet}.webm", partial(undetected, packet))
    for suffix in FRAMED:
        for share in (0.1, 0.4, 0.7, 0.95):
            yield Case("cut-off videos", f"{share}{suffix}", partial(cut_off, share))
    for suffix in FRAMED:
        yield Case("sound", f"alone{suffix}", partial(wrong, files.sound, "has no video in it"))
        yield Case("sound", f"beside{suffix}", beside_sound)
    yield Case("sound", "cover.mp4", partial(wrong, files.cover, "has no video in it"))
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"
    for name, content, why in [
        ("text.mp4", b"a cat\n" * 50, "cannot be opened"),
        ("zeros.mkv", bytes(5000), "cannot be opened"),
        ("empty.mp4", b"", "is empty"),
        ("playlist.mp4", playlist, "cannot be opened"),
        ("picture.mp4", files.encoded(Image.fromarray(colours()), "PNG"), "cannot be opened"),
    ]:
        yield Case("no video", name, partial(written, content, why))
    yield Case("no video", "frameless.mp4", frameless)
    yield Case("refused looks", "two sizes.avi", partial(wrong, files.of_two_sizes, "changes the size of its frames"))
    wide = Coding(context={"sample_aspect_ratio": Fraction(16, 11)})
    yield Case("refused looks", "wide.mp4", partial(strange, wide, "has pixels that are not square (16:11)"))
    for curve, number in (("PQ", 16), ("HLG", 18)):
        hdr = Coding(pixels="yuv420p10le", context={"color_trc": number, "colorspace": 9, "color_primaries": 9})
        yield Case("refused looks", f"{curve}.mp4", partial(strange, hdr, f"is HDR ({curve})"))


def grey(path: Path) -> Shown:
    files.write(path, [one[..., :1].repeat(3, axis=2) for one in moving()], Coding("ffv1", "gray"))
    return shown([one[..., :1].repeat(3, axis=2) for one in moving()], off=(1, 0.5))


def cases() -> list[Case]:
    return [*pictures(), *videos()]


# --- the check ---


def verdict(case: Case, folder: Path, rewards: dict[str, Any]) -> str:
    """Make a file, score it, and say how it went: "right" or "refused". Raises AssertionError for all else."""
    inside = folder / case.kind
    inside.mkdir(exist_ok=True)
    path = inside / case.name
    wanted = case.make(path)
    if isinstance(wanted, Refused):
        try:
            score(path, "digits")
        except DataError as error:
            assert wanted.why in str(error), f"{path}: {error}"
            assert str(path) in str(error), f"{path}: {error}"
            return "refused"
        raise AssertionError(f"{path}: scored, and should not be")
    items = list_items(path, PROMPT)
    [form] = find_forms(items)
    found = read(items, form)
    pixels = torch.tensor(wanted.pixels).movedim(-1, -3)[None].float() / 255
    difference = (found.pixels - pixels).abs() * 255 if found.pixels.shape == pixels.shape else None
    assert difference is not None, f"{path}: {tuple(found.pixels.shape)}, and {tuple(pixels.shape)} are shown"
    assert difference.max() <= wanted.off[0] + 1e-3, f"{path}: off by {difference.max()}"
    assert difference.mean() <= wanted.off[1] + 1e-3, f"{path}: off by {difference.mean()} on average"
    assert found.fps == wanted.fps or abs((found.fps or 0) / (wanted.fps or 0) - 1) < 2e-3, f"{path}: {found.fps}"
    if found.videos is not None:
        label, expected = "motion_smoothness", Media(videos=pixels, fps=wanted.fps)
    else:
        label, expected = "pickscore" if "bits" in case.kind else "digits", Media(images=pixels)
    if label not in rewards:
        rewards[label] = loaded(label)
    value = rewards[label].score(expected, [Condition(PROMPT)]).values.item()
    named = {"reward": label, **(WEIGHTS if label == "pickscore" else {})}
    [scored] = score(path, named, prompt=PROMPT, device="cpu")
    given = scored.scores[label].value
    assert given is not None, f"{path}: {scored.scores[label].reason}"
    if wanted.off == (0, 0):
        assert abs(given - value) <= 1e-5 * max(1, abs(value)), f"{path}: {given}, and {value} is right"
    return "right"


def loaded(label: str) -> Any:
    made: dict[str, Any] = {
        "pickscore": partial(PickScore, PickScoreConfig(**WEIGHTS)),
        "digits": partial(Digits, DigitsConfig()),
        "motion_smoothness": partial(MotionSmoothness, MotionConfig()),
    }
    reward = made[label]()
    reward.load(torch.device("cpu"))
    return reward


def main() -> None:
    table: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    rewards: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            row = table.setdefault(case.kind, Counter())
            try:
                row[verdict(case, Path(folder), rewards)] += 1
            except Exception as error:
                row["wrong"] += 1
                wrong.append(f"{case.kind}: {case.name}: {type(error).__name__}: {error}")
    columns = ("right", "refused", "wrong")
    print("| kind | files | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * (len(columns) + 1))
    for kind, row in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"| {kind} | {row.total()} | " + " | ".join(str(row[column]) for column in columns) + " |")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
