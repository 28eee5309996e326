"""The report of a run of a video model: its samples and its trees' leaves play, and broken files still give a page."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import av
import fake_run
import fake_videos
import numpy as np
import pytest
import torch
from PIL import Image
from report_page import Page, assert_described, assert_self_contained, assert_well_formed, page

from branchtree.pictures.grid import write_grid
from branchtree.plugins import Condition, Media
from branchtree.report.images import LARGEST_ANIMATION, Picture, embed
from branchtree.report.thumbnails import within
from branchtree.report.videos import embed_video

LAST = "samples/iteration_000060"
CANNOT = f"{LAST}.mp4 cannot be shown here: it is missing, damaged or too large."


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.build_run(tmp_path_factory.mktemp("runs") / "finished", video=True)


@pytest.fixture(scope="module")
def shown(finished: Path) -> Page:
    return page(finished)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two samplings."""
    return fake_run.build_run(tmp_path_factory.mktemp("runs") / "whole", iterations=60, every=60, video=True)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


def decoded(uri: str, kind: str) -> bytes:
    head, _, content = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(content, validate=True)


def videos(shown: Page) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in shown.tags if tag == "video"]


def leaves(shown: Page, kind: str) -> list[str]:
    """Addresses of the pictures of leaves, of those that are marked as moving or as resting."""
    images = [attrs for tag, attrs in shown.tags if tag == "image" and kind in (attrs["class"] or "").split()]
    return [attrs["href"] or "" for attrs in images]


def test_the_page_stands_by_itself(shown: Page) -> None:
    assert_self_contained(shown)
    assert_well_formed(shown)
    assert_described(shown)
    policy = next(attrs["content"] or "" for _, attrs in shown.tags if attrs.get("http-equiv"))
    assert sorted(policy.split("; ")) == [
        "default-src 'none'",
        "img-src data:",
        "media-src data:",
        "style-src 'unsafe-inline'",
    ]


def test_the_page_of_a_small_run_is_small(shown: Page) -> None:
    assert len(shown.raw) < 2_000_000


def test_first_and_last_samples_play(shown: Page, finished: Path) -> None:
    assert len(videos(shown)) == 2
    for attrs, iteration in zip(videos(shown), (0, 60), strict=True):
        content = decoded(attrs["src"] or "", "video/mp4")
        assert content == (finished / "samples" / f"iteration_{iteration:06d}.mp4").read_bytes()
        with av.open(io.BytesIO(content), "r") as container:
            stream = container.streams.video[0]
            assert len(list(container.decode(stream))) == fake_videos.FRAMES
            assert stream.average_rate == fake_videos.FPS
        assert (attrs["width"], attrs["height"]) == ("192", "192")
        assert f"after {iteration} iterations" in (attrs["aria-label"] or "")
    assert shown.text.count("9 frames, 8 a second") == 2


def test_samples_wait_to_be_played(shown: Page) -> None:
    for attrs in videos(shown):
        assert {"controls", "loop", "muted", "playsinline"} <= attrs.keys() and "autoplay" not in attrs


def test_strips_are_shown_beside_the_videos(shown: Page, finished: Path) -> None:
    strips = [attrs for tag, attrs in shown.tags if tag == "img"]
    for attrs, iteration in zip(strips, (0, 60), strict=True):
        path = finished / "samples" / f"iteration_{iteration:06d}.png"
        assert decoded(attrs["src"] or "", "image/png") == path.read_bytes()
        assert (attrs["alt"] or "").startswith(f"Strips of 8 frames of 8 samples after {iteration} iterations")
    assert "Prompts, one strip each; in the video, row by row with 3 a row" in shown.text
    assert all(prompt in shown.text for prompt in fake_run.PROMPTS)


