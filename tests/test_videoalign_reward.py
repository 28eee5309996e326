"""The `videoalign` reward against the publisher's code (recorded outputs), peft, torchvision and published figures."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from branchtree_rewards.shared.weights import check_fit
from branchtree_rewards.small.videoalign import published_names, write_small_videoalign
from branchtree_rewards.videoalign.frames import Sampling, frame_indices, frame_size, resize_frames
from branchtree_rewards.videoalign.network import reward_weights
from branchtree_rewards.videoalign.reward import VideoAlign, VideoAlignConfig, dimensions
from branchtree_rewards.videoalign.settings import Lora, read_settings
from branchtree_rewards.videoalign.text import question_form
from pydantic import ValidationError
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

DATA = Path(__file__).parent / "data" / "rewards"
CHECKPOINT = DATA / "videoalign_small"
SCORES = json.loads((DATA / "videoalign_scores.json").read_text(encoding="utf-8"))
PROMPTS, FPS = SCORES["prompts"], SCORES["fps"]
HEAD = "base_model.model.rm_head.weight"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(DATA / "videoalign_inputs.npz") as content:
        return dict(content)


def loaded(path: Path | str = CHECKPOINT, **settings: Any) -> VideoAlign:
    reward = VideoAlign(VideoAlignConfig(path=str(path), **settings))
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def reward() -> VideoAlign:
    return loaded()


@pytest.fixture(scope="module")
def three_at_once() -> VideoAlign:
    return loaded(batch=3)


def clip(recorded: dict[str, np.ndarray], place: int) -> Media:
    """The recorded clip a or b as a batch of one."""
    frames = torch.from_numpy(recorded["ab"[place]]).permute(0, 3, 1, 2)
    return Media(videos=frames[None].float() / 255, fps=FPS[place])


def noise(count: int, frames: int = 9, seed: int = 0) -> Media:
    videos = torch.rand(count, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Media(videos=videos, fps=16.0)


def asked(*prompts: str) -> list[Condition]:
    return [Condition(prompt=prompt) for prompt in prompts]


def state() -> dict[str, Tensor]:
    content: dict[str, Tensor] = torch.load(CHECKPOINT / "checkpoint-7" / "model.pth", weights_only=True)
    return content


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Copies the checkpoint, with other weights or another model_config.json."""

    def edit(weights: dict[str, Tensor] | None = None, settings: Callable[[Any], Any] | None = None) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(CHECKPOINT, folder)
        if weights is not None:
            torch.save(weights, folder / "checkpoint-7" / "model.pth")
        if settings is not None:
            content = json.loads((folder / "model_config.json").read_text())
            settings(content)
            (folder / "model_config.json").write_text(json.dumps(content))
        return folder

    return edit


# Against the publisher


@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_are_the_publishers(outputs: int, recorded: dict[str, np.ndarray], edited: Callable[..., Path]) -> None:
    weights = state()
    if outputs == 3:
        weights[HEAD] = torch.tensor(SCORES["head_of_three"])
    ours = loaded(edited(weights))
    theirs = SCORES["heads"][str(outputs)]
    for place, prompt in enumerate(PROMPTS):
        scores = ours.score(clip(recorded, place), asked(prompt))
        assert scores.valid.all()
        for name in ("VQ", "MQ", "TA"):
            for kind in ("batch", "alone"):
                expected = theirs[kind][place][name]
                assert scores.details[name].item() == pytest.approx(expected, abs=1e-4)
            unnormalised = theirs["unnormalised"][place][name]
            assert scores.details[f"{name}_unnormalised"].item() == pytest.approx(unnormalised, abs=1e-4)
        assert scores.raw is not None
        assert scores.raw.item() == pytest.approx(theirs["batch"][place]["MQ"], abs=1e-4)


