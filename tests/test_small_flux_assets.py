from pathlib import Path

import pytest
import torch
from branchtree_rewards.digits import DIGIT_WORDS, Digits, DigitsConfig
from diffusers import FluxPipeline
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from branchtree.plugins import Condition, Media

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "adapters/branchtree_adapters/assets/digits_flux"
T5_TOKENS = 8


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def images() -> Tensor:
    small = torch.as_tensor(load_digits().images[:256], dtype=torch.float32).div(16)[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    return large.repeat(1, 3, 1, 1) * 2 - 1


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8_000_000


def test_parts_have_the_expected_form(pipeline: FluxPipeline) -> None:
    assert 500_000 <= sum(parameter.numel() for parameter in pipeline.transformer.parameters()) <= 1_200_000
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.float32}
    assert not pipeline.transformer.config.guidance_embeds
    assert not pipeline.scheduler.config.use_dynamic_shifting
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.vae_scale_factor == 4
    assert pipeline.tokenizer_2.model_max_length == T5_TOKENS


def test_every_prompt_is_tokenised_whole(pipeline: FluxPipeline) -> None:
    for name in ("train", "heldout"):
        for prompt in (ROOT / f"recipes/prompts/digits_{name}.txt").read_text().splitlines():
            words = len(prompt.split())
            clip, t5 = pipeline.tokenizer(prompt).input_ids, pipeline.tokenizer_2(prompt).input_ids
            assert (len(clip), len(t5)) == (words + 2, words + 1)
            assert len(t5) <= T5_TOKENS
            assert pipeline.tokenizer_2.unk_token_id not in t5
            assert clip.index(pipeline.text_encoder.config.eos_token_id) == len(clip) - 1


def test_both_encoders_tell_the_digits_apart(pipeline: FluxPipeline) -> None:
    prompts = [f"a handwritten {word}" for word in DIGIT_WORDS]
    with torch.no_grad():
        sequence, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=T5_TOKENS)
    assert sequence.shape[:2] == (10, T5_TOKENS)
    assert torch.pdist(pooled).min() > 0.1
    assert torch.pdist(sequence.flatten(1)).min() > 0.1


@torch.no_grad()
def test_vae_restores_digits_from_standardised_latents(pipeline: FluxPipeline, images: Tensor) -> None:
    vae = pipeline.vae
    latents = vae.encode(images).latent_dist.mean
    assert latents.shape == (256, 4, 8, 8)
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean().item()) < 0.05
    assert abs(scaled.std().item() - 1) < 0.05
    assert F.mse_loss(vae.decode(latents).sample, images) < 0.01


@torch.no_grad()
def test_most_samples_show_their_digit_and_some_do_not(pipeline: FluxPipeline) -> None:
    prompts = [f"a handwritten {word}" for word in DIGIT_WORDS for _ in range(12)]
    images = pipeline(
        prompts,
        height=32,
        width=32,
        num_inference_steps=20,
        guidance_scale=0.0,
        max_sequence_length=T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    for classifier in ("reward", "heldout"):
        reward = Digits(DigitsConfig(classifier=classifier, measure="accuracy"))
        reward.load(torch.device("cpu"))
        scores = reward.score(Media(images=images), [Condition(prompt=prompt) for prompt in prompts])
        assert 0.6 <= scores.values.mean() <= 0.85