def test_leaves_move(shown: Page, finished: Path) -> None:
    records = [json.loads(path.read_text()) for path in sorted((finished / "trees").glob("*.json"))]
    files = [finished / "trees" / leaf["thumbnail"] for record in records for leaf in record["leaves"]]
    moving = leaves(shown, "moving")
    assert len(moving) == len(files) == 3 * 16
    for uri, path in zip(moving, files, strict=True):
        content = decoded(uri, "image/webp")
        assert content == path.read_bytes()
        with Image.open(io.BytesIO(content)) as animation:
            assert animation.n_frames == fake_videos.FRAMES


def test_each_moving_leaf_has_a_still_of_its_middle_frame(shown: Page) -> None:
    pairs = list(zip(leaves(shown, "moving"), leaves(shown, "resting"), strict=True))
    for moving, resting in pairs:
        with Image.open(io.BytesIO(decoded(moving, "image/webp"))) as animation:
            animation.seek(4)
            middle = np.asarray(animation.convert("RGB"))
        with Image.open(io.BytesIO(decoded(resting, "image/webp"))) as still:
            assert not getattr(still, "is_animated", False)
            assert np.array_equal(np.asarray(still.convert("RGB")), middle)


def test_motion_can_be_stopped(shown: Page) -> None:
    trees = shown.count("details", "tree")
    assert shown.count("input", "rest") == trees == 3
    reduced = re.search(r"@media \(prefers-reduced-motion: reduce\), print \{(.*?)\n\}", shown.raw, re.DOTALL)
    assert reduced and ".moving, .stop { display: none; }" in reduced[1]
    assert ".resting { display: inline; }" in reduced[1]
    assert ".tree:has(.rest:checked) .moving { display: none; }" in shown.raw.replace(".resting, ", "")


def test_a_page_without_motion_has_nothing_to_stop(tmp_path: Path) -> None:
    images = page(fake_run.build_run(tmp_path / "run", iterations=2, every=1))
    assert images.count("video") == images.count("input", "rest") == 0
    assert leaves(images, "moving") == leaves(images, "resting") == []