def test_inputs_are_the_publishers(reward: VideoAlign, recorded: dict[str, np.ndarray]) -> None:
    videos = []
    for place, prompt in enumerate(PROMPTS):
        media = clip(recorded, place)
        videos += reward._look(media.pixels, media.fps)
        kept = recorded["attention_mask"][place].astype(bool)
        assert reward._questions.encode(prompt, videos[place].tokens) == recorded["input_ids"][place][kept].tolist()
    rows = [reward._questions.encode(prompt, video.tokens) for prompt, video in zip(PROMPTS, videos, strict=True)]
    ids, mask = reward._questions.batch(rows, CPU)
    assert ids.tolist() == recorded["input_ids"].tolist()  # padded on the right
    assert mask.tolist() == recorded["attention_mask"].tolist()
    assert [list(video.grid) for video in videos] == recorded["video_grid_thw"].tolist()
    ours = torch.cat([video.pixels for video in videos])[:: SCORES["every"]]
    torch.testing.assert_close(ours, torch.from_numpy(recorded["patches"]), rtol=0, atol=1e-6)


def test_multimodal_positions_would_score_otherwise(reward: VideoAlign, recorded: dict[str, np.ndarray]) -> None:
    """What transformers 5 does when it is left to choose the positions is far outside of the tolerance."""
    media = clip(recorded, 0)
    video = reward._look(media.pixels, media.fps)[0]
    ids, mask = reward._questions.batch([reward._questions.encode(PROMPTS[0], video.tokens)], CPU)
    network: Any = reward._require_opened().network
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": video.pixels,
        "video_grid_thw": torch.tensor([video.grid]),
    }
    with torch.no_grad():
        kinds = 2 * (ids == network.backbone.config.video_token_id)
        hidden = network.backbone(**inputs, mm_token_type_ids=kinds.int()).last_hidden_state
        at = [ids[0].tolist().index(token) for token in reward._questions.reward_ids]
        multimodal = (hidden[0, at] @ network.head.T).squeeze(1)
        plain = network(ids, mask, [video])[0]
    published = torch.tensor([SCORES["heads"]["1"]["unnormalised"][0][name] for name in ("VQ", "MQ", "TA")])
    torch.testing.assert_close(plain, published, rtol=0, atol=1e-4)
    assert (multimodal - published).abs().max() > 0.1


def test_folded_weights_equal_pefts_unfolded_ones(reward: VideoAlign, recorded: dict[str, np.ndarray]) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Qwen2VLModel

    backbone: Any = reward._require_opened().network.backbone
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    unfolded = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=targets), Qwen2VLModel(backbone.config)
    ).eval()
    renames = {"base_model.model.model.": "language_model.", "base_model.model.visual.": "visual."}
    weights = {
        new + name.removeprefix(old): value.float()
        for name, value in state().items()
        for old, new in renames.items()
        if name.startswith(old)
    }
    unfolded.load_state_dict(weights)
    ids = torch.from_numpy(recorded["input_ids"][:1, -60:]).long()
    with torch.no_grad():
        expected = unfolded(input_ids=ids).last_hidden_state
        found = backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# Weights


def published_2b() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2-VL-2B with three tokens added, and the published checkpoint's names with empty tensors."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {
        "vocab_size": 151660,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    config = Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 1536})
    with torch.device("meta"):
        wanted = Qwen2VLModel(config).state_dict()
        named = published_names(wanted)
        for name in [name for name in named if name.endswith("base_layer.weight")]:
            layer = name.removesuffix(".base_layer.weight")
            out, into = named[name].shape
            named[f"{layer}.lora_A.default.weight"] = torch.empty(64, into, dtype=torch.bfloat16)
            named[f"{layer}.lora_B.default.weight"] = torch.empty(out, 64, dtype=torch.bfloat16)
        named["base_model.model.lm_head.weight"] = torch.empty(151660, 1536)
        named[HEAD] = torch.empty(1, 1536)
    return wanted, named


def test_the_full_models_names_and_size_are_the_published_ones() -> None:
    wanted, named = published_2b()
    numbers = sum(value.numel() for value in named.values())
    # The published file has 5,031,072,529 bytes, two for each number; the rest is the container's.
    assert 2 * numbers == 5_030_744_064
    assert len([name for name in named if name.endswith("lora_A.default.weight")]) == 28 * 7
    assert {name.split(".")[2] for name in named} == {"visual", "model", "lm_head", "rm_head"}
    weights = reward_weights(named, Lora(64, 2.0), torch.bfloat16, "published")
    check_fit(weights.backbone, wanted, "published")
    assert weights.vocabulary == 151660
    assert weights.head.dtype == torch.float32


