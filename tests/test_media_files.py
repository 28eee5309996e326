"""Pictures and videos as files: what is read of them is what they show, and what cannot be had is refused by name."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import media_files as files
import numpy as np
import pytest
import sweep_media as sweep
from branchtree_adapters.any_pipeline.measure import PeakMemory
from media_files import TURNS, moving
from PIL import Image

from branchtree import score
from branchtree.data.frames import first_frame
from branchtree.errors import DataError
from branchtree.plugins import Condition
from branchtree.studies.score.items import list_items
from branchtree.studies.score.media import find_forms, read

CASES = sweep.cases()
KINDS = [case.kind for case in CASES]
SOME = [case for index, case in enumerate(CASES) if index % 11 == 0 or KINDS.index(case.kind) == index]


@pytest.fixture(scope="module")
def rewards() -> dict[str, Any]:
    """Loaded once."""
    return {}


@pytest.mark.parametrize("case", SOME, ids=lambda case: f"{case.kind}-{case.name}")
def test_a_file_is_scored_as_what_it_shows_or_refused(
    case: sweep.Case, tmp_path: Path, rewards: dict[str, Any]
) -> None:
    assert sweep.verdict(case, tmp_path, rewards) in {"right", "refused"}


def test_a_sweep_has_over_200_files_of_different_names() -> None:
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES) > 200


# --- conditions ---


def test_a_condition_starts_from_the_first_frame_that_is_shown(tmp_path: Path) -> None:
    frames, signs = moving(), TURNS["quarter"]
    clip = files.lossless(tmp_path / "a.mp4", frames)
    files.turn(files.trim(clip, 5, 20), signs)
    frame = first_frame(Condition("a wave", video=clip))
    assert frame is not None
    assert np.array_equal(np.asarray(frame), files.turned(frames[5], signs))


def test_a_condition_reads_pictures_as_scoring_does(tmp_path: Path) -> None:
    wanted = sweep.deep("png", 1, tmp_path / "grey.png")
    assert isinstance(wanted, sweep.Shown)
    frame = first_frame(Condition("a wave", image=tmp_path / "grey.png"))
    assert np.array_equal(np.asarray(frame), wanted.pixels)
    for kind in ("TIFF", "GIF"):
        refusal = sweep.many(kind, tmp_path / kind)
        assert isinstance(refusal, sweep.Refused)
        with pytest.raises(DataError, match=f"^'a wave': image .*{refusal.why}"):
            first_frame(Condition("a wave", image=tmp_path / kind))


def test_a_clip_that_is_damaged_later_still_has_its_first_frame(tmp_path: Path) -> None:
    clip = files.spoil(files.lossless(tmp_path / "a.mp4", moving()), 15)
    frame = first_frame(Condition("a wave", video=clip))
    assert np.array_equal(np.asarray(frame), moving()[0])


# --- names, memory and change ---


@pytest.mark.parametrize("name", ["file:a.mp4", "http:b.mp4", "%03d.mp4", "-.mp4", "é 'x'.mp4"])
def test_names_that_a_library_could_take_for_addresses(name: str, tmp_path: Path) -> None:
    files.lossless(tmp_path / "a.mp4", moving(3)).rename(tmp_path / name)
    [form] = find_forms(list_items(tmp_path / name, None))
    assert form.shape == (3, 3, 32, 48)


def test_reading_takes_the_memory_of_its_numbers_and_of_a_frame(tmp_path: Path) -> None:
    frames, height, width = 40, 240, 320
    clip = files.write(tmp_path / "a.mp4", moving(frames, height, width), files.Coding())
    items = list_items(clip, None)
    frame = 3 * height * width
    tracemalloc.start()
    [form] = find_forms(items)
    checked = tracemalloc.get_traced_memory()[1]
    with PeakMemory() as memory:
        media = read(items, form)
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checked < 2 * frame  # no frame is kept, nor converted
    assert arrays < 4 * frame  # PyAV hands out bytes, of which NumPy makes an array
    assert media.pixels.numel() == frames * frame
    assert memory.peak <= 4 * (frames * frame + frame)


def test_a_clip_that_memory_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = files.lossless(tmp_path / "a.mp4", moving())
    sizes = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    with pytest.raises(DataError, match=r"a.mp4' has 24 frames of 48x32 at 24 fps, which take .* GiB as numbers, more"):
        score(clip, "motion_smoothness")


@pytest.mark.parametrize("frames", [5, 7])
def test_a_file_that_changes_meanwhile_is_refused(frames: int, tmp_path: Path) -> None:
    items = list_items(files.lossless(tmp_path / "a.mp4", moving(6)), None)
    [form] = find_forms(items)
    files.lossless(tmp_path / "a.mp4", moving(frames))
    with pytest.raises(DataError, match="has changed since its scoring began"):
        read(items, form)


# --- lists and folders ---


def test_all_bad_files_are_named_before_a_reward_is_loaded(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.mp4", "c.tif", "d.heic", "e.png", "f.mkv", "g.gif")]
    for path in paths:
        path.write_bytes(b"nothing of the kind")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    with pytest.raises(DataError) as refused:
        score(
            [tmp_path / "good.png", *(path for path in paths if path.suffix != ".heic")],
            "hps path=missing",
            prompt="a cat",
        )
    lines = str(refused.value).splitlines()
    named = ["b.mp4' is a video", "f.mkv' is a video", "a.png' is no image", "b.mp4' cannot be opened", "c.tif' is no"]
    assert [what in line for what, line in zip(named, lines, strict=False)] == [True] * 5
    assert lines[5:] == ["and 3 more"]
    with pytest.raises(DataError, match=r"d.heic': .heic is not read; convert this image to PNG"):
        score(paths, "digits", prompt="a one")


def test_a_folder_names_what_it_does_not_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.png", "a.PNG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in (".hidden.png", "a.txt", "a.json", "list.jsonl"):
        (tmp_path / name).touch()
    assert [item.path.name for item in list_items(tmp_path, None)] == ["a.PNG", "b.png"]
    assert not caplog.records
    (tmp_path / "photo").touch()
    (tmp_path / "more").mkdir()
    assert len(list_items(tmp_path, None)) == 2
    [record] = caplog.records
    assert record.getMessage().endswith("not scored, as no image or video by name: 'more', 'photo'")
    for name in ("c.HEIC", "d.avif", "e.wmv"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"c.HEIC': .heic is not read.*\n.*d.avif.*\n.*e.wmv.*convert this video to MP4"
    ):
        list_items(tmp_path, None)
