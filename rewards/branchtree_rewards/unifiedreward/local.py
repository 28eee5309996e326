"""UnifiedReward in this process, by transformers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.plugins import RewardFootprint
from branchtree_rewards.shared.footprints import skeleton
from branchtree_rewards.shared.samples import spans
from branchtree_rewards.shared.source import RANDOM_SMALL, WeightsSource, cause, locate_weights, verify
from branchtree_rewards.shared.tokenizers import PROBES, check_whole, own_token, too_long
from branchtree_rewards.shared.weights import from_pretrained, quiet_libraries
from branchtree_rewards.small.unifiedreward import write_small_unifiedreward
from branchtree_rewards.unifiedreward.config import PUBLISHED, UnifiedRewardConfig
from branchtree_rewards.unifiedreward.templates import NoScore, Spoken

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "max_length"}


class LocalModel:
    """A vision-language model that answers greedily, several questions at a time."""

    def __init__(self, config: UnifiedRewardConfig) -> None:
        self._config = config
        self._dtype = DTYPES[config.dtype] if config.dtype else None
        self._files: dict[str, Path] = {}
        self._model: Any = None
        self._processor: Any = None
        self._device = torch.device("cpu")

    @property
    def name(self) -> str:
        """The model's hub id or folder."""
        return self._config.path

    def footprint(self) -> RewardFootprint | None:
        """Return the memory of the weights, of CodeGoat24's 7B models where the configuration is not here."""
        if self.name == RANDOM_SMALL:
            return RewardFootprint(0, self._config.offload)
        try:
            found = skeleton(self.name, self._config.revision, PUBLISHED, "AutoModelForImageTextToText")
        except Exception:  # transformers has exceptions of its own for a damaged file; loading will say what is wrong
            return None
        found = replace(found, number_bytes=(self._dtype or torch.bfloat16).itemsize)
        return found.footprint(self._config.offload)

    def load(self, device: torch.device) -> None:
        """Load the model. Raises RewardError if files are missing, damaged, not those pinned, or do not fit."""
        from transformers import AutoModelForImageTextToText

        source = locate_weights(self.name, self._config.revision, write_small_unifiedreward)
        if source.only is not None:
            raise RewardError(f"path '{self.name}' is a file; this reward needs its whole folder, or a hub id")
        files = weight_files(source)
        verify(files, self._config.sha256)
        settings = {"revision": source.revision} if source.revision else {}
        self._processor = _open_processor(source.location, settings)
        model = from_pretrained(
            AutoModelForImageTextToText,
            source.location,
            self._dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32),
            use_safetensors=True,
            trust_remote_code=False,
            **settings,
        )
        _check_questions(self._processor, model, source.location)
        model.eval().requires_grad_(False)
        # The checkpoint's own settings for generation, its penalty on repetition included, without the sampling.
        published = model.generation_config
        generation = {name: value for name, value in published.to_diff_dict().items() if name not in SAMPLING}
        if generation.get("pad_token_id") is None:
            generation["pad_token_id"] = self._processor.tokenizer.pad_token_id
        model.generation_config = type(published)(**generation, do_sample=False)
        self._files, self._model, self._device = files, model, device
        if not self._config.offload:
            model.to(device)

    def prompt_flaw(self, prompt: str, asked: str) -> str | None:
        """Say that a prompt spells out a token of the model's own, or makes the question too long, if so."""
        tokenizer = self._processor.tokenizer
        if flaw := own_token(tokenizer, prompt):
            return flaw
        context = int(self._model.config.get_text_config().max_position_embeddings)
        return too_long(len(tokenizer(asked, verbose=False)["input_ids"]), context)

    @torch.no_grad()
    def answers(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[Spoken | NoScore]:
        """Return the model's greedy answer to each question about the picture of the same index."""
        self._model.to(self._device)
        endings = self._model.generation_config.eos_token_id
        found: list[Spoken | NoScore] = []
        for span in spans(len(questions), self._config.batch):
            texts = [conversation(self._processor, question) for question in questions[span]]
            inputs = self._processor(text=texts, images=list(pictures[span]), padding=True, return_tensors="pt")
            asked = inputs["input_ids"].shape[1]
            tokens = self._model.generate(**inputs.to(self._device), max_new_tokens=self._config.max_tokens)[:, asked:]
            answers = self._processor.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            ended = torch.isin(tokens, tokens.new_tensor(endings)).any(dim=1).tolist()
            found += map(Spoken, answers, ended)
        return found

    def release(self) -> None:
        """Leave the device until the next question, under ``offload``."""
        if self._model is not None and self._config.offload:
            self._model.to("cpu")

    def identity(self) -> str:
        """Return the digests of the weights' files."""
        return "".join(f"{name} {file_sha256(file)}\n" for name, file in sorted(self._files.items()))


def weight_files(source: WeightsSource) -> dict[str, Path]:
    """Return the weights' files by name: one, or the shards that an index names. Raises RewardError."""
    index = source.maybe(INDEX)
    if index is None:
        return {"model.safetensors": source.find("model.safetensors")}
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise RewardError(f"'{index}' is no index of weights ({cause(error)})") from error
    return {name: source.find(name) for name in names}


def _open_processor(location: str, settings: Mapping[str, str]) -> Any:
    """Return tokenizer and image processor, which pads on the left. Raises RewardError."""
    from transformers import AutoProcessor

    try:
        with quiet_libraries():
            processor = AutoProcessor.from_pretrained(location, trust_remote_code=False, **settings)
    except Exception as error:  # each library below has exceptions of its own for a file that is not right
        raise RewardError(f"cannot load the processor of '{location}' ({cause(error)})") from error
    if getattr(processor, "image_processor", None) is None or not getattr(processor, "chat_template", None):
        raise RewardError(f"'{location}' has no image processor or no chat template; it is not a UnifiedReward folder")
    processor.tokenizer.padding_side = "left"  # so that all answers of a batch begin at one position
    check_whole(processor.tokenizer, location)
    return processor


def _check_questions(processor: Any, model: Any, location: str) -> None:
    """Raise RewardError unless a question about a picture reaches the model with the picture and with its words."""
    try:
        texts = [conversation(processor, probe) for probe in PROBES]
        pictures = [Image.new("RGB", (64, 64))] * len(PROBES)
        ids = processor(text=texts, images=pictures, padding=True, return_tensors="pt")["input_ids"]
    except Exception as error:  # a template is a program
        raise RewardError(f"the processor of '{location}' does not work ({cause(error)})") from error
    token = getattr(model.config, "image_token_id", None)
    pictured = token is None or bool((ids == token).any(dim=1).all())
    if not pictured or ids[0].equal(ids[1]):
        raise RewardError(
            f"the chat template or the tokenizer of '{location}' leaves out the picture or the question; a file is "
            "missing or damaged"
        )


def conversation(processor: Any, question: str) -> str:
    """Return the whole text of a question about one picture."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    message = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return text