def renamed_key(weights: dict[str, Tensor]) -> None:
    weights["base_model.model.model.layers.0.self_attn.q_prog.weight"] = weights.pop(f"{QUERY}.base_layer.weight")


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "unknown": (lambda weights: weights.update(extra=torch.ones(1)), "1 unknown: extra"),
    "new names": (
        lambda weights: weights.update({"model.language_model.norm.bias": torch.ones(1)}),
        "unknown: language_model.language_model.norm.bias",
    ),
    "missing": (lambda weights: weights.pop("base_model.model.model.norm.weight"), "missing: language_model.norm"),
    "shape": (
        lambda weights: weights.update({"base_model.model.model.norm.weight": torch.ones(31)}),
        r"language_model.norm.weight is \(31,\), not \(32,\)",
    ),
    "no head": (lambda weights: weights.pop(HEAD), "no VideoAlign checkpoint"),
    "head of two": (lambda weights: weights.update({HEAD: torch.ones(2, 32)}), "rows must be 1 or 3"),
    "half an adapter": (
        lambda weights: weights.pop(f"{QUERY}.lora_B.default.weight"),
        "lacks lora_B.default.weight of the low-rank layer 'language_model.layers.0.self_attn.q_proj'",
    ),
    "no base": (renamed_key, "lacks base_layer.weight"),
    "another rank": (
        lambda weights: weights.update({f"{QUERY}.lora_A.default.weight": torch.ones(5, 32)}),
        r"is \(5, 32\), not \(4, 32\) of rank 4",
    ),
    "another adapter": (
        lambda weights: weights.update({f"{QUERY}.lora_A.other.weight": torch.ones(4, 32)}),
        "unknown: language_model.layers.0.self_attn.q_proj.lora_A.other.weight",
    ),
    "twice": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(32)}),
        "two tensors of the checkpoint come to the name 'language_model.norm.weight'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_are_refused(case: str, edited: Callable[..., Path]) -> None:
    change, message = WRONG[case]
    weights = state()
    change(weights)
    with pytest.raises(RewardError, match=message):
        loaded(edited(weights))


def test_names_without_the_wrapper_are_read_too(reward: VideoAlign, edited: Callable[..., Path]) -> None:
    bare = {name.removeprefix("base_model.model."): value for name, value in state().items()}
    del bare["lm_head.weight"]
    scores = [one.score(noise(1), asked("a cat")).values for one in (reward, loaded(edited(bare)))]
    assert torch.equal(*scores)


def test_the_scale_of_low_rank_weights(tmp_path: Path) -> None:
    for rslora, scale in ((False, 16 / 4), (True, 16 / 2)):
        content = json.loads((CHECKPOINT / "model_config.json").read_text())
        content["peft_lora_config"].update(lora_r=4, lora_alpha=16, use_rslora=rslora)
        (tmp_path / "model_config.json").write_text(json.dumps(content))
        assert read_settings(tmp_path / "model_config.json").lora == Lora(4, scale)


# Settings and files


def test_published_mean_and_deviation(reward: VideoAlign, edited: Callable[..., Path]) -> None:
    scores = reward.score(noise(1), asked("a cat"))
    bare = loaded(edited(settings=lambda content: content.pop("inference_config")))
    assert bare.score(noise(1), asked("a cat")).values.equal(scores.values)
    for name, mean, std in (("VQ", 3.6757, 2.2476), ("MQ", 1.1646, 1.3811), ("TA", 2.8105, 2.5121)):
        expected = (scores.details[f"{name}_unnormalised"] - mean) / std
        torch.testing.assert_close(scores.details[name], expected)


