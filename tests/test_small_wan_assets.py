"""The bundled small video model: complete, small, and as good as it must be to be worth training."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from branchtree_adapters.wan import Wan, WanConfig
from branchtree_rewards.digits import Digits, DigitsConfig, named_digit
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel

from branchtree.data.prompts import load_conditions
from branchtree.plugins import Condition, Media

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "adapters/branchtree_adapters/assets/moving_digits_wan"
PROMPTS = ROOT / "recipes/prompts"
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
TOKENS, STEPS, FRAMES = 12, 16, 9


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    pipeline = WanImageToVideoPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def adapter() -> Wan:
    config = WanConfig(
        path=str(FOLDER), height=32, width=32, frames=FRAMES, fps=8, guidance=1.0, max_sequence_length=TOKENS
    )
    adapter = Wan(config)
    adapter.load(torch.device("cpu"), torch.float32, torch.float32)
    return adapter


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return load_conditions(str(PROMPTS / "moving_digits_heldout.jsonl"), "prompt", "test")


@pytest.fixture(scope="module")
def videos(adapter: Wan, conditions: list[Condition]) -> Tensor:
    """Two samples of each held-out condition, in order: (80, 9, 1, 32, 32)."""
    encoded = adapter.encode(conditions)
    rows = {name: value.repeat_interleave(2, 0) for name, value in encoded.items()}
    noises = [adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2 * len(conditions))]
    uniform = torch.linspace(1, 0, STEPS + 1)
    sigmas, latents = 3 * uniform / (1 + 2 * uniform), torch.stack(noises)
    with torch.no_grad():
        for here, there in pairwise(sigmas):
            latents = latents + (there - here) * adapter.predict(latents, here.expand(len(latents)), rows)
    return adapter.decode(latents).pixels.mean(dim=2, keepdim=True)


def displacement(videos: Tensor) -> Tensor:
    """How far the centre of brightness moves over the first half, (B, 2) as (x, y)."""
    weight = (videos[:, [0, 4], 0] - 0.3).clamp(min=0) + 1e-6
    axis, total = torch.arange(32.0), weight.sum(dim=(2, 3))
    centres = torch.stack([(weight.sum(dim=2) * axis).sum(-1) / total, (weight.sum(dim=3) * axis).sum(-1) / total], -1)
    return centres[:, 1] - centres[:, 0]


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12_000_000


def test_parts_are_of_wans_classes(pipeline: WanImageToVideoPipeline) -> None:
    for part, kind in (
        (pipeline.transformer, WanTransformer3DModel),
        (pipeline.vae, AutoencoderKLWan),
        (pipeline.text_encoder, UMT5EncoderModel),
        (pipeline.image_encoder, CLIPVisionModel),
    ):
        assert type(part) is kind
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert pipeline.vae_scale_factor_temporal == pipeline.vae_scale_factor_spatial == 4
    assert pipeline.transformer.config.image_dim == pipeline.image_encoder.config.hidden_size


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_prompt_is_tokenised_whole(name: str, pipeline: WanImageToVideoPipeline) -> None:
    for condition in load_conditions(str(PROMPTS / f"moving_digits_{name}.jsonl"), "prompt", "train"):
        tokens = pipeline.tokenizer(condition.prompt).input_ids
        assert len(tokens) == len(condition.prompt.split()) + 1 <= TOKENS
        assert pipeline.tokenizer.unk_token_id not in tokens


def test_prompt_sets_differ_and_name_one_digit_and_direction() -> None:
    sets = []
    for name, count in (("train", 120), ("heldout", 40)):
        lines = (PROMPTS / f"moving_digits_{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len({row["prompt"] for row in rows}) == count
        for row in rows:
            assert named_digit(row["prompt"]) is not None
            assert len(DIRECTIONS.keys() & set(row["prompt"].split())) == 1
            with Image.open(PROMPTS / row["image"]) as frame:
                assert frame.size == (32, 32)
        sets.append({row["prompt"] for row in rows} | {(PROMPTS / row["image"]).read_bytes() for row in rows})
    assert not sets[0] & sets[1]


@torch.no_grad()
def test_vae_keeps_real_frames(adapter: Wan, conditions: list[Condition], pipeline: WanImageToVideoPipeline) -> None:
    frames = torch.stack([pipeline.video_processor.preprocess(Image.open(c.image), 32, 32)[0] for c in conditions])
    restored = adapter.pipeline.vae.decode(adapter.pipeline.vae.encode(frames.unsqueeze(2)).latent_dist.mode()).sample
    assert (restored[:, :, 0] - frames).square().mean() < 0.02


def test_most_samples_keep_their_digit(videos: Tensor, conditions: list[Condition]) -> None:
    each = [condition for condition in conditions for _ in range(2)]
    for classifier in ("reward", "heldout"):
        reward = Digits(DigitsConfig(classifier=classifier, measure="accuracy"))
        reward.load(torch.device("cpu"))
        assert reward.score(Media(videos=videos, fps=8), each).values.mean() >= 0.8


def test_most_samples_move_as_told_and_some_do_not(videos: Tensor, conditions: list[Condition]) -> None:
    told = [DIRECTIONS[word] for c in conditions for word in c.prompt.split() if word in DIRECTIONS]
    moved = displacement(videos)
    cosine = (moved * torch.tensor(told).repeat_interleave(2, 0)).sum(-1) / moved.norm(dim=-1).clamp(min=1e-6)
    assert 0.6 <= (cosine > 0.8).float().mean() < 1
    assert moved.norm(dim=-1).mean() > 1.5  # pixels over four frames; real clips move by 5 on average


def test_samples_start_from_the_given_frame(videos: Tensor, conditions: list[Condition]) -> None:
    frames = torch.stack([torch.tensor(list(Image.open(c.image).convert("L").getdata())) for c in conditions])
    given = (frames.view(-1, 1, 32, 32) / 255).repeat_interleave(2, 0)
    own = (videos[:, 0] - given).square().mean(dim=(1, 2, 3))
    other = (videos[:, 0] - given.roll(2, 0)).square().mean(dim=(1, 2, 3))
    assert (own < other / 3).float().mean() > 0.9
