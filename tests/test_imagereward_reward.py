"""The `imagereward` reward against what the publisher's own code says, as scripts/record_imagereward.py recorded it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.imagereward import (
    BERT_TOKENIZER,
    DROPPED,
    ImageReward,
    ImageRewardConfig,
    blip_skeleton,
    build_network,
    our_name,
)
from safetensors.torch import load_file
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

DATA = Path(__file__).parent / "data" / "rewards"
RECORD = json.loads((DATA / "imagereward_tiny.json").read_text(encoding="utf-8"))
KEYS = json.loads((DATA / "imagereward_keys.json").read_text(encoding="utf-8"))
FULL = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
CPU = torch.device("cpu")


def recorded_state() -> dict[str, Tensor]:
    stored = load_file(DATA / "imagereward_tiny.safetensors")
    return {
        name: value.float() * RECORD["step"] if value.dtype == torch.int8 else value
        for name, value in stored.items()
        if not name.startswith("pictures.")
    }


def recorded_pictures() -> list[Tensor]:
    stored = load_file(DATA / "imagereward_tiny.safetensors")
    return [stored[f"pictures.{place}"].permute(2, 0, 1).float() / 255 for place in range(len(RECORD["rewards"]))]


def write(folder: Path, state: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """The recorded checkpoint as the publisher lays one out, with a vocabulary beside it."""
    torch.save(recorded_state() if state is None else state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**RECORD["med_config"], **settings}), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(RECORD["vocabulary"]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("imagereward"))


def loaded(path: Path | str, **options: Any) -> ImageReward:
    reward = ImageReward(ImageRewardConfig(path=str(path), **options))
    reward.load(CPU)
    return reward


READ = [row for row, prompt in enumerate(RECORD["prompts"]) if prompt and "[SEP]" not in prompt]
"""The recorded prompts that are not masked: all but an empty one and one with a token of the model's own."""


def score_all(reward: ImageReward, picture: Tensor) -> Scores:
    """One picture for each of the recorded prompts that can be read as text."""
    conditions = [Condition(RECORD["prompts"][row]) for row in READ]
    return reward.score(Media(images=picture.expand(len(conditions), -1, -1, -1)), conditions)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_rewards_are_the_publishers(folder: Path, batch: int) -> None:
    reward = loaded(folder, batch=batch)
    for picture, expected in zip(recorded_pictures(), RECORD["rewards"], strict=True):
        scores = score_all(reward, picture)
        assert scores.valid.all()
        torch.testing.assert_close(scores.values, torch.tensor(expected)[READ], rtol=0, atol=1e-5)


def test_recorded_rewards_depend_on_the_picture_and_on_the_prompt() -> None:
    rewards = torch.tensor(RECORD["rewards"])
    assert rewards.std(dim=0).min() > 0.1
    assert rewards.std(dim=1).min() > 0.1


def test_token_ids_are_the_publishers(folder: Path) -> None:
    tokenizer = BERT_TOKENIZER.load(str(folder))
    encoded = tokenizer(RECORD["prompts"], padding="max_length", truncation=True, max_length=35)
    assert encoded["input_ids"] == RECORD["ids"]


def test_every_tensor_of_the_full_model_has_its_place() -> None:
    assert len(KEYS) == 625
    assert KEYS.keys() >= DROPPED
    places = {our_name(name): tuple(shape) for name, shape in KEYS.items() if name not in DROPPED}
    assert len(places) == 620  # no two tensors come to one name
    empty = {name: torch.empty(shape, device="meta") for name, shape in places.items()}
    wanted = {name: tuple(value.shape) for name, value in blip_skeleton(empty, FULL, "full").state_dict().items()}
    assert places == wanted
    parts = [name.split(".")[0] for name in wanted]
    assert [parts.count(part) for part in ("vision", "text", "head")] == [294, 316, 10]


def test_the_full_model_is_built_in_the_published_sizes() -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in KEYS.items()}
    network: Any = build_network(published, FULL, "full")
    assert network.image_size == 224
    assert network.vision.config.num_attention_heads == 16
    assert network.vision.config.layer_norm_eps == 1e-6
    assert network.text.config.num_attention_heads == 12


VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
MISFITS: list[tuple[str, Tensor | None, str]] = [
    (
        f"{TEXT}encoder.layer.1.crossattention.self.key.bias",
        None,
        r"missing.*layer\.1\.crossattention\.self\.key\.bias",
    ),
    (f"{VISION}norm.bias", None, r"missing.*vision\.post_layernorm\.bias"),
    (f"{VISION}pos_embed", None, r"vision\.embeddings\.position_embedding"),
    ("mlp.layers.4.weight", None, r"head\.4\.weight"),
    ("blip.itm_head.weight", torch.ones(2), r"unknown.*blip\.itm_head\.weight"),
    (f"{VISION}blocks.1.mlp.fc2.bias", torch.ones(3), r"another shape.*fc2\.bias is \(3,\), not \(128,\)"),
]


@pytest.mark.parametrize("name, value, message", MISFITS, ids=[name for name, _, _ in MISFITS])
def test_weights_that_do_not_fit_are_refused(name: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    state = recorded_state()
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(RewardError, match=message):
        loaded(write(tmp_path, state))


def test_dropped_tensors_may_be_absent_and_do_not_matter(folder: Path, tmp_path: Path) -> None:
    state = {name: value for name, value in recorded_state().items() if name not in DROPPED}
    picture = recorded_pictures()[0]
    assert torch.equal(
        score_all(loaded(write(tmp_path, state)), picture).values, score_all(loaded(folder), picture).values
    )


def test_settings_that_are_not_those_of_the_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"do not fit.*text\.encoder\.layer\.1"):
        loaded(write(tmp_path, num_hidden_layers=1))
    settings = {name: value for name, value in RECORD["med_config"].items() if name != "num_attention_heads"}
    (tmp_path / "med_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(RewardError, match="num_attention_heads"):
        loaded(tmp_path)
    (tmp_path / "med_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(RewardError, match="not valid JSON"):
        loaded(tmp_path)
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(RewardError, match=r"no 'med_config\.json' beside the weights"):
        loaded(tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    more = [*RECORD["vocabulary"], "one", "two", "three"]
    (tmp_path / "vocab.txt").write_text("\n".join(more) + "\n", encoding="utf-8")
    with pytest.raises(RewardError, match=f"tokenizer has {len(more)} entries"):
        loaded(tmp_path)


def test_a_tokenizer_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "vocab.txt").unlink()
    with pytest.raises(RewardError, match=r"BERT tokenizer from 'bert-base-uncased'.*vocab\.txt"):
        loaded(tmp_path)


def test_a_tokenizer_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    (write(tmp_path) / "vocab.txt").unlink()
    reward = loaded(tmp_path / "ImageReward.pt", tokenizer=str(folder))
    picture, expected = recorded_pictures()[1], torch.tensor(RECORD["rewards"][1])
    torch.testing.assert_close(score_all(reward, picture).values, expected[READ], rtol=0, atol=1e-5)


def test_a_digest_pins_the_weights(folder: Path) -> None:
    found = file_sha256(folder / "ImageReward.pt")
    loaded(folder, sha256=found)
    loaded(folder, sha256={"ImageReward.pt": found})
    with pytest.raises(RewardError, match=f"has sha256 {found}, not the pinned"):
        loaded(folder, sha256="0" * 64)


def test_one_spoilt_picture_is_masked_alone(folder: Path) -> None:
    pictures = torch.stack([recorded_pictures()[1]] * 3)
    pictures[1, 0, 5, 5] = float("nan")
    scores = loaded(folder).score(Media(images=pictures), [Condition(RECORD["prompts"][0])] * 3)
    assert scores.valid.tolist() == [True, False, True]
    assert scores.reasons == {1: "pixels are not finite"}
    torch.testing.assert_close(scores.values[2].item(), RECORD["rewards"][1][0], rtol=0, atol=1e-5)


def test_videos_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="scores image, not video"):
        loaded(folder).score(Media(videos=torch.rand(1, 2, 3, 8, 8)), [Condition("a cat")])


def test_a_small_one_needs_nothing() -> None:
    entry = registry().reward("imagereward")
    small, again = (entry.build(entry.config(path="random:small", offload=True)) for _ in range(2))
    media = Media(images=torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0)))
    conditions = [Condition("a cat"), Condition("two dogs"), Condition("a cat")]
    small.load(CPU)
    first = small.score(media, conditions)
    assert first.valid.all()
    assert first.values.unique().numel() == 3
    small.release()
    assert torch.equal(small.score(media, conditions).values, first.values)
    again.load(CPU)
    assert torch.equal(again.score(media, conditions).values, first.values)
    assert again.fingerprint() == small.fingerprint()