def test_the_files_own_mean_and_deviation_come_first(reward: VideoAlign, edited: Callable[..., Path]) -> None:
    folder = edited(settings=lambda content: content["inference_config"].update(MQ_mean=-1.0, MQ_std=0.5))
    scores = loaded(folder).score(noise(1), asked("a cat"))
    torch.testing.assert_close(scores.values, (scores.details["MQ_unnormalised"] + 1) / 0.5)
    assert loaded(folder).fingerprint() != reward.fingerprint()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data_config", "eval_dim", ["MQ"], r"data_config.eval_dim = \['MQ'\]"),
        ("data_config", "sample_type", "multi_pts", "trained with 'uniform'"),
        ("data_config", "prompt_template_type", "detailed", "trained with 'detailed_special'"),
        ("model_config", "reward_token", "last", "trained with 'special'"),
        ("peft_lora_config", "lora_enable", False, "has lora_enable false"),
        ("data_config", "fps", None, "is not the model_config.json of a VideoAlign checkpoint"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(
    section: str, key: str, value: object, message: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(RewardError, match=message):
        loaded(edited(settings=lambda content: content[section].update({key: value})))


def test_the_highest_step_is_taken_unless_one_is_named(reward: VideoAlign, edited: Callable[..., Path]) -> None:
    folder = edited()
    shutil.copytree(folder / "checkpoint-7", folder / "checkpoint-11")
    weights = state()
    weights[HEAD] = -weights[HEAD]
    torch.save(weights, folder / "checkpoint-11" / "model.pth")
    seven, highest = reward.score(noise(1), asked("a cat")), loaded(folder).score(noise(1), asked("a cat"))
    torch.testing.assert_close(highest.details["MQ_unnormalised"], -seven.details["MQ_unnormalised"])
    assert loaded(folder, checkpoint=7).score(noise(1), asked("a cat")).values.equal(seven.values)
    with pytest.raises(RewardError, match=r"holds no 'checkpoint-8/model.pth'; set 'checkpoint'"):
        loaded(folder, checkpoint=8)


def test_from_the_hub_come_the_published_step_and_the_bases_config(
    reward: VideoAlign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the hub's own client, from a cache such as it leaves behind after a download."""
    for name in ("KlingTeam/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        if name.startswith("Qwen"):
            shutil.copy(CHECKPOINT / "config.json", snapshot)
        else:
            shutil.copy(CHECKPOINT / "model_config.json", snapshot)
            shutil.copytree(CHECKPOINT / "checkpoint-7", snapshot / "checkpoint-11352")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = VideoAlign(VideoAlignConfig())
    published.load(CPU)
    assert published.score(noise(1), asked("a cat")).values.equal(reward.score(noise(1), asked("a cat")).values)
    with pytest.raises(RewardError, match="cannot get files of 'KlingTeam/VideoReward'"):
        loaded("KlingTeam/VideoReward", checkpoint=8)


def test_what_is_no_checkpoint_folder_is_refused(edited: Callable[..., Path]) -> None:
    folder = edited()
    file = folder / "checkpoint-7" / "model.pth"
    with pytest.raises(RewardError, match="is a file; give the folder"):
        loaded(file)
    file.rename(file.with_name("adapter_model.safetensors"))
    with pytest.raises(RewardError, match="low-rank weights alone"):
        loaded(folder)
    shutil.rmtree(folder / "checkpoint-7")
    with pytest.raises(RewardError, match=re.escape("no folder checkpoint-*")):
        loaded(folder)
    with pytest.raises(RewardError, match="base 'random:small' is no model"):
        loaded(base="random:small")


def test_a_checkpoint_without_tokenizer_takes_the_bases(reward: VideoAlign, edited: Callable[..., Path]) -> None:
    """The base's tokenizer lacks the reward tokens: they are added in the publisher's order."""
    folder = edited()
    base = folder.parent / "base"
    (folder / "checkpoint-7" / "tokenizer").rename(base)
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "reward" not in token["content"]]
    (base / "tokenizer.json").write_text(json.dumps(content))
    (base / "added_tokens.json").unlink()
    (base / "special_tokens_map.json").unlink()
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").rename(base / "config.json")
    found = loaded(folder, base=str(base))
    assert found._questions.reward_ids == reward._questions.reward_ids
    assert found.score(noise(1), asked("a cat")).values.equal(reward.score(noise(1), asked("a cat")).values)


def test_a_tokenizer_of_another_model_is_refused(edited: Callable[..., Path]) -> None:
    folder = edited()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "video_token_id": 5}))
    with pytest.raises(RewardError, match=r"<\|video_pad\|> at \d+, the model's config at 5"):
        loaded(folder)


