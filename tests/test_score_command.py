"""``branchtree score`` and ``branchtree rewards``: files of every kind in, numbers and messages out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from branchtree_rewards.digits import Digits, DigitsConfig
from branchtree_rewards.motion.reward import MotionConfig, MotionSmoothness
from clips import digit_clips
from fake_videos import FPS, write_mp4
from guests import Outcome, fake_distribution
from PIL import Image
from sklearn.datasets import load_digits

from branchtree import BranchTreeError, score
from branchtree.errors import DataError, OutputError, RecipeError, RewardError
from branchtree.plugins import Condition, Media
from branchtree.studies.score import run

CPU = torch.device("cpu")
PROBE = """
    from pathlib import Path

    import torch
    from pydantic import BaseModel

    from branchtree.plugins.hookspecs import hookimpl
    from branchtree.core.scores import Scores
    from branchtree.plugins import RewardCard


    class Config(BaseModel, extra="forbid"):
        log: str = ""
        fail: bool = False


    class Probe:
        modalities = frozenset({"image", "video"})
        reads_prompt = False

        def __init__(self, config):
            self.config = config

        def load(self, device):
            self.note("load")

        def note(self, text):
            if self.config.log:
                with open(self.config.log, "a") as file:
                    file.write(text + "\\n")

        def score(self, media, conditions):
            self.note(f"{tuple(media.pixels.shape)} {media.fps} {[c.prompt for c in conditions]}")
            if self.config.fail:
                raise ValueError("out of ideas")
            values = media.pixels.flatten(1).mean(dim=1)
            bad = [row for row, condition in enumerate(conditions) if condition.prompt == "bad"]
            values[bad] = float("nan")
            third = torch.full_like(values, 1 / 3)
            details = {"third": third, "hole": torch.full_like(values, float("nan"))}
            return Scores(values, values.isfinite(), values / 2, details, {row: "a bad prompt" for row in bad})


    class Pictures(Probe):
        modalities = frozenset({"image"})


    class Compares(Probe):
        groupwise = True


    @hookimpl
    def register_rewards(register):
        card = RewardCard(frozenset({"video"}), "org/[name] model.bin", 1_972_000_000, "CC-BY-NC-4.0", True, "arXiv 1")
        unsure = RewardCard(frozenset({"image"}), "org/other", None, "MIT", False, "a model card")
        register("probe", build=Probe, config=Config, summary="Mean of pixels.", card=card)
        register("pictures", build=Pictures, config=Config, summary="Of pictures.", card=unsure)
        register("compares", build=Compares, config=Config, summary="Of groups.")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, plug: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the probes installed; files are named as from there."""
    fake_distribution(tmp_path / "site", "score-probes", {"probes": "score_probes"}, {"score_probes": PROBE})
    plug(tmp_path / "site")
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(name: str, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.squeeze()).save(name)
    return name


def video(name: str, frames: int = 9, size: int = 32) -> str:
    pixels = (digit_clips(1, seed=2).videos[0, :frames] * 255).byte().permute(0, 2, 3, 1).numpy()
    write_mp4(Path(name), [Image.fromarray(frame).resize((size, size)) for frame in pixels])
    return name


def write_rows(name: str, *rows: Mapping[str, Any] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def calls(log: Path) -> list[str]:
    return log.read_text().splitlines()


def digits_of(pixels: Sequence[np.ndarray], prompt: str) -> list[float]:
    """As training would score 8-bit samples of one size: by the reward itself, on bytes / 255."""
    reward = Digits(DigitsConfig())
    reward.load(CPU)
    images = torch.stack([torch.tensor(one).permute(2, 0, 1) for one in pixels]).float() / 255
    values: list[float] = reward.score(Media(images=images), [Condition(prompt)] * len(pixels)).values.tolist()
    return values


def test_a_picture_gets_the_score_that_training_gives_its_bytes() -> None:
    shown = np.repeat(np.kron(load_digits().images[7] * 15, np.ones((4, 4))).astype(np.uint8)[..., None], 3, axis=2)
    small = [shown, picture(32, 32, 1)]
    wide = [picture(20, 48, 2), picture(20, 48, 3)]
    files = [save("a.png", small[0]), save("b.webp", wide[0]), save("c.png", small[1]), save("d.bmp", wide[1])]
    wide[0] = np.asarray(Image.open("b.webp").convert("RGB"))  # it is lossy
    scored = score(files, "digits", prompt=" a handwritten seven ", device="cpu")
    first, second = digits_of(small, "a handwritten seven"), digits_of(wide, "a handwritten seven")
    assert [one.scores["digits"].value for one in scored] == [first[0], second[0], first[1], second[1]]
    assert [one.file for one in scored] == files
    assert {one.prompt for one in scored} == {"a handwritten seven"}
    assert first[0] > max(first[1], *second)


def test_pictures_become_rgb_as_publishers_convert_them() -> None:
    """Grey is repeated, alpha left out, and an orientation tag not followed."""
    grey, clear, turned = picture(8, 12, 1, 1), picture(8, 12, 2, 4), picture(8, 12, 3)
    files = [save("grey.png", grey), save("clear.png", clear), "turned.png"]
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(turned).save("turned.png", exif=tag)
    expected = digits_of([np.repeat(grey, 3, axis=2), clear[..., :3], turned], "7")
    assert [one.scores["digits"].value for one in score(files, "digits", prompt="7")] == expected


def test_a_video_is_scored_whole_with_its_rate(tmp_path: Path) -> None:
    name, log = video("a.mp4"), tmp_path / "log"
    with av.open(name) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    reward = MotionSmoothness(MotionConfig())
    reward.load(CPU)
    videos = torch.tensor(np.stack(frames)).permute(0, 3, 1, 2)[None].float() / 255
    expected = reward.score(Media(videos=videos), [Condition("")]).values.item()
    assert expected > 0.3
    [one] = score(name, ["motion_smoothness", f"probe log={log}"])
    assert (one.kind, one.prompt) == ("video", "")
    assert one.scores["motion_smoothness"].value == pytest.approx(expected, abs=2e-3)  # decoders differ in a few bytes
    assert one.scores["probe"].value == pytest.approx(videos.mean().item(), abs=2e-3)
    assert calls(log)[1:] == [f"(1, 9, 3, 32, 32) {float(FPS)} ['']"]


def test_files_are_read_in_batches_of_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    files = [save(f"{place}.png", picture(*((8, 8) if place % 3 else (6, 10)), place)) for place in range(7)]
    files += [video("a.mp4"), video("short.mp4", frames=5), video("b.mp4")]
    scored = score(files, f"probe log={log}", batch=3, prompt="p")
    assert [one.file for one in scored] == files
    shapes = [line.partition(") ")[0] + ")" for line in calls(log)[1:]]
    images = ["(3, 3, 6, 10)", "(3, 3, 8, 8)", "(1, 3, 8, 8)"]
    assert shapes == [*images, "(2, 9, 3, 32, 32)", "(1, 5, 3, 32, 32)"]
    monkeypatch.setattr(run, "NUMBERS", 2 * 3 * 8 * 8)
    again = score(files, f"probe log={log}", batch=3, prompt="p")
    assert again == scored
    assert [line[1] for line in calls(log)[len(shapes) + 2 :]] == list("2122" + "111")


def test_a_list_brings_prompts_metadata_and_its_own_folder(command: Callable[..., Outcome]) -> None:
    Path("set").mkdir()
    save("set/a.png", picture(8, 8, 1))
    save("set/b.png", picture(8, 8, 2))
    rows = write_rows(
        "set/list.jsonl",
        {"image": "a.png", "prompt": "a one", "model": "x", "step": 3},
        "",
        {"video": "../v.mp4"},
        {"image": "b.png", "prompt": "bad"},
    )
    video("v.mp4")
    Path("out.jsonl").write_text("old")
    done = command("score", rows, "a.png", "-r", "probe", "--prompt", "told", "-o", "out.jsonl")
    assert (done.code, done.out) == (2, "")
    assert "there is no file 'a.png'" in done.err
    assert Path("out.jsonl").read_text() == "old"
    assert command("score", rows, "-r", "probe", "--prompt", "told", "-o", "out.jsonl").code == 0
    text = Path("out.jsonl").read_text()
    assert "NaN" not in text
    first, second, third = (json.loads(line) for line in text.splitlines())
    value = float(torch.tensor(picture(8, 8, 1)).float().div(255).mean())
    found = first["scores"]["probe"]
    assert (first["file"], first["kind"], first["prompt"]) == ("set/a.png", "image", "a one")
    assert first["metadata"] == {"model": "x", "step": 3}
    assert found["value"] == pytest.approx(value, abs=1e-6)
    assert np.float32(found["raw"]) == np.float32(found["value"]) / 2
    assert found["details"] == {"third": float(np.float32(1 / 3)), "hole": None}
    assert (second["kind"], second["prompt"], second["metadata"]) == ("video", "told", {})
    assert third["scores"]["probe"] | {"details": {}} == {
        "value": None,
        "raw": None,
        "valid": False,
        "reason": "a bad prompt",
        "details": {},
    }
    assert not list(Path().glob(".*partial"))


def test_the_table_says_it_all(command: Callable[..., Outcome]) -> None:
    long = "an [odd] prompt that goes on and on, far beyond what a table has room for"
    rows = write_rows(
        "list.jsonl",
        *({"image": save(f"{n}.png", np.full((8, 8, 3), n, np.uint8)), "prompt": long} for n in (51, 102)),
        {"image": save("[bold].png", picture(8, 8)), "prompt": "bad"},
    )
    done = command("score", rows, "--reward", "probe", "--reward", "digits classifier=heldout", "--device", "cpu")
    assert done.code == 0
    lines = done.out.splitlines()
    assert all(heading in lines[1] for heading in ("File", "Prompt", "probe", "digits"))
    assert "0.2" in next(line for line in lines if "51.png" in line)
    assert "an [odd] prompt that goes on and on,..." in done.out
    assert "invalid: a bad prompt" in next(line for line in lines if "[bold].png" in line)
    assert "invalid: " in next(line for line in lines if "51.png" in line)  # no digit is named
    mean = next(line for line in lines if "mean" in line)
    assert "0.3 (2 of 3)" in mean
    assert "- (0 of 3)" in mean


def test_a_folder_is_its_pictures_and_videos_by_name() -> None:
    Path("set").mkdir()
    names = [save("set/b.png", picture(8, 8)), save("set/a.JPG", picture(8, 8)), video("set/c.mp4")]
    Path("set/notes.txt").write_text("no picture")
    assert [one.file for one in score("set", "probe")] == sorted(names)
    assert [one.file for one in score([{"image": names[0], "note": 1}], "probe")] == [names[0]]


def test_a_reward_that_compares_gets_whole_prompts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = [{"image": save(f"{n}.png", picture(8, 8, n)), "prompt": "ab"[n % 2]} for n in range(5)]
    scored = score(rows, [f"compares log={log}", "probe"], batch=2)
    assert [one.file for one in scored] == [row["image"] for row in rows]
    assert list(scored[0].scores) == ["compares", "probe"]
    assert all(one.scores["compares"].value == one.scores["probe"].value for one in scored)
    assert [line.split("None ")[1] for line in calls(log)[1:]] == ["['a', 'a', 'a']", "['b', 'b']"]
    save("0.png", picture(9, 8))
    with pytest.raises(
        DataError, match="compares the samples of a prompt, so those of 'a' must be alike; there are 8x9"
    ):
        score(rows, "compares")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"image": "a.png", "video": "v.mp4"}',
            "list.jsonl:2: needs a file under one of 'image', 'video' and",
        ),
        ('{"prompt": "a cat"}', "but has none; it has prompt"),
        ("{}", "but has none; it has nothing"),
        ('{"image": 3}', "list.jsonl:2: image: write the path of a file as a text"),
        ('{"image": "a.png", "prompt": 3}', "list.jsonl:2: prompt: write a text, or leave it out"),
        ('{"image": "a.png"', "list.jsonl:2: not valid JSON"),
        ('["a.png"]', "list.jsonl:2: each line is one JSON object"),
        ('{"image": "none.png"}', "list.jsonl:2: there is no file 'none.png'"),
        ('{"image": "text.png"}', "list.jsonl:2: file 'text.png' is no image; give a PNG or JPEG file"),
        ('{"image": "cut.png"}', "list.jsonl:2: image 'cut.png' cannot be read: "),
        ('{"image": "empty.png"}', "list.jsonl:2: file 'empty.png' is empty (0 bytes)"),
        ('{"image": "moving.gif"}', "list.jsonl:2: image 'moving.gif' is an animation; give one frame of it"),
        ('{"image": "v.mp4"}', "list.jsonl:2: file 'v.mp4' is no image"),
        ('{"video": "text.png"}', "list.jsonl:2: video 'text.png' cannot be opened"),
        ('{"video": "v.mp4"}', "list.jsonl:2: reward 'pictures' scores images, but 'v.mp4' is a video"),
    ],
)
def test_each_wrong_line_is_named_before_anything_is_loaded(
    content: str, said: str, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    save("a.png", picture(8, 8))
    whole = Path("a.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("text.png").write_text("no picture")
    Path("empty.png").touch()
    frames = [Image.fromarray(picture(8, 8, seed)) for seed in range(2)]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    if "v.mp4" in content:
        video("v.mp4")
    write_rows("list.jsonl", {"image": "a.png"}, content)
    reward = "probe" if "cannot be opened" in said else "pictures"
    done = command("score", "list.jsonl", "--reward", f"{reward} log={tmp_path / 'log'}")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert not (tmp_path / "log").exists()


def test_what_is_no_input_is_refused(here: Path) -> None:
    Path("notes.txt").write_text("no picture")
    Path("empty").mkdir()
    Path("empty.jsonl").write_text("\n\n")
    Path("latin.jsonl").write_bytes(b"caf\xe9")
    for given, said in {
        "notes.txt": "is neither an image nor a video by its name; known are .avi",
        "empty": "folder 'empty' holds no images or videos",
        "empty.jsonl": "empty.jsonl: is empty; write lines such as",
        "latin.jsonl": "latin.jsonl:1: is not UTF-8 text: byte 0xe9 after 'caf'",
        "none.jsonl": "there is no file 'none.jsonl'",
        "none": "there is no file 'none'",
    }.items():
        with pytest.raises(DataError, match=said):
            score(given, "digits")
    with pytest.raises(DataError, match="there is nothing to score"):
        score([], "digits")


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([], "there is no reward to score by"),
        ("digit", "did you mean 'digits'"),
        ("digits clasifier=heldout", r"digits.clasifier: unknown key 'clasifier'; did you mean 'classifier'"),
        ("digits heldout", "'heldout' is no setting; write it as key=value"),
        ("digits 'classifier=heldout", "cannot be read: no closing quotation; write NAME key=value"),
        (" ", "cannot be read: it is empty"),
        (["digits", "digits"], "reward 'digits' is given twice"),
        ("digits weight=2", "leave 'weight' out"),
        ({"classifier": "heldout"}, "reward: field required"),
    ],
)
def test_what_is_no_reward_is_refused(rewards: Any, said: str) -> None:
    with pytest.raises(BranchTreeError, match=said):
        score(save("a.png", picture(8, 8)), rewards)


def test_rewards_are_told_apart_by_their_settings() -> None:
    name = save("a.png", picture(8, 8))
    entries = ["digits", {"reward": "digits", "classifier": "heldout"}, "digits measure=accuracy label=hit"]
    [one] = score(name, entries, prompt="7")
    assert list(one.scores) == ["digits", "digits classifier=heldout", "hit"]
    assert one.scores["hit"].value in {0.0, 1.0}
    [alone] = score(name, entries[1], prompt="7")
    assert alone.scores["digits"] == one.scores["digits classifier=heldout"]


def test_a_failing_reward_is_named_with_the_files(command: Callable[..., Outcome]) -> None:
    name = save("a.png", picture(8, 8))
    Path("out.jsonl").write_text("old")
    done = command("score", name, "-r", "probe fail=true", "-o", "out.jsonl")
    assert done.code == 2
    assert "reward 'probe' failed: ValueError: out of ideas (scoring 'a.png')" in done.err
    assert Path("out.jsonl").read_text() == "old"
    with pytest.raises(RewardError):
        score(name, {"reward": "probe", "fail": True})


def test_scores_are_written_and_progress_is_reported() -> None:
    names, steps = [save(f"{n}.png", picture(8, 8, n)) for n in range(3)], list[tuple[int, int]]()
    rewards = ["probe", "digits"]
    scored = score(names, rewards, prompt="7", output="out/s.jsonl", batch=2, advance=lambda *step: steps.append(step))
    lines = Path("out/s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(one) for one in scored]
    assert [line["file"] for line in map(json.loads, lines)] == names
    assert steps == [(4, 6), (6, 6)]


def test_scores_that_the_disk_has_no_room_for_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    name = save("a.png", picture(8, 8))
    with pytest.raises(
        OutputError, match=r"s\.jsonl: cannot be written: No space left on device\. The scores"
    ) as raised:
        score(name, "probe", output="s.jsonl")
    [found] = score(name, "probe")
    assert json.loads(str(raised.value).splitlines()[1]) == asdict(found)
    assert os.listdir() == ["a.png"]


def test_an_output_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = write_rows("list.jsonl", {"image": save("a.png", picture(8, 8))})
    Path("file").touch()
    for output, said in {
        ".": "is a folder; name a file in it",
        "list.jsonl": "would replace a file that is to be read",
        "./a.png": "would replace a file that is to be read",
        "file/out.jsonl": "its folder cannot be made",
    }.items():
        with pytest.raises(OutputError, match=said):
            run.score_files(rows, f"probe log={log}", output=Path(output))
    assert not log.exists()


def test_device_and_batch_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    name = save("a.png", picture(8, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert score(name, "probe", device="auto")
    for options, said in [({"device": "tpu"}, "write auto"), ({"device": "cuda"}, "no CUDA"), ({"batch": 0}, "batch")]:
        with pytest.raises(RecipeError, match=said):
            score(name, "probe", **options)


def test_rewards_are_listed_with_their_cards(command: Callable[..., Outcome]) -> None:
    done = command("rewards")
    assert done.code == 0
    heading, *blocks = re.split(r"\n(?=\S)", done.out)
    rows = {block.split()[0]: " ".join(block.split()) for block in blocks}
    assert all(name in heading for name in ("Reward", "Scores", "GB", "Non-commercial", "What it is"))
    assert "1.97 yes Mean of pixels." in rows["probe"]
    for part in ("Checkpoint: org/[name] model.bin.", "Licence: CC-BY-NC-4.0.", "Source: arXiv 1."):
        assert part in rows["probe"]
    assert all(part in rows["pictures"] for part in (" - no ", "Licence: MIT.", "Source: a model card."))
    assert "Checkpoint and licence: not given." in rows["compares"]
    assert all(part in rows["digits"] for part in ("Checkpoint: bundled.", "Licence: Apache-2.0."))
    assert all(part in rows["motion_direction"] for part in ("video", "Checkpoint: none.", "Licence: Apache-2.0."))
