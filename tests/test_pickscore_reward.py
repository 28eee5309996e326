"""The `pickscore` reward against transformers' own classes, used as the model card uses them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.clip.pickscore import PickScore, PickScoreConfig
from branchtree_rewards.clip.text import CLIP_TOKENIZER, token_ids
from branchtree_rewards.small.clip import write_clip_folder
from clip_publisher import prompts, random_pictures, up_to_end, write_vocabulary
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
PROMPTS = ["a cat", "Two dogs & a “bird”", ".", "word " * 100, "a cat"]
SIZES = [(28, 28), (64, 40), (33, 90), (20, 25)]  # heights and widths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pickscore")
    write_clip_folder(path, seed=11)
    return path


def loaded(path: Path | str, **options: Any) -> PickScore:
    reward = PickScore(PickScoreConfig(path=str(path), **options))
    reward.load(CPU)
    return reward


@torch.no_grad()
def by_the_model_card(folder: Path, pictures: Tensor) -> tuple[Tensor, float]:
    """Scores of bytes (B, 3, H, W), each picture for its own prompt, and the logit scale."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    scores = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        texts = tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        seen = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
        read = model.get_text_features(**texts).pooler_output
        seen, read = seen / seen.norm(dim=-1, keepdim=True), read / read.norm(dim=-1, keepdim=True)
        scores.append(model.logit_scale.exp() * (read @ seen.T)[0, 0])
    return torch.stack(scores), model.logit_scale.exp().item()


def pairs(pictures: Tensor) -> tuple[Media, list[Condition]]:
    return Media(images=pictures.float() / 255), [Condition(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_the_model_card(folder: Path, size: tuple[int, int]) -> None:
    pictures = random_pictures(len(PROMPTS), *size)
    expected, scale = by_the_model_card(folder, pictures)
    scores = loaded(folder, batch=3).score(*pairs(pictures))
    assert scores.valid.all()
    assert expected.std() > 1
    torch.testing.assert_close(scores.values / scale, expected / scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.details["cosine"], expected / scale, rtol=0, atol=1e-6)


def test_an_older_pickled_checkpoint_scores_alike(folder: Path, tmp_path: Path) -> None:
    pictures = random_pictures(len(PROMPTS), 40, 40)
    write_clip_folder(tmp_path, seed=11)
    state = load_file(tmp_path / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # buffers that transformers saved before 4.31
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # the id by which these checkpoints ask for the highest one
    (tmp_path / "config.json").write_text(json.dumps(config))
    reward = loaded(tmp_path, sha256={"pytorch_model.bin": file_sha256(tmp_path / "pytorch_model.bin")})
    old, new = (each.score(*pairs(pictures)).values for each in (reward, loaded(folder)))
    torch.testing.assert_close(old, new, rtol=0, atol=1e-4)


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    write_clip_folder(tmp_path, seed=11)
    (tmp_path / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"logit_scale": _Runs(str(marker))}, file)
    with pytest.raises(RewardError, match="cannot load"):
        loaded(tmp_path)
    assert not marker.exists()


class _Runs:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.marker), "unpickled")


@pytest.mark.parametrize(
    "scale, of_22", [("raw", 22.0), ("div100", 0.22), ("div26", 22 / 26), ("mix(18,8)", 0.5), ("x2", 44.0)]
)
def test_scale_is_the_recorded_transform(folder: Path, scale: str, of_22: float) -> None:
    pictures = random_pictures(len(PROMPTS), 30, 30)
    raw = loaded(folder).score(*pairs(pictures)).values
    scores = loaded(folder, scale=scale).score(*pairs(pictures))
    assert scores.raw is not None
    assert torch.equal(scores.raw, raw)
    at_18, slope = {"mix(18,8)": (0.0, 1 / 8)}.get(scale, (of_22 * 18 / 22, of_22 / 22))
    torch.testing.assert_close(scores.values, at_18 + slope * (raw - 18))


def test_prompts_are_tokenised_by_the_publishers_rule(tmp_path: Path) -> None:
    """With the real vocabulary, each prompt alone through transformers' tokenizer, and all at once through ours."""
    from transformers import CLIPTokenizer

    write_vocabulary(tmp_path)
    publishers = CLIPTokenizer.from_pretrained(tmp_path)
    texts = prompts()
    assert len(texts) > 300
    ours = token_ids(CLIP_TOKENIZER.load(str(tmp_path)), texts, 77)
    for text, row in zip(texts, ours, strict=True):
        expected = publishers(text, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids[0]
        assert up_to_end(row, 49407) == up_to_end(expected, 49407), text


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_clip_folder(tmp_path, seed=11)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for change, message in (
        ({"visual_projection.weight": None}, "missing: visual_projection.weight"),
        ({"score_head.weight": torch.ones(2)}, "unexpected: score_head.weight"),
        ({"visual_projection.weight": torch.ones(3, 3)}, "mismatched: .*visual_projection.weight"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, tmp_path / "pytorch_model.bin")
        with pytest.raises(RewardError, match=message):
            loaded(tmp_path)


def test_what_is_not_a_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"holds no 'model.safetensors' or 'pytorch_model.bin'"):
        loaded(tmp_path)
    with pytest.raises(RewardError, match="give the folder that holds it"):
        loaded(folder / "model.safetensors")
    with pytest.raises(RewardError, match="not the pinned"):
        loaded(folder, sha256="0" * 64)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    with pytest.raises(RewardError, match="the tokenizer has 49408 entries"):
        loaded(folder, tokenizer=str(tmp_path))


def test_one_spoilt_picture_is_masked_alone(folder: Path) -> None:
    media, conditions = pairs(random_pictures(len(PROMPTS), 30, 30))
    sound = loaded(folder).score(media, conditions)
    media.pixels[2, 1, 3, 3] = float("inf")
    scores = loaded(folder).score(media, conditions)
    assert scores.valid.tolist() == [True, True, False, True, True]
    assert torch.equal(scores.values[scores.valid], sound.values[scores.valid])


def test_a_small_one_needs_nothing() -> None:
    entry = registry().reward("pickscore")
    small = entry.build(entry.config(path="random:small", offload=True))
    small.load(CPU)
    media, conditions = pairs(random_pictures(len(PROMPTS), 30, 30))
    first = small.score(media, conditions)
    assert first.valid.all()
    small.release()
    assert torch.equal(small.score(media, conditions).values, first.values)
    with pytest.raises(ValueError, match="scores image, not video"):
        small.score(Media(videos=torch.rand(1, 2, 3, 8, 8)), [Condition("a cat")])
