"""The `hpsv3` reward against a plain reading of the publisher's code by transformers' own classes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.hpsv3.network import HEAD, QUESTION, WEIGHTS, empty_head, hpsv3_weights
from branchtree_rewards.hpsv3.reward import AREA, Hpsv3, Hpsv3Config, look
from branchtree_rewards.qwen2vl.patches import fitted_size
from branchtree_rewards.shared.weights import check_fit
from branchtree_rewards.small.hpsv3 import write_small_hpsv3
from branchtree_rewards.small.qwen2vl import old_name
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
PROMPTS = ("a red cat", "two blue dogs, running over {braces} and a very long road to the hills", "a hen")
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen2-VL-7B-Instruct's own chat template does with one question about one picture."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("hpsv3") / "small"
    at.mkdir()
    write_small_hpsv3(at)
    return at


def loaded(path: Path | str, **settings: Any) -> Hpsv3:
    reward = Hpsv3(Hpsv3Config(path=str(path), **settings))
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def reward(folder: Path) -> Hpsv3:
    return loaded(folder)


def pictures(count: int, height: int = 64, width: int = 96) -> Media:
    """Smooth 8-bit pictures."""
    coarse = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    fine = functional.interpolate(coarse, (height, width), mode="bilinear")
    return Media(images=(fine * 255).round() / 255)


def asked(*prompts: str) -> list[Condition]:
    return [Condition(prompt) for prompt in prompts]


class Naive:
    """The publisher's inference, step by step: a processor, the whole model, and the head at every position."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
        from transformers import Qwen2VLImageProcessorPil as ImageProcessor
        from transformers import Qwen2VLVideoProcessor as VideoProcessor

        state = load_file(folder / WEIGHTS)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        config = Qwen2VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
        assert config.text_config.vocab_size == len(tokenizer)
        self.model = Qwen2VLForConditionalGeneration(config).eval()
        self.head = nn.Sequential(
            nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        ).eval()
        self.head.load_state_dict({name[8:]: state.pop(name) for name in list(state) if name.startswith("rm_head.")})
        self.model.load_state_dict({self._new(name): value.float() for name, value in state.items()}, strict=True)
        self.model.to(torch.bfloat16).to(dtype)  # as published: with it go the frequencies of rotary embeddings
        self.processor = Qwen2VLProcessor(
            image_processor=ImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 1280),
            tokenizer=tokenizer,
            video_processor=VideoProcessor(),
            chat_template=CHAT,
        )

    @staticmethod
    def _new(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    def inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        resized = []
        for image in images:
            height, width = smart_resize(
                image.height, image.width, factor=28, min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28
            )
            resized.append(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        contents = [
            [{"type": "image"}, {"type": "text", "text": QUESTION.template.replace("{text_prompt}", prompt)}]
            for prompt in prompts
        ]
        chats = [[{"role": "user", "content": content}] for content in contents]
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return self.processor(text=texts, images=resized, padding=True, return_tensors="pt")

    @torch.no_grad()
    def rewards(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Means and logarithms of deviations (B, 2)."""
        inputs = self.inputs(images, prompts)
        ids, model = inputs["input_ids"], self.model.model
        embedded = model.language_model.embed_tokens(ids)
        seen = model.visual(inputs["pixel_values"].to(embedded.dtype), grid_thw=inputs["image_grid_thw"]).pooler_output
        at = (ids == self.model.config.image_token_id).unsqueeze(-1).expand_as(embedded)
        embedded = embedded.masked_scatter(at, seen.to(embedded.dtype))
        hidden = model.language_model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])[0]
        outputs = self.head(hidden.float())  # at every position, as the publisher's
        reward_id = self.processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
        return outputs[ids == reward_id].view(len(ids), 2)


@pytest.fixture(scope="module")
def naive(folder: Path) -> Naive:
    return Naive(folder)


def pil(media: Media) -> list[Image.Image]:
    arrays = (media.pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


# Against a plain reading of the publisher's code


@pytest.mark.parametrize("size", [(64, 96), (300, 100)])
def test_scores_are_those_of_the_plain_reading(size: tuple[int, int], reward: Hpsv3, naive: Naive) -> None:
    media = pictures(3, *size)
    expected = naive.rewards(pil(media), PROMPTS)
    scores = reward.score(media, asked(*PROMPTS))
    assert scores.valid.all()
    torch.testing.assert_close(scores.values, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.details["sigma"], expected[:, 1].exp(), rtol=0, atol=1e-5)
    assert float(expected[:, 0].std()) > 1e-3


def test_scores_are_those_of_the_publishers_transformers(reward: Hpsv3) -> None:
    """As `scripts/record_hpsv3.py` recorded them with 4.45.2, from the same file under its published names.

    There the vision encoder's angles are products in float32 too, of the same rounded frequencies.
    """
    recorded = json.loads((Path(__file__).parent / "data/rewards/hpsv3_scores.json").read_text())
    outputs = torch.tensor(recorded["outputs"])
    scores = reward.score(pictures(3), asked(*PROMPTS))
    torch.testing.assert_close(scores.values, outputs[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.details["sigma"], outputs[:, 1].exp(), rtol=0, atol=1e-5)


def test_inputs_are_those_of_the_processor(reward: Hpsv3, naive: Naive) -> None:
    media = pictures(2, 100, 37)
    inputs = naive.inputs(pil(media), PROMPTS[:2])
    looks = [look(picture, CPU) for picture in pil(media)]
    rows = [reward._questions.encode(prompt, seen.tokens) for prompt, seen in zip(PROMPTS[:2], looks, strict=True)]
    ids, mask = reward._questions.batch(rows, CPU)
    assert ids.tolist() == inputs["input_ids"].tolist()
    assert mask.tolist() == inputs["attention_mask"].tolist()
    assert [list(seen.grid) for seen in looks] == inputs["image_grid_thw"].tolist()
    pixels = torch.cat([seen.pixels for seen in looks])
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=1e-6)


def test_multimodal_positions_would_score_otherwise(reward: Hpsv3, naive: Naive) -> None:
    """What transformers 5 does when it is left to choose the positions is far outside of the tolerance."""
    media = pictures(1)
    inputs = naive.inputs(pil(media), PROMPTS[:1])
    with torch.no_grad():
        kinds = (inputs["input_ids"] == naive.model.config.image_token_id).int()
        hidden = naive.model.model(**{**inputs, "mm_token_type_ids": kinds}).last_hidden_state
        at = inputs["input_ids"] == naive.processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
        multimodal = naive.head(hidden[at])[:, 0]
    assert (multimodal - reward.score(media, asked(PROMPTS[0])).values).abs() > 1e-2


def test_half_precision_leaves_the_head_alone(folder: Path, reward: Hpsv3) -> None:
    half = loaded(folder, dtype="bfloat16")
    network: Any = half._require_opened().network
    assert network.backbone.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in network.head.parameters()} == {torch.float32}
    media = pictures(2)
    expected = Naive(folder, torch.bfloat16).rewards(pil(media), PROMPTS[:2])[:, 0]
    values = half.score(media, asked(*PROMPTS[:2])).values
    torch.testing.assert_close(values, expected, rtol=0, atol=0.01)
    assert (values - reward.score(media, asked(*PROMPTS[:2])).values).abs().max() < 0.2
    assert half.fingerprint() != reward.fingerprint()


@pytest.mark.parametrize("size", [(64, 96), (1024, 1024), (720, 1280), (100, 37), (28, 5600), (451, 443)])
def test_sizes_are_transformers(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    assert fitted_size(*size, AREA, AREA) == smart_resize(*size, factor=28, min_pixels=AREA, max_pixels=AREA)


def test_the_question_is_the_publishers_to_the_byte() -> None:
    content = QUESTION.template.encode()
    assert len(content) == 2590
    assert hashlib.sha256(content).hexdigest() == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    assert QUESTION.template.count("<|Reward|>") == 1


# Weights


def test_the_full_models_names_and_numbers_are_the_published_ones() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    published = (Path(hpsv3_weights.__code__.co_filename).parents[1] / "data" / "published_configs.json").read_text()
    settings = json.loads(published)["Qwen/Qwen2-VL-7B-Instruct"]
    settings["text_config"]["vocab_size"] = 151658  # of the tokenizer, with the reward token
    with torch.device("meta"):
        wanted = Qwen2VLModel(Qwen2VLConfig(**settings)).state_dict()
        named = {old_name(name): value for name, value in wanted.items()}
        named["lm_head.weight"] = torch.empty(151658, 3584)
        head = empty_head(3584).state_dict()
        named |= {f"{HEAD}{name}": value for name, value in head.items()}
    assert sum(value.numel() for value in head.values()) == 3_687_474
    assert set(head) == {f"{layer}.{kind}" for layer in (0, 3, 5) for kind in ("weight", "bias")}
    assert {name.split(".")[0] for name in named} == {"visual", "model", "lm_head", "rm_head"}
    weights = hpsv3_weights(named, torch.bfloat16, "published")
    check_fit(weights.backbone, wanted, "published")
    check_fit(weights.head, head, "published")
    assert weights.vocabulary == 151658


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "unknown": (lambda weights: weights.update(extra=torch.ones(1)), "1 unknown: extra"),
    "missing": (lambda weights: weights.pop("model.norm.weight"), "missing: language_model.norm"),
    "shape": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(31)}),
        r"language_model.norm.weight is \(31,\), not \(32,\)",
    ),
    "no head": (
        lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("rm_head")],
        "it is no HPSv3 checkpoint",
    ),
    "half a head": (lambda weights: weights.pop("rm_head.3.bias"), r"head 'rm_head.\*'.* 1 missing: 3.bias"),
    "one output": (
        lambda weights: weights.update({"rm_head.5.weight": torch.ones(1, 16)}),
        r"5.weight is \(1, 16\), not \(2, 16\)",
    ),
    "a linear head": (lambda weights: weights.update({"rm_head.weight": torch.ones(2, 32)}), "1 unknown: weight"),
    "not finite": (
        lambda weights: weights.update({"rm_head.5.bias": torch.tensor([0.0, torch.nan])}),
        "are not finite in 5.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_are_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, message = WRONG[case]
    at = tmp_path / "edited"
    shutil.copytree(folder, at)
    weights = load_file(folder / WEIGHTS)
    change(weights)
    (at / WEIGHTS).unlink()
    save_file(weights, at / WEIGHTS)
    with pytest.raises(RewardError, match=message):
        loaded(at)


def test_the_file_alone_takes_config_and_tokenizer_from_the_base(folder: Path, reward: Hpsv3, tmp_path: Path) -> None:
    """The base's tokenizer lacks the reward token, which is added last."""
    base = tmp_path / "base"
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns(WEIGHTS))
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|Reward|>"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / WEIGHTS, alone)
    media = pictures(1)
    expected = reward.score(media, asked(PROMPTS[0])).values
    for path in (alone, alone / WEIGHTS):
        assert loaded(path, base=str(base)).score(media, asked(PROMPTS[0])).values.equal(expected)
    with pytest.raises(RewardError, match="base 'random:small' is no model"):
        loaded(alone, base="random:small")
    other = alone / "HPS_v2.1_compressed.pt"
    (alone / WEIGHTS).rename(other)
    with pytest.raises(RewardError, match="says by its name that it is another version"):
        loaded(other, base=str(base))


def test_from_the_hub_come_the_weights_and_the_bases_config_and_tokenizer(
    folder: Path, reward: Hpsv3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the hub's own client, from a cache such as it leaves behind after a download; nothing else is asked."""
    for name in ("MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        ignored = shutil.ignore_patterns(WEIGHTS) if name.startswith("Qwen") else shutil.ignore_patterns("*.json")
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40), ignore=ignored)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = Hpsv3(Hpsv3Config())
    published.load(CPU)
    media = pictures(1)
    expected = reward.score(media, asked(PROMPTS[0])).values
    assert published.score(media, asked(PROMPTS[0])).values.equal(expected)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    at = tmp_path / "edited"
    shutil.copytree(folder, at)
    config = json.loads((folder / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
    with pytest.raises(RewardError, match=r"<\|image_pad\|> at \d+, the model's config at 5"):
        loaded(at)


# Samples


def test_a_score_does_not_depend_on_its_neighbours(folder: Path, reward: Hpsv3) -> None:
    media = pictures(3)
    together = reward.score(media, asked(*PROMPTS))
    alone = loaded(folder, batch=1).score(media, asked(*PROMPTS))
    torch.testing.assert_close(alone.values, together.values, rtol=0, atol=1e-5)
    assert together.values.unique().numel() == 3


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_a_prompt_with_a_special_token_is_not_scored(token: str, reward: Hpsv3) -> None:
    scores = reward.score(pictures(2), asked("a cat", f"a {token} dog"))
    assert scores.valid.tolist() == [True, False]
    assert token in scores.reasons[1]


def test_the_small_checkpoint_is_the_same_each_time_and_leaves_randomness_alone(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_small_hpsv3(tmp_path)
    assert torch.get_rng_state().equal(before)
    one, two = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    assert all(value.unique().numel() > 1 for value in one.values())


def test_registered() -> None:
    entry = registry().reward("hpsv3")
    assert entry.card is not None
    assert entry.card.modalities == {"image"}
    assert entry.config().path == "MizzenAI/HPSv3"
