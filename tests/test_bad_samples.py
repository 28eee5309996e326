"""One sample that cannot be scored is masked with a reason, and takes nothing with it: in every reward, everywhere."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from branchtree_rewards.remote import Remote, RemoteConfig
from branchtree_rewards.unifiedreward.config import UnifiedRewardConfig
from branchtree_rewards.unifiedreward.server import ChatServer
from fake_videos import write_mp4
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from reward_servers import CPU, serving
from test_reward_conformance import all_cases

from branchtree import score
from branchtree.core.scores import Scores
from branchtree.errors import DataError
from branchtree.plugins import Condition, Media, RewardAdapter
from branchtree.plugins.protocols import GroupReward
from branchtree.plugins.scores import NamedReward, ask, needs_prompt
from branchtree.recipe.build import make_reward
from branchtree.training.limits import RowLimit
from branchtree.training.scoring import timed_scores

TOKENS = {
    "clip": "<|endoftext|>",
    "hpsv3": "<|Reward|>",
    "pickscore": "<|startoftext|>",
    "imagereward": "[SEP]",
    "unifiedreward": "<|image_pad|>",
    "videoalign": "<|MQ_reward|>",
}
"""A token of each model's own that its tokenizer would read in the middle of a prompt."""


READERS = ("clip_similarity",)
"""Rewards that read a condition's image, beside those of motion."""


@dataclass(frozen=True)
class Flaw:
    """A change to one sample, and which rewards it keeps from scoring it: those that ``stops`` says."""

    prompt: Callable[[str], str] = str
    nan: bool = False
    image: Path | None = None
    stops: Callable[[str, RewardAdapter], bool] = field(default=lambda name, reward: False)


def reads_text(name: str, reward: RewardAdapter) -> bool:
    return needs_prompt(reward) and not isinstance(reward, GroupReward)


FLAWS = {
    "none": Flaw(),
    "not finite": Flaw(nan=True, stops=lambda name, reward: True),
    "half a character": Flaw(lambda text: f"{text} \ud83d", stops=lambda n, r: reads_text(n, r) or n == "videoalign"),
    "NUL": Flaw(lambda text: f"{text}\0", stops=lambda n, r: reads_text(n, r) or n == "videoalign"),
    "empty": Flaw(lambda text: " ", stops=reads_text),
    "token": Flaw(lambda text: f"{text} {{token}} b", stops=lambda name, reward: name in TOKENS),
    "missing image": Flaw(
        image=Path("/nowhere/a.png"), stops=lambda name, reward: name in READERS or name.startswith("motion_")
    ),
}


@dataclass
class Loaded:
    """A reward with samples to score, and what it says of each alone."""

    name: str
    reward: RewardAdapter
    media: Media
    conditions: Sequence[Condition]
    tolerance: float
    alone: dict[tuple[int, str], Scores] = field(default_factory=dict)

    def sample(self, row: int, flaw: str) -> tuple[torch.Tensor, Condition]:
        """Pixels (1, ...) and condition of a sample with a flaw."""
        change, pixels = FLAWS[flaw], self.media.pixels[row : row + 1].clone()
        if change.nan:
            pixels[..., 0, 0] = torch.nan
        prompt = change.prompt(self.conditions[row].prompt).replace("{token}", TOKENS.get(self.name, "red"))
        return pixels, replace(self.conditions[row], prompt=prompt, image=change.image or self.conditions[row].image)

    def scored(self, flaws: Sequence[str]) -> Scores:
        """The scores of all samples together, with a flaw each."""
        pairs = [self.sample(row, flaw) for row, flaw in enumerate(flaws)]
        return self.reward.score(self.with_pixels(torch.cat([pixels for pixels, _ in pairs])), [c for _, c in pairs])

    def scored_alone(self, row: int, flaw: str) -> Scores:
        """The score of one sample."""
        if (row, flaw) not in self.alone:
            pixels, condition = self.sample(row, flaw)
            self.alone[row, flaw] = self.reward.score(self.with_pixels(pixels), [condition])
        return self.alone[row, flaw]

    def with_pixels(self, pixels: torch.Tensor) -> Media:
        return Media(images=pixels) if self.media.modality == "image" else Media(videos=pixels, fps=self.media.fps)