def test_what_training_writes_is_shown(run: Path) -> None:
    clips = torch.rand(3, 5, 3, 32, 32)
    write_grid(run / "samples", 60, [Media(videos=clips, fps=8.0)], [Condition(each) for each in "abc"])
    last = videos(page(run))[-1]
    with av.open(io.BytesIO(decoded(last["src"] or "", "video/mp4")), "r") as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(128, 128)] * 5


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("content", [b"", b"text", PLAYLIST.encode(), b"\0\0\0\x20ftypisom" + bytes(100)])
def test_a_file_that_is_no_video_is_named(run: Path, content: bytes) -> None:
    (run / f"{LAST}.mp4").write_bytes(content)
    damaged = page(run)
    assert CANNOT in damaged.text and len(videos(damaged)) == 1
    assert damaged.count("img") == 2
    assert_well_formed(damaged)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video as training writes it: its index comes first, so that what is left of it can still be opened."""
    folder = tmp_path_factory.mktemp("samples")
    write_grid(folder, 60, [Media(videos=torch.rand(3, 9, 3, 32, 32), fps=8.0)], [Condition(each) for each in "abc"])
    return folder / "iteration_000060.mp4"


def test_a_video_that_was_cut_off_is_not_embedded(sampled: Path, tmp_path: Path) -> None:
    content, path = sampled.read_bytes(), tmp_path / "cut.mp4"
    with av.open(str(sampled), "r") as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size)
    for length in (len(content) // 2, last, last + 9, len(content) - 1):
        path.write_bytes(content[:length])
        assert embed_video(path, tmp_path) is None
    path.write_bytes(content)
    assert embed_video(path, tmp_path) is not None


def test_a_video_that_was_cut_off_is_named(run: Path, sampled: Path) -> None:
    (run / f"{LAST}.mp4").write_bytes(sampled.read_bytes()[:-9])
    assert CANNOT in page(run).text


def test_a_missing_video_leaves_the_strips(run: Path) -> None:
    (run / f"{LAST}.mp4").unlink()
    unfinished = page(run)
    assert CANNOT in unfinished.text and unfinished.count("img") == 2


def test_videos_of_another_codec_or_place_or_size_are_not_embedded(tmp_path: Path) -> None:
    folder, frames = tmp_path / "run", [Image.new("RGB", (64, 64))] * 3
    folder.mkdir()
    fake_videos.write_mp4(folder / "good.mp4", frames)
    fake_videos.write_mp4(folder / "other.mp4", frames, codec="mpeg4")
    fake_videos.write_mp4(tmp_path / "secret.mp4", frames)
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with (folder / "large.mp4").open("wb") as file:
        file.write((folder / "good.mp4").read_bytes())
        file.truncate(9 * 1024**2)
    assert embed_video(folder / "good.mp4", folder) is not None
    for name in ("other.mp4", "../secret.mp4", "link.mp4", "large.mp4", "null\0.mp4", "none.mp4"):
        assert embed_video(folder / name, folder) is None


def test_broken_leaves_are_left_blank(run: Path) -> None:
    folder = run / "trees" / "iteration_000000"
    (folder / "leaf_00.webp").write_text("no picture")
    whole = (folder / "leaf_01.webp").read_bytes()
    (folder / "leaf_01.webp").write_bytes(whole[: len(whole) // 2])
    (folder / "leaf_02.webp").unlink()
    middle = whole.index(b"ANMF", len(whole) // 4) + 40
    (folder / "leaf_03.webp").write_bytes(whole[:middle] + b"\xff" * 100 + whole[middle + 100 :])
    damaged = page(run)
    assert damaged.count("rect", "missing") == 4
    assert len(leaves(damaged, "moving")) == len(leaves(damaged, "resting")) == 12


def test_an_index_that_is_not_understood_is_named(run: Path) -> None:
    path = run / f"{LAST}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "hologram"}))
    assert f"{LAST}.json cannot be read and was left out." in page(run).text


def test_text_of_a_video_run_is_never_markup(tmp_path: Path) -> None:
    evil = page(
        fake_run.build_run(tmp_path / "run", iterations=2, every=1, prompts=["<video autoplay>"] * 3, video=True)
    )
    assert len(videos(evil)) == 2 and not [attrs for attrs in videos(evil) if "autoplay" in attrs]
    assert_well_formed(evil)


def test_a_large_animation_is_shown_by_its_middle_frame(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (24, 96, 96, 3), np.uint8)
    noise[12] = (9, 99, 9)
    fake_videos.write_webp(tmp_path / "large.webp", [Image.fromarray(frame) for frame in noise])
    assert (tmp_path / "large.webp").stat().st_size > LARGEST_ANIMATION
    picture = embed(tmp_path / "large.webp", tmp_path, 160)
    assert picture is not None and picture.still is None and len(picture.uri) < 1000
    with Image.open(io.BytesIO(decoded(picture.uri, "image/webp"))) as still:
        assert np.abs(np.asarray(still.convert("RGB")).astype(int) - (9, 99, 9)).max() < 8


def test_earlier_trees_rest_where_all_would_be_too_much() -> None:
    trees = [{0: Picture("m" * 10, 1, 1, "s"), 1: Picture("png", 1, 1)} for _ in range(4)]
    resting = {0: Picture("s", 1, 1), 1: Picture("png", 1, 1)}
    assert within(trees, 40) == trees
    assert within(trees, 39) == [resting, *trees[1:]]
    assert within(trees, 25) == [resting, resting, *trees[2:]]
    assert within(trees, 9) == [resting] * 4


def test_wide_leaves_get_wide_places(run: Path) -> None:
    wide = Image.new("L", (96, 60))
    for path in (run / "trees" / "iteration_000000").iterdir():
        fake_videos.write_webp(path, fake_videos.clip(wide, 0.0))
    boxes = {(attrs["width"], attrs["height"]) for tag, attrs in page(run).tags if tag == "image"}
    assert boxes == {("115", "72")}
