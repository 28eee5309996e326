"""Videos that a run writes: read back with other libraries, they show the right frames at the right times."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import av
import decord
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from branchtree.core.credit import CreditRule, assign_credit
from branchtree.core.schedule import FixedSplits, Schedule
from branchtree.core.scores import Scores
from branchtree.core.tree import grow
from branchtree.pictures import grid as samples
from branchtree.pictures.grid import make_thumbnails, write_grid, write_tree
from branchtree.pictures.still import fitted
from branchtree.pictures.video import mp4, spread_evenly, webp
from branchtree.plugins import Condition, Media

FRAMES, SIDE = 9, 8
CODEC = 16  # levels of 255 by which H.264 may be off inside an even area
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def corner(sample: int, frame: int) -> tuple[int, int]:
    """(top, left) of a sample's square: each sample has its row, and all move right."""
    return 2 + 5 * sample, 3 * frame


def squares(count: int, colour: tuple[int, int, int] = (255, 255, 255), size: tuple[int, int] = (32, 32)) -> Tensor:
    """(count, FRAMES, 3, H, W): black, with a square that moves."""
    videos = torch.zeros(count, FRAMES, 3, *size)
    for sample in range(count):
        for frame in range(FRAMES):
            top, left = corner(sample, frame)
            videos[sample, frame, :, top : top + SIDE, left : left + SIDE] = torch.tensor(colour).view(3, 1, 1) / 255
    return videos


def pictures(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy()) for frame in video]


def read(content: bytes | Path) -> tuple[NDArray[np.uint8], float]:
    """Frames (F, H, W, 3) and their rate, by decord."""
    reader = decord.VideoReader(io.BytesIO(content) if isinstance(content, bytes) else str(content), num_threads=1)
    return np.stack([reader[place].asnumpy() for place in range(len(reader))]), reader.get_avg_fps()


def seen_corner(frame: NDArray[np.uint8]) -> tuple[int, int]:
    """(top, left) of what is bright."""
    rows, columns = np.nonzero(frame.max(axis=-1) > 127)
    return int(rows.min()), int(columns.min())


def scaled(place: tuple[int, int], factor: int) -> tuple[int, int]:
    return place[0] * factor, place[1] * factor


@pytest.mark.parametrize("fps", [8, 16, 23.976])
@pytest.mark.parametrize("colour", COLOURS)
def test_an_mp4_file_holds_every_frame(colour: str, fps: float) -> None:
    frames, rate = read(mp4(pictures(squares(1, COLOURS[colour])[0]), fps))
    assert frames.shape == (FRAMES, 32, 32, 3)
    assert rate == pytest.approx(fps, rel=1e-4)
    for place, frame in enumerate(frames.astype(int)):
        top, left = corner(0, place)
        inside = frame[top + 2 : top + SIDE - 2, left + 2 : left + SIDE - 2]
        assert np.abs(inside - COLOURS[colour]).max() <= CODEC
        outside = frame.copy()
        outside[max(top - 2, 0) : top + SIDE + 2, max(left - 2, 0) : left + SIDE + 2] = 0
        assert outside.max() <= CODEC


def test_an_mp4_file_plays_in_browsers() -> None:
    content = mp4(pictures(squares(1)[0]), 8)
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 6  # BT.601, what the colours were converted with
        assert [frame.time for frame in container.decode(stream)] == pytest.approx([n / 8 for n in range(FRAMES)])
        assert float(stream.duration * stream.time_base) == pytest.approx(FRAMES / 8, abs=0.01)
    assert content[4:8] == b"ftyp" and content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(("size", "even"), [((33, 40), (34, 40)), ((40, 33), (40, 34)), ((35, 37), (36, 38))])
def test_odd_sides_get_one_more_pixel_of_their_edge(size: tuple[int, int], even: tuple[int, int]) -> None:
    frames, _ = read(mp4([Image.new("RGB", size, (255, 255, 255))] * 3, 8))
    assert frames.shape == (3, even[1], even[0], 3)
    assert frames.min() >= 255 - CODEC