CASES = {name: case for name, case in all_cases().items() if name == case.reward["reward"]}
CASES["vbench_dynamic"] = replace(CASES["vbench_dynamic"], reward={**CASES["vbench_dynamic"].reward, "updates": 1})


@pytest.fixture(scope="module", params=CASES)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    case = CASES[request.param]
    name, adapter = case.reward["reward"], case.load()
    modality = "image" if "image" in adapter.modalities else "video"
    return Loaded(name, adapter, case.media(modality, 3), case.conditions[:3], case.tolerance)


def test_bad_samples_are_masked_and_good_ones_keep_their_scores(loaded: Loaded) -> None:
    """The good ones to the tolerance that another size of batch has: products round otherwise."""
    compares = isinstance(loaded.reward, GroupReward)

    largest = float(loaded.scored(["none"] * 3).values.abs().max())

    @settings(max_examples=2, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from(sorted(FLAWS)), min_size=3, max_size=3))
    @example(["not finite", "none", "half a character"])
    @example(["NUL", "token", "none"])
    @example(["empty", "none", "missing image"])
    def check(flaws: list[str]) -> None:
        together = loaded.scored(flaws)
        stopped = [FLAWS[flaw].stops(loaded.name, loaded.reward) for flaw in flaws]
        lonely = compares and stopped.count(False) == 1
        assert together.valid.tolist() == [not stop and not lonely for stop in stopped]
        assert set(together.reasons) == {row for row in range(3) if not together.valid[row]}
        for row in range(3) if not compares else ():
            alone = loaded.scored_alone(row, flaws[row])
            assert bool(alone.valid) == (not stopped[row])
            assert together.reasons.get(row) == alone.reasons.get(0)
            if alone.valid:
                most = loaded.tolerance * max(1.0, largest)
                torch.testing.assert_close(together.values[row : row + 1], alone.values, rtol=0, atol=most)

    check()


SHAPES = {
    "one frame": (1, 40, 48),
    "two frames": (2, 40, 48),
    "one pixel": (3, 1, 1),
    "1:500": (3, 1, 500),
    "500:1": (3, 500, 1),
    "no width": (3, 16, 0),
}


def test_a_shape_that_cannot_be_scored_masks_its_batch(loaded: Loaded) -> None:
    condition = loaded.conditions[0]
    for name, (frames, height, width) in SHAPES.items():
        pixels = torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(1))
        chosen = pixels[:, 0] if loaded.media.modality == "image" else pixels
        scores = loaded.reward.score(loaded.with_pixels(chosen), [condition] * 2)
        assert len(set(scores.valid.tolist())) == 1, name
        assert set(scores.reasons) == (set() if scores.valid.all() else {0, 1}), name
        if ":" in name and loaded.name not in {"digits", "diversity", "vbench_smoothness"}:
            assert not scores.valid.any(), name
        if frames < 3 and loaded.name.startswith("motion_"):
            assert "too short" in scores.reasons[0]


def test_a_long_prompt_is_cut_scored_or_masked(loaded: Loaded) -> None:
    """CLIP and BERT read its beginning, as their publishers say; what reads all of it says what it can read."""
    long = replace(loaded.conditions[0], prompt=loaded.conditions[0].prompt + " and a cat" * 10_000)
    rest = list(loaded.conditions[1:])
    scores = loaded.reward.score(loaded.media, [long, *rest])
    assert scores.valid.tolist() == [loaded.name not in {"hpsv3", "unifiedreward", "videoalign"}, True, True]
    assert scores.valid[0] or "too long" in scores.reasons[0]


# The same verdict everywhere


def clips(*conditions: Condition) -> tuple[Media, list[Condition]]:
    case = CASES["motion_smoothness"]
    return case.media("video", len(conditions)), list(conditions)


def broken_image(tmp_path: Path) -> Path:
    path = tmp_path / "cut.png"
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    path.write_bytes(stream.getvalue()[:60])
    return path


