"""The `imagereward` reward: ImageReward-v1.0 (arXiv 2304.05977), how well people would like a picture for its prompt.

    raw = (head(BLIP(picture, prompt)) - 0.16717362830052426) / 1.0333394966054072

The checkpoint is the publisher's: ImageReward.pt and med_config.json of THUDM/ImageReward on the hub. The network is
built of transformers' own BLIP classes, so the publisher's package, and the old libraries it asks for, are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from branchtree.errors import RewardError
from branchtree.files.checksums import verify_checksums
from branchtree.files.json_lines import read_json_object
from branchtree.files.paths import PathOrName
from branchtree.files.reading import user_path
from branchtree.plugins import Condition, Media, RewardCard
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.imagereward.blip import BlipReward, build_network, published_skeleton
from branchtree_rewards.shared.footprints import Skeleton, settings_file
from branchtree_rewards.shared.model_reward import Measured, ModelReward, ModelRewardConfig, Opened
from branchtree_rewards.shared.pixels import from_pil, normalised, shortest_side_crop, to_pil
from branchtree_rewards.shared.samples import unreadable_or_empty
from branchtree_rewards.shared.source import WeightsSource, locate_weights
from branchtree_rewards.shared.tokenizers import check_whole, own_token
from branchtree_rewards.shared.weights import quiet_libraries, read_weights, state_dict
from branchtree_rewards.small.imagereward import write_small_imagereward

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # the publisher's constants
BLIP_TOKENS = 2  # [DEC] and [ENC], which no prompt holds and the tokenizer need not have
TOKENS = 35  # a prompt's length with [CLS] and [SEP]; longer ones are cut
WEIGHTS, SETTINGS = "ImageReward.pt", "med_config.json"
TOKENIZER = "bert-base-uncased"


class ImageRewardConfig(ModelRewardConfig, frozen=True):
    """Settings of the `imagereward` reward.

    Attributes:
        tokenizer: Hub id or folder of the BERT tokenizer. By default the checkpoint's folder, if it holds a vocab.txt
            or a tokenizer.json, and otherwise "bert-base-uncased".
    """

    path: PathOrName = "THUDM/ImageReward"
    tokenizer: PathOrName | None = None


class ImageReward(ModelReward[ImageRewardConfig]):
    """Scores how well people would like each picture for its prompt; about 0 on average, and a spread of about 1."""

    def __init__(self, config: ImageRewardConfig) -> None:
        super().__init__(config)
        self._tokenizer: Any = None

    def _open(self) -> Opened:
        source = locate_weights(self._config.path, self._config.revision, write_small_imagereward)
        file = source.find(WEIGHTS)
        described = _settings_file(source)
        med_config = _read_settings(described)
        network = build_network(state_dict(read_weights(file), file), med_config, source.name)
        if self._config.tokenizer is not None:
            verify_checksums(user_path(self._config.tokenizer), RewardError)
        self._tokenizer = load_bert_tokenizer(self._config.tokenizer or _own_tokenizer(source) or TOKENIZER)
        entries = med_config["vocab_size"]
        if len(self._tokenizer) not in {entries, entries - BLIP_TOKENS}:
            raise RewardError(
                f"the tokenizer has {len(self._tokenizer)} entries and '{source.name}' {entries}, of which BLIP adds "
                f"{BLIP_TOKENS}; its vocabulary is cut short, or another model's"
            )
        return Opened(network, {WEIGHTS: file}, (described,))

    def _skeleton(self) -> Skeleton:
        file = settings_file(self._config.path, self._config.revision, SETTINGS)
        return Skeleton(published_skeleton(_read_settings(file) if file else None))

    def _prompt_flaw(self, prompt: str) -> str | None:
        return unreadable_or_empty(prompt) or own_token(self._tokenizer, prompt)

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        blip = cast(BlipReward, network)
        device = media.pixels.device
        pictures = [shortest_side_crop(picture, blip.image_size) for picture in to_pil(media.pixels)]
        prompts = [condition.prompt for condition in conditions]
        text = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        scored = blip(normalised(from_pil(pictures)).to(device), text.input_ids, text.attention_mask)
        return Measured((scored - MEAN) / STD)


def _settings_file(source: WeightsSource) -> Path:
    file = source.maybe(SETTINGS)
    if file is None:
        raise RewardError(f"there is no '{SETTINGS}' beside the weights of '{source.name}'; it is published with them")
    return file


def _read_settings(file: Path) -> dict[str, Any]:
    """The published configuration of the text encoder."""
    return read_json_object(file, RewardError)


def _own_tokenizer(source: WeightsSource) -> str | None:
    """The folder of the checkpoint, if a tokenizer is in it; the publisher's hub repository has none."""
    if source.folder is None or not any((source.folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        return None
    return str(source.folder)


def load_bert_tokenizer(location: str) -> Any:
    """The BERT tokenizer of a hub id or folder.

    Raises RewardError if it cannot be loaded, or has no vocabulary: transformers makes one of the special tokens alone
    where the files are missing, or the hub cannot be reached.
    """
    from transformers import BertTokenizer

    try:
        with quiet_libraries():
            tokenizer = BertTokenizer.from_pretrained(location)
    except Exception as error:  # the tokenizers library has exceptions of its own
        raise _unreadable(location, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    needed = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    if None in needed or len(needed) < 4 or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise _unreadable(location, "it has no vocabulary with [CLS], [SEP], [PAD] and [UNK]")
    check_whole(tokenizer, location)
    return tokenizer


def _unreadable(location: str, reason: str) -> RewardError:
    return RewardError(
        f"cannot load a BERT tokenizer from '{location}' ({reason}); give a hub id that can be reached, or a folder "
        "with vocab.txt, as 'tokenizer'"
    )


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `imagereward` reward to the registry."""
    register(
        "imagereward",
        build=ImageReward,
        config=ImageRewardConfig,
        summary="ImageReward-v1.0: human preference for a picture given its prompt, centred near 0.",
        card=RewardCard(
            modalities=frozenset({"image"}),
            checkpoint=f"THUDM/ImageReward, {WEIGHTS}",
            size=1_790_000_000,
            licence="Apache-2.0",
            non_commercial=False,
            source="https://github.com/THUDM/ImageReward, arXiv 2304.05977",
        ),
    )