def test_one_frame_is_a_video_too() -> None:
    frames, _ = read(mp4([Image.new("RGB", (32, 32))], 8))
    assert frames.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, [0]),
        (2, [0, 1]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (15, [0, 2, 4, 6, 8, 10, 12, 14]),
        (53, [0, 7, 15, 22, 30, 37, 45, 52]),
    ],
)
def test_a_strip_is_spread_over_the_video(count: int, places: list[int]) -> None:
    assert spread_evenly(count, 8) == places


def test_a_webp_file_holds_every_frame_for_its_time() -> None:
    frames = pictures(squares(1, COLOURS["red"])[0])
    with Image.open(io.BytesIO(webp(frames, 24))) as animation:
        assert (animation.n_frames, animation.info["loop"], animation.size) == (FRAMES, 0, (32, 32))
        durations = []
        for place, frame in enumerate(frames):
            animation.seek(place)
            assert np.array_equal(np.asarray(animation.convert("RGB")), np.asarray(frame))
            durations.append(animation.info["duration"])
    assert set(durations) == {41, 42}
    assert sum(durations) == round(1000 * FRAMES / 24)


def test_large_animations_are_compressed() -> None:
    noise = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 255, (4, 54, 96, 3), np.uint8)]
    assert len(webp(noise, 8)) < 0.6 * 4 * 54 * 96 * 3