def test_the_verdict_is_the_same_in_process_remotely_and_in_training(tmp_path: Path) -> None:
    """To the bit, and in the same words: files that cannot be read, too, and prompts that no file could hold."""
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    media, conditions = clips(
        Condition("a ball \ud83d", location=os.fsdecode(b"prompts\xff.jsonl:3")),
        Condition("a ball", image=tmp_path / "missing.png", location="prompts.jsonl:4"),
        Condition("a ball", image=broken_image(tmp_path)),
        Condition("a ball", video=empty),
    )
    reward, _ = make_reward("motion_smoothness", {}, ("reward",))
    reward.load(CPU)
    expected = ask("motion", reward, media, conditions)
    assert expected.valid.tolist() == [True, False, False, False]
    assert (
        "missing.png" in expected.reasons[1] and "cut.png" in expected.reasons[2] and "0 bytes" in expected.reasons[3]
    )
    trained, _ = timed_scores(NamedReward("motion", 1.0, reward), media, conditions, RowLimit("rewards.motion", None))
    with serving(reward, "motion_smoothness", max_body=2**24) as url:
        remote = Remote(RemoteConfig(url=url))
        assert not remote.reads_prompt
        remote.load(CPU)
        assert not remote.reads_prompt and not needs_prompt(remote)
        for found in (trained, remote.score(media, conditions)):
            assert torch.equal(found.values[:1], expected.values[:1])
            assert torch.equal(found.valid, expected.valid)
            assert found.reasons == expected.reasons
        nothing = remote.score(Media(videos=media.pixels[..., :0], fps=8.0), conditions)
        assert nothing.reasons == reward.score(Media(videos=media.pixels[..., :0], fps=8.0), conditions).reasons
        short = remote.score(Media(videos=media.pixels[:, :1], fps=8.0), conditions)
        assert not short.valid.any() and "too short" in short.reasons[0]


def test_a_remote_reward_that_reads_prompts_says_so_and_masks_them(tmp_path: Path) -> None:
    case = CASES["clip"]
    reward, media = case.load(), case.media("image", 3)
    conditions = [Condition("a cat"), Condition("a \ud83d cat"), Condition("a cat <|endoftext|> of stone")]
    with serving(reward, "clip", max_body=2**24) as url:
        remote = Remote(RemoteConfig(url=url))
        remote.load(CPU)
        assert remote.reads_prompt and needs_prompt(remote)
        found, expected = remote.score(media, conditions), reward.score(media, conditions)
    assert found.valid.tolist() == [True, False, False]
    assert found.reasons == expected.reasons
    assert torch.equal(found.values[:1], expected.values[:1])


def test_a_short_clip_among_files_is_masked_and_the_others_are_scored(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (0, 0, 0)) for _ in range(9)]
    for turn, frame in enumerate(frames):
        frame.paste((255, 255, 255), (5 + 4 * turn, 20, 25 + 4 * turn, 40))
    write_mp4(tmp_path / "long.mp4", frames)
    write_mp4(tmp_path / "short.mp4", frames[:1])
    together = score([tmp_path / "short.mp4", tmp_path / "long.mp4"], "motion_smoothness", device="cpu")
    [alone] = score(tmp_path / "long.mp4", "motion_smoothness", device="cpu")
    short, long = (one.scores["motion_smoothness"] for one in together)
    assert short.value is None and not short.valid and "1 frame is too short" in (short.reason or "")
    assert long == alone.scores["motion_smoothness"] and long.valid


def test_a_chunk_without_good_samples_takes_no_details_from_the_others() -> None:
    """Chunks are put together: what the good ones say beside the score must not get lost."""
    reward, _ = make_reward("pickscore", {"path": "random:small", "batch": 1}, ("reward",))
    reward.load(CPU)
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    alone = reward.score(Media(images=pixels[1:]), [Condition("a cat")])
    scores = reward.score(Media(images=pixels), [Condition(" "), Condition("a cat")])
    assert scores.raw is not None and alone.raw is not None
    assert torch.equal(scores.raw[1:], alone.raw) and scores.raw[0].isnan()
    assert torch.equal(scores.details["cosine"][1:], alone.details["cosine"])
    assert not scores.valid[0] and scores.reasons == {0: "the prompt is empty"}