def test_a_pinned_digest_is_compared() -> None:
    digest = hashlib.sha256((CHECKPOINT / "checkpoint-7" / "model.pth").read_bytes()).hexdigest()
    loaded(sha256=digest)
    loaded(sha256={"model.pth": digest})
    with pytest.raises(RewardError, match="not the pinned"):
        loaded(sha256="0" * 64)


# Frames and text


@pytest.mark.parametrize(
    ("total", "fps", "count"),
    [
        (81, 16, 10),
        (33, 16, 4),
        (53, 16, 6),
        (81, 24, 6),
        (53, 8, 14),
        (27, 6, 8),
        (9, 16, 4),
        (3, 16, 2),
        (5000, 1, 768),
    ],
)
def test_how_many_frames_are_looked_at(total: int, fps: float, count: int) -> None:
    indices = frame_indices(total, fps, Sampling())
    assert len(indices) == count
    assert (indices[0], indices[-1]) == (0, total - 1)
    steps = np.diff(indices)
    assert steps.max() - steps.min() <= 1


def test_a_fixed_number_of_frames() -> None:
    assert len(frame_indices(81, 16, Sampling(frames=11))) == 12  # 5.5 pairs round to 6
    assert len(frame_indices(81, 16, Sampling(frames=9))) == 8  # 4.5 pairs round to 4
    with pytest.raises(ValueError, match="7 frames is too short"):
        frame_indices(7, 16, Sampling(frames=12))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 832), (336, 588)), ((240, 416), (252, 420)), ((1024, 1024), (448, 448)), ((720, 1280), (336, 588))],
)
def test_frame_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert frame_size(*size, 448 * 448) == expected


def test_frames_that_are_too_elongated() -> None:
    with pytest.raises(ValueError, match="at most 1:200"):
        frame_size(10, 2001, 448 * 448)
    with pytest.raises(ValueError, match="falls below 28"):
        frame_size(28, 5600, 28 * 28 * 100)


@pytest.mark.parametrize("size", [(240, 416), (32, 32), (480, 832), (100, 37)])
def test_the_resize_is_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    frames = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    target = frame_size(*size, 448 * 448)
    expected = resize(frames, list(target), interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(resize_frames(frames, target), expected.float())


def test_the_template_is_the_publishers_to_the_byte() -> None:
    content = (resources.files("branchtree_rewards") / "data" / "videoalign_detailed_special.txt").read_bytes()
    assert len(content) == 3997
    assert hashlib.sha256(content).hexdigest() == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    before, after = content.decode().split("{text_prompt}")
    asked_text = question_form().conversation("{text_prompt} {braces}", 2)
    assert asked_text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|>"
        f"<|video_pad|><|vision_end|>{before}{{text_prompt}} {{braces}}{after}<|im_end|>\n<|im_start|>assistant\n"
    )


# Samples


def test_a_score_does_not_depend_on_its_neighbours(reward: VideoAlign, three_at_once: VideoAlign) -> None:
    media, prompts = noise(3), ("a cat", "a very long story of a dog, which runs and runs over the hills", "")
    together = three_at_once.score(media, asked(*prompts))
    for row, prompt in enumerate(prompts):
        alone = reward.score(media[row : row + 1], asked(prompt))
        torch.testing.assert_close(alone.values, together.values[row : row + 1], rtol=0, atol=1e-5)
    assert together.values.unique().numel() == 3


@pytest.mark.parametrize("token", ["<|MQ_reward|>", "<|video_pad|>", "<|im_end|>", "<|endoftext|>"])
def test_a_prompt_with_a_special_token_is_not_scored(token: str, three_at_once: VideoAlign) -> None:
    media, reward = noise(3), three_at_once
    clean = reward.score(media, asked("a cat", "a dog", "a hen"))
    scores = reward.score(media, asked("a cat", f"a {token} dog", "a hen"))
    assert scores.valid.tolist() == [True, False, True]
    assert token in scores.reasons[1]
    torch.testing.assert_close(scores.values[[0, 2]], clean.values[[0, 2]], rtol=0, atol=1e-5)


