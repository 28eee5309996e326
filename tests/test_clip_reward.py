"""The `clip` reward against the libraries that its models are published for.

OpenAI's two models are compared with transformers' own CLIPModel, its PIL processor and its CLIPTokenizer, which is the
rule for prompts that their hub pages give. DFN5B is compared with open_clip: its towers, its tokenizer and its picture
transform.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import open_clip
import pytest
import regex
import torch
from branchtree_rewards.clip.clip_score import ClipConfig, ClipScore
from branchtree_rewards.clip.text import CLIP_TOKENIZER, token_ids
from branchtree_rewards.small.clip import write_clip_folder
from clip_publisher import (
    SCORED,
    open_clip_cosine,
    prompts,
    random_pictures,
    tiny_open_clip,
    up_to_end,
)
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
SHAPES = [(40, 60), (61, 23), (28, 28), (17, 90), (300, 200), (25, 20)]  # heights, widths; the last has 7 to cut
WEIGHTS = "open_clip_pytorch_model.bin"


def conditions(*texts: str) -> list[Condition]:
    return [Condition(text) for text in texts]


def loaded(path: Path | str, **settings: Any) -> ClipScore:
    reward = ClipScore(ClipConfig.model_validate({"path": str(path), **settings}))
    reward.load(CPU)
    return reward


def to_pil(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]


@torch.no_grad()
def transformers_cosine(folder: Path, pictures: Tensor, texts: list[str]) -> Tensor:
    """What transformers itself makes of a folder: its model, its PIL processor and its tokenizer."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder)(images=to_pil(pictures), return_tensors="pt")
    words = CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    output = model(**words, **images)
    cosine: Tensor = output.logits_per_image.diagonal() / model.logit_scale.exp()
    return cosine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip_folder(folder, seed=5)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_openai_models_score_as_transformers(folder: Path, shape: tuple[int, int]) -> None:
    texts = [text for text in SCORED if "<|" not in text]  # which transformers reads as end and start
    pictures = random_pictures(len(texts), *shape)
    expected = transformers_cosine(folder, pictures, texts)
    scores = loaded(folder).score(Media(images=pictures / 255), conditions(*texts))
    assert scores.valid.all()
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.05


def test_openai_models_read_all_prompts_as_transformers(folder: Path) -> None:
    texts = [text for text in prompts()[::3] if text.strip() and "<|" not in text]  # the others are masked
    pictures = random_pictures(1, 30, 40).expand(len(texts), -1, -1, -1)
    scores = loaded(folder, batch=200).score(Media(images=pictures / 255), conditions(*texts))
    torch.testing.assert_close(scores.values, transformers_cosine(folder, pictures, texts), rtol=0, atol=1e-6)


def test_openai_tokens_follow_the_rule_of_transformers(vocabulary: Path) -> None:
    """Composed accents, single spaces, lower case, and no mending; the rest by open_clip's splitter."""
    texts = [text for text in prompts() if "<|" not in text]  # which transformers reads as end and start
    theirs = open_clip.tokenizer.SimpleTokenizer()
    theirs.clean_fn = lambda text: regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()
    ours = token_ids(CLIP_TOKENIZER.load(str(vocabulary)), texts, 77)
    expected = theirs(texts, context_length=77)
    differing = [
        text for text, a, b in zip(texts, expected, ours, strict=True) if up_to_end(a, 49407) != up_to_end(b, 49407)
    ]
    assert differing == []
    assert len(texts) > 500


def test_a_long_prompt_is_cut_before_its_end_token(vocabulary: Path) -> None:
    ids = token_ids(CLIP_TOKENIZER.load(str(vocabulary)), ["dog " * 200, "dog " * 75, "dog " * 74], 77)
    assert ids[:, 0].tolist() == [49406] * 3
    assert ids[0].tolist() == ids[1].tolist()
    assert up_to_end(ids[0], 49407)[-1] == 49407
    assert [len(up_to_end(row, 49407)) for row in ids] == [77, 77, 76]


def test_legacy_configurations_end_texts_at_the_highest_id(folder: Path, tmp_path: Path) -> None:
    """OpenAI's own config.json names 2 as the end token, and means the highest."""
    legacy = _with_end(folder, tmp_path, 2)
    pictures = random_pictures(6, 30, 40)
    expected = transformers_cosine(folder, pictures, SCORED[:6])
    scores = loaded(legacy).score(Media(images=pictures / 255), conditions(*SCORED[:6]))
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)


def test_a_model_that_reads_texts_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"ends prompts with id 513, and the model of .* reads texts at id 7"):
        loaded(_with_end(folder, tmp_path, 7))


def _with_end(folder: Path, copy: Path, end: int) -> Path:
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = end
    (copy / "config.json").write_text(json.dumps(config))
    return copy