def test_what_a_program_gets_wrong_is_still_its_error(loaded: Loaded) -> None:
    other = Media(videos=torch.rand(3, 9, 3, 8, 8)) if loaded.media.modality == "image" else None
    wrong: list[tuple[Media, Sequence[Condition]]] = [
        (loaded.media, loaded.conditions[:2]),
        (loaded.with_pixels(loaded.media.pixels[0]), loaded.conditions),
    ]
    if loaded.reward.modalities == {"image"} and other is not None:
        wrong.append((other, loaded.conditions))
    if loaded.reward.modalities == {"video"}:
        wrong.append((Media(images=torch.rand(3, 3, 8, 8)), loaded.conditions))
    for media, conditions in wrong:
        with pytest.raises(ValueError):
            loaded.reward.score(media, conditions)


@pytest.mark.parametrize(
    ("prompt", "marker"),
    [("a <|image_pad|> cat", "<|image_pad|>"), ("<image> a cat", "<image>"), ("a <|im_end|>", "<|im_end|>")],
)
def test_a_chat_server_is_not_asked_what_it_would_not_read_as_text(prompt: str, marker: str) -> None:
    server = ChatServer(UnifiedRewardConfig(server="http://127.0.0.1:9/v1", model="model"))
    assert marker in (server.prompt_flaw(prompt, prompt) or "")
    assert server.prompt_flaw("a cat | a dog, 1 < 2 > 0", "") is None


# Files without prompts


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ('{"image": "a.png", "caption": "a cat"}', "list.jsonl:2"),
        ('{"image": "a.png", "prompt": null}', "list.jsonl:2"),
        ('{"image": "a.png", "prompt": "  "}', "list.jsonl:2"),
    ],
)
def test_a_row_without_a_prompt_is_refused_before_anything_is_loaded(row: str, place: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "prompt": "a dog"}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:  # the checkpoint is not there, and it does not come to that
        score(tmp_path / "list.jsonl", ["aesthetic path=random:small", "hps path=/nowhere"], device="cpu")
    message = str(caught.value)
    assert place in message and "reward 'hps' reads the prompt" in message and "a.png" in message
    assert '"prompt"' in message and "--prompt" in message


def test_a_file_without_a_prompt_is_scored_by_rewards_that_read_none(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    [found] = score(tmp_path / "a.png", "aesthetic path=random:small", device="cpu")
    assert found.scores["aesthetic"].valid
    for reward in ("digits", "diversity"):
        with pytest.raises(DataError, match=f"reward '{reward}' reads the prompt, and .*a.png' has none"):
            score(tmp_path / "a.png", reward, device="cpu")
    [found] = score(tmp_path / "a.png", "digits", prompt="a seven", device="cpu")
    assert found.scores["digits"].valid


@pytest.mark.parametrize(("measure", "reads"), [("MQ", False), ("VQ+MQ", False), ("TA", True), ("overall", True)])
def test_videoalign_reads_the_prompt_for_text_alignment_alone(measure: str, reads: bool) -> None:
    """What it says agrees with what it does: other prompts change the score, or do not, to the bit."""
    case = CASES["videoalign"]
    reward, media = case.load(measure=measure, batch=1), case.media("video", 1)
    assert needs_prompt(reward) is reads
    cat, dog = (reward.score(media, [Condition(prompt)]) for prompt in ("a red cat", "two dogs, running in the snow"))
    if reads:
        assert not torch.equal(cat.values, dog.values)
    else:
        torch.testing.assert_close(cat.values, dog.values, rtol=0, atol=1e-5)


def test_a_reward_that_says_nothing_of_prompts_is_taken_to_read_them() -> None:
    class Silent:
        modalities = frozenset({"image"})

        def load(self, device: torch.device) -> None: ...

        def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
            raise AssertionError

    assert needs_prompt(Silent())