def test_the_frame_rate_is_needed_and_counts(reward: VideoAlign) -> None:
    media = replace(noise(2, frames=49), fps=None)
    unknown = reward.score(media, asked("a cat", "a dog"))
    assert not unknown.valid.any()
    assert all("set clip_fps" in reason for reason in unknown.reasons.values())
    slow, fast = replace(media, fps=8.0), replace(media, fps=24.0)
    by_media = reward.score(slow, asked("a cat", "a dog"))
    assert by_media.valid.all()
    assert not torch.allclose(by_media.values, reward.score(fast, asked("a cat", "a dog")).values, atol=1e-3)
    by_setting = loaded(clip_fps=8.0).score(fast, asked("a cat", "a dog"))
    assert by_setting.values.equal(by_media.values)


def test_what_cannot_be_scored_is_not_valid(reward: VideoAlign) -> None:
    media = noise(2)
    media.pixels[0, 4, 1, 2, 3] = torch.nan
    scores = reward.score(media, asked("a cat", "a dog"))
    assert scores.valid.tolist() == [False, True]
    assert scores.reasons == {0: "pixels are not finite"}
    short = reward.score(noise(1, frames=1), asked("a cat"))
    assert "too short" in short.reasons[0]
    with pytest.raises(ValueError, match="scores video, not image"):
        reward.score(Media(images=torch.rand(1, 3, 32, 32)), asked("a cat"))


def test_measures_add_normalised_dimensions() -> None:
    media, conditions = noise(2), asked("a cat", "a dog")
    details = loaded("random:small").score(media, conditions).details
    for measure, names in (
        ("MQ", "M"),
        ("TA + VQ", "TV"),
        ("overall", "VMT"),
    ):
        found = loaded("random:small", measure=measure).score(media, conditions)
        expected = torch.stack([value for name, value in details.items() if len(name) == 2 and name[0] in names]).sum(0)
        torch.testing.assert_close(found.values, expected)


@pytest.mark.parametrize("measure", ["", "mq", "MQ+MQ", "MQ,VQ", "MQ+", "overall+MQ"])
def test_other_measures_are_refused(measure: str) -> None:
    with pytest.raises(ValidationError, match="no measure; write MQ, VQ, TA"):
        VideoAlignConfig(measure=measure)
    with pytest.raises(ValueError, match="no measure"):
        dimensions(measure)


def test_half_precision_leaves_the_head_alone(reward: VideoAlign) -> None:
    half = loaded(dtype="bfloat16")
    network: Any = half._require_opened().network
    assert (network.backbone.dtype, network.head.dtype) == (torch.bfloat16, torch.float32)
    exact: Any = reward._require_opened().network
    assert exact.backbone.dtype == torch.float32
    rounded, whole = (one.backbone.language_model.rotary_emb.inv_freq for one in (network, exact))
    assert rounded.dtype == whole.dtype == torch.float32
    assert rounded.equal(whole.bfloat16().float()) and not rounded.equal(whole)  # as a cast of the whole model does
    near = half.score(noise(2), asked("a cat", "a dog")).values
    assert near.isfinite().all()
    assert (near - reward.score(noise(2), asked("a cat", "a dog")).values).abs().max() < 0.3
    assert half.fingerprint() != reward.fingerprint()


def test_the_small_checkpoint_is_the_same_each_time_and_leaves_randomness_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_small_videoalign(tmp_path / "one")
    write_small_videoalign(tmp_path / "three", outputs=3)
    assert torch.get_rng_state().equal(before)
    one, three = (torch.load(tmp_path / name / "checkpoint-7" / "model.pth") for name in ("one", "three"))
    assert one.keys() == three.keys() == state().keys()
    assert all(one[name].equal(three[name]) for name in one if name != HEAD)
    assert three[HEAD].shape == (3, 32)
    assert all(value.unique().numel() > 1 for value in one.values())


def test_registered() -> None:
    entry = registry().reward("videoalign")
    assert entry.card is not None
    assert entry.card.modalities == VideoAlign.modalities == {"video"}
    assert entry.config().measure == "MQ"
