"""The bundled FLUX that writes words: its files, and that it is neither done nor hopeless before it is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from branchtree_rewards.ocr.reward import Ocr, OcrConfig
from diffusers import FluxPipeline

from branchtree import train
from branchtree.plugins import Condition, Media

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "adapters/branchtree_adapters/assets/words_flux"
T5_TOKENS = 8


def prompts(split: str) -> list[str]:
    return (ROOT / f"recipes/prompts/words_{split}.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8_000_000


def test_words_to_train_on_and_held_out_ones_are_disjoint() -> None:
    train_words, heldout = (prompts(split) for split in ("train", "heldout"))
    assert len(set(train_words)) == len(train_words) > 200
    assert len(set(heldout)) == len(heldout) > 40
    assert not set(train_words) & set(heldout)
    assert all(re.fullmatch(r'The word "[A-Z]{3,5}"', prompt) for prompt in train_words + heldout)


def test_every_letter_is_a_token_of_t5(pipeline: FluxPipeline) -> None:
    for prompt in prompts("train") + prompts("heldout"):
        letters = len(prompt.split('"')[1])
        clip, t5 = pipeline.tokenizer(prompt).input_ids, pipeline.tokenizer_2(prompt).input_ids
        assert len(t5) == letters + 3 <= T5_TOKENS
        assert pipeline.tokenizer_2.unk_token_id not in t5
        assert len(clip) <= pipeline.tokenizer.model_max_length
        assert clip.index(pipeline.text_encoder.config.eos_token_id) == len(clip) - 1


@torch.no_grad()
def test_some_letters_can_be_read_and_some_not(pipeline: FluxPipeline) -> None:
    some = prompts("heldout")[::2]
    images = pipeline(
        some,
        height=32,
        width=128,
        num_inference_steps=20,
        guidance_scale=0.0,
        max_sequence_length=T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    for settings in ({"detect": False}, {"engine": "v4"}):
        reward = Ocr(OcrConfig(**settings))
        reward.load(torch.device("cpu"))
        scores = reward.score(Media(images=images), [Condition(prompt) for prompt in some])
        assert 0.6 <= scores.values.mean() <= 0.85
        assert scores.details["exact"].mean() <= 0.5


def test_the_recipe_trains_and_is_judged_by_both_readers(tmp_path: Path) -> None:
    changes = {"batch.prompts": 1, "evaluation.limit": 2, "run.sample_every": None, "run.tree_every": None}
    train("ocr_quickstart", changes, output=tmp_path / "run", smoke=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    assert all(0 < line["reward/ocr/mean"] < 1 for line in lines)
    evaluations = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [list(line["figures"]) for line in evaluations] == [["trained_reader", "other_reader"]] * 2