PREPROCESS = {"resize_mode": "squash", "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def dfn5b(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> tuple[open_clip.CLIP, ClipScore]:
    """open_clip's own small model, and the reward that loaded its weights as DFN5B's are published."""
    folder = tmp_path_factory.mktemp("dfn5b")
    model, config = tiny_open_clip(quick_gelu=True, image=42)
    torch.save(model.state_dict(), folder / WEIGHTS)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    return model, loaded(folder, variant="dfn5b", tokenizer=str(vocabulary))


@pytest.mark.parametrize("shape", SHAPES)
def test_dfn5b_scores_as_open_clip(dfn5b: tuple[open_clip.CLIP, ClipScore], shape: tuple[int, int]) -> None:
    model, reward = dfn5b
    pictures = random_pictures(len(SCORED), *shape)
    transform = image_transform_v2(PreprocessCfg(size=42, **PREPROCESS), is_train=False)
    expected = open_clip_cosine(model, torch.stack([transform(picture) for picture in to_pil(pictures)]), SCORED)
    scores = reward.score(Media(images=pictures / 255), conditions(*SCORED))
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01


def test_the_variants_are_the_published_sizes() -> None:
    from branchtree_rewards.clip.network import VIT_H_14_378

    config = open_clip.get_model_config("ViT-H-14-378-quickgelu")
    assert VIT_H_14_378.quick_gelu is config["quick_gelu"] is True
    told = VIT_H_14_378.model_dump()
    assert config["vision_cfg"].items() <= told["vision_cfg"].items()
    assert config["text_cfg"].items() <= told["text_cfg"].items()
    assert told["embed_dim"] == config["embed_dim"]


def test_spoilt_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    projection = state.pop("visual_projection.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"missing: visual_projection\.weight"):
        loaded(tmp_path)
    state |= {"visual_projection.weight": projection, "head.weight": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"unexpected: head\.weight"):
        loaded(tmp_path)
    with pytest.raises(RewardError, match="is one file; give the folder"):
        loaded(tmp_path / "model.safetensors")


def test_a_folder_without_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(RewardError, match=r"cannot load a CLIP tokenizer from .*no vocabulary"):
        loaded(tmp_path)
    assert loaded(tmp_path, tokenizer=str(folder))


def test_a_hub_id_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(RewardError, match="openai/clip-vit-large-patch14"):
        ClipScore(ClipConfig(variant="openai-l14")).load(CPU)


def test_the_weights_can_be_pinned(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    loaded(folder, sha256={"model.safetensors": digest})
    with pytest.raises(RewardError, match="not the pinned"):
        loaded(folder, sha256="f" * 64)


VARIANTS = ["openai-b32", "openai-l14", "dfn5b"]
TEXTS = ("a red fox", "a fox, asleep in the snow", "Rain", "two boats at sea", "a", "the end of a very long road")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_small_random_checkpoint_takes_the_same_way(variant: str) -> None:
    entry = registry().reward("clip")
    reward = entry.build(entry.config.model_validate({"path": "random:small", "variant": variant, "batch": 4}))
    before = torch.get_rng_state()
    reward.load(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    media = Media(images=random_pictures(6, 20, 33) / 255)
    together = reward.score(media, conditions(*TEXTS))
    assert together.valid.all()
    assert together.values.std() > 0.01
    alone = [reward.score(media[row : row + 1], conditions(TEXTS[row])).values for row in range(6)]
    torch.testing.assert_close(together.values, torch.cat(alone), rtol=0, atol=1e-6)
    assert reward.fingerprint() == loaded("random:small", variant=variant).fingerprint()


def test_pictures_that_are_not_finite_are_masked_and_videos_refused() -> None:
    reward = loaded("random:small")
    images = random_pictures(3, 20, 33) / 255
    images[1, 0, 0, 0] = torch.inf
    scores = reward.score(Media(images=images), conditions(*TEXTS[:3]))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.reasons == {1: "pixels are not finite"}
    with pytest.raises(ValueError, match="scores image, not video"):
        reward.score(Media(videos=torch.rand(1, 2, 3, 8, 8)), conditions("a"))


def test_the_scale_is_applied_and_the_raw_score_kept() -> None:
    media = Media(images=random_pictures(6, 20, 33) / 255)
    raw = loaded("random:small").score(media, conditions(*TEXTS)).values
    scores = loaded("random:small", scale="clipscore").score(media, conditions(*TEXTS))
    assert scores.raw is not None
    torch.testing.assert_close(scores.raw, raw, rtol=0, atol=1e-6)
    assert torch.equal(scores.values, 2.5 * scores.raw.clamp(min=0))
    assert (raw < 0).any()
    assert (raw > 0).any()