def test_a_still_video_can_be_written() -> None:
    with Image.open(io.BytesIO(webp([Image.new("RGB", (32, 32), (9, 99, 9))] * 5, 8))) as animation:
        assert animation.convert("RGB").getpixel((3, 3)) == (9, 99, 9)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples in two parts, as they come from decoding in slices."""
    folder, videos = tmp_path_factory.mktemp("samples"), squares(5)
    write_grid(
        folder,
        20,
        [Media(videos=videos[:3], fps=8.0), Media(videos=videos[3:], fps=8.0)],
        [Condition(each) for each in "abcde"],
    )
    return folder


def test_the_index_of_videos_says_how_to_read_the_files(written: Path) -> None:
    index = json.loads((written / "iteration_000020.json").read_text())
    expected = {"kind": "video", "fps": 8.0, "frames": 9, "strip": [0, 1, 2, 3, 5, 6, 7, 8], "columns": 3}
    assert index == {"iteration": 20, "prompts": list("abcde"), **expected}
    names = [f"iteration_000020/sample_{place:03d}.mp4" for place in range(5)]
    names += [f"iteration_000020.{suffix}" for suffix in ("json", "mp4", "png")]
    files = [path for path in written.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(written)) for path in files) == sorted(names)


def test_each_sample_has_its_own_video(written: Path) -> None:
    for sample in range(5):
        frames, rate = read(written / "iteration_000020" / f"sample_{sample:03d}.mp4")
        assert frames.shape == (FRAMES, 64, 64, 3) and rate == 8
        for place, frame in enumerate(frames):
            assert seen_corner(frame) == scaled(corner(sample, place), 2)


def test_all_samples_play_in_a_grid(written: Path) -> None:
    frames, rate = read(written / "iteration_000020.mp4")
    assert frames.shape == (FRAMES, 2 * 64, 3 * 64, 3) and rate == 8
    for place, frame in enumerate(frames):
        for sample in range(5):
            row, column = divmod(sample, 3)
            tile = frame[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            assert seen_corner(tile) == scaled(corner(sample, place), 2)
        assert frame[64:, 128:].max() <= CODEC


def test_a_strip_shows_a_sample_from_its_first_frame_to_its_last(written: Path) -> None:
    strips = np.asarray(Image.open(written / "iteration_000020.png"))
    assert strips.shape == (5 * 66 - 2, 8 * 66 - 2, 3)
    for sample in range(5):
        for column, place in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
            tile = strips[66 * sample :, 66 * column :][:64, :64]
            expected = np.zeros((64, 64, 3), np.uint8)
            top, left = scaled(corner(sample, place), 2)
            expected[top : top + 2 * SIDE, left : left + 2 * SIDE] = 255
            assert np.array_equal(tile, expected)


def test_large_videos_are_shrunk_in_the_grid_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = torch.rand(2, 3, 1, 100, 300)
    write_grid(tmp_path, 0, [Media(videos=videos, fps=4.0)], [Condition(each) for each in "ab"])
    assert read(tmp_path / "iteration_000000" / "sample_000.mp4")[0].shape == (3, 100, 300, 3)
    assert read(tmp_path / "iteration_000000.mp4")[0].shape == (3, 86, 2 * 256, 3)  # 85 and an edge
    monkeypatch.setattr(samples, "LONGEST_VIDEO", 128)
    write_grid(tmp_path, 1, [Media(videos=videos, fps=4.0)], [Condition(each) for each in "ab"])
    assert read(tmp_path / "iteration_000001.mp4")[0].shape == (3, 22, 128, 3)  # 21 and an edge


def test_a_video_without_a_rate_gets_one(tmp_path: Path) -> None:
    write_grid(tmp_path, 0, [Media(videos=squares(1))], [Condition("a")])
    assert read(tmp_path / "iteration_000000.mp4")[1] == 8
    assert json.loads((tmp_path / "iteration_000000.json").read_text())["fps"] == 8


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(samples, "write_atomically", lambda path, content: order.append(path.name))
    write_grid(tmp_path, 0, [Media(videos=squares(2), fps=8.0)], [Condition(each) for each in "ab"])
    assert order[-1] == "iteration_000000.json" and len(order) == 5


def record(folder: Path, media: list[Media]) -> Iterator[tuple[str, Path]]:
    """The suffix and path of each leaf's thumbnail in a tree of two splits."""
    topology = grow([Schedule(4, FixedSplits((0, 1), (2, 2))).plan(0, 0)])
    scores = {"r": Scores(torch.tensor([0.1, 0.5, 0.2, 0.9]), torch.ones(4, dtype=torch.bool))}
    log_prob = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    credit = assign_credit(topology, log_prob, scores, {"r": 1.0}, CreditRule(), 0, 1)
    write_tree(folder, 40, "a two", topology, scores, credit, make_thumbnails(media))
    for leaf in json.loads((folder / "iteration_000040.json").read_text())["leaves"]:
        path = folder / leaf["thumbnail"]
        yield path.suffix, path


def test_the_leaves_of_a_video_tree_are_animations(tmp_path: Path) -> None:
    videos = squares(4)
    media = [Media(videos=videos[:1], fps=8.0), Media(videos=videos[1:], fps=8.0)]
    leaves = list(record(tmp_path, media))
    assert [suffix for suffix, _ in leaves] == [".webp"] * 4
    for sample, (_, path) in enumerate(leaves):
        with Image.open(path) as animation:
            assert (animation.n_frames, animation.size) == (FRAMES, (32, 32))
            for place in range(FRAMES):
                animation.seek(place)
                assert seen_corner(np.asarray(animation.convert("RGB"))) == corner(sample, place)
                assert animation.info["duration"] == 125


def test_the_leaves_of_an_image_tree_are_png_files(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 120, 80)
    leaves = list(record(tmp_path, [Media(images=images)]))
    assert [path.relative_to(tmp_path).as_posix() for _, path in leaves] == [
        f"iteration_000040/leaf_{place:03d}.png" for place in range(4)
    ]
    for image, (_, path) in zip(images, leaves, strict=True):
        with Image.open(path) as shown:
            assert (shown.format, shown.size) == ("PNG", (64, 96))
            assert np.array_equal(np.asarray(shown), np.asarray(fitted(pictures(image[None])[0], 96)))
