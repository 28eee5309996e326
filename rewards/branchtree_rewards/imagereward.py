"""The `imagereward` reward: ImageReward-v1.0 (arXiv 2304.05977), how well people would like a picture for its prompt.

    raw = (head(BLIP(picture, prompt)) - 0.16717362830052426) / 1.0333394966054072

The checkpoint is the publisher's: ImageReward.pt and med_config.json of THUDM/ImageReward on the hub. The network is
built of transformers' own BLIP classes (arXiv 2201.12086) and five linear layers, so the publisher's package, and the
old libraries it asks for, are not needed: the prompt, read in both directions, attends to the picture, and the head
reads its first token. Axis letters: B pairs of a picture and a prompt, T tokens, S side of a picture.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.footprints import Skeleton, build_numbers, published_numbers
from branchtree_rewards.shared.pixels import clip_pixels
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import bundled_json, cause, file_at_hand, locate_weights
from branchtree_rewards.shared.tokenizers import TokenizerKind
from branchtree_rewards.shared.weights import load_strictly, read_state_dict, renamed, without
from branchtree_rewards.small.imagereward import write_small_imagereward

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # the publisher's constants
BLIP_TOKENS = 2  # [DEC] and [ENC], which no prompt holds and the tokenizer need not have
TOKENS = 35  # a prompt's length with [CLS] and [SEP]; longer ones are cut
WEIGHTS, SETTINGS = "ImageReward.pt", "med_config.json"
TOKENIZER = "bert-base-uncased"


def _tokenizer_flaw(tokenizer: Any) -> str | None:
    needed = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    if None in needed or len(needed) < 4 or len(tokenizer) <= len(tokenizer.all_special_ids):
        return "it has no vocabulary with [CLS], [SEP], [PAD] and [UNK]"
    return None


BERT_TOKENIZER = TokenizerKind(
    name="BERT",
    class_name="BertTokenizer",
    files=("vocab.txt", "tokenizer.json"),
    wanted="vocab.txt, as 'tokenizer'",
    flaw=_tokenizer_flaw,
)


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

    name = "imagereward"

    def _open(self) -> Opened:
        source = locate_weights(self._config.path, self._config.revision, write_small_imagereward)
        file = source.find(WEIGHTS)
        described = source.maybe(SETTINGS)
        if described is None:
            raise RewardError(
                f"there is no '{SETTINGS}' beside the weights of '{source.name}'; it is published with them"
            )
        med_config = read_json_object(described, RewardError)
        network = build_network(read_state_dict(file), med_config, source.name)
        self._tokenizer = BERT_TOKENIZER.choose(source, self._config.tokenizer, TOKENIZER)
        entries = med_config["vocab_size"]
        if len(self._tokenizer) not in {entries, entries - BLIP_TOKENS}:
            raise RewardError(
                f"the tokenizer has {len(self._tokenizer)} entries and '{source.name}' {entries}, of which BLIP adds "
                f"{BLIP_TOKENS}; its vocabulary is cut short, or another model's"
            )
        return Opened(network, {WEIGHTS: file}, (described,))

    def _skeleton(self) -> Skeleton:
        file = file_at_hand(self._config.path, self._config.revision, SETTINGS)
        if file is None:
            return Skeleton(published_numbers("ImageReward-v1.0", lambda: published_skeleton(None)))
        settings = read_json_object(file, RewardError)
        return Skeleton(build_numbers(lambda: published_skeleton(settings)))

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        pixels = clip_pixels(media.pixels, network.image_size)
        prompts = [condition.prompt for condition in conditions]
        whole = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        text = self._tokenizer(prompts, **whole).to(pixels.device)
        return Measured((network(pixels, text.input_ids, text.attention_mask) - MEAN) / STD)


# The network, and the published names of its tensors

DROPPED = frozenset(f"blip.{half}_proj.{kind}" for half in ("vision", "text") for kind in ("weight", "bias")) | {
    "blip.text_encoder.embeddings.position_ids"
}
"""Tensors that no score depends on: those of BLIP's pre-training, and 0, 1, 2, ..."""
VISION = r"^blip\.visual_encoder\."
NAMES = (  # the first that matches a published name applies
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (rf"{VISION}cls_token$", "vision.embeddings.class_embedding"),
    (rf"{VISION}pos_embed$", "vision.embeddings.position_embedding"),
    (rf"{VISION}patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (rf"{VISION}norm\.", "vision.post_layernorm."),
    (rf"{VISION}blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (rf"{VISION}blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (rf"{VISION}blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (rf"{VISION}blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (VISION, "vision."),
)
VISION_HEAD = 64  # width of an attention head in every published BLIP vision encoder (ViT-B and ViT-L)
VISION_EPS = 1e-6  # the publisher's layer norms; transformers' BLIP has 1e-5 by default
HEAD_LAYERS = (0, 2, 4, 6, 7)  # indices of the linear layers in the published head; dropouts are between


def our_name(published: str) -> str:
    """Return the name in `BlipReward` of a published tensor; an unknown one keeps its name, and then fits nowhere."""
    for pattern, replacement in NAMES:
        name, count = re.subn(pattern, replacement, published)
        if count:
            return name
    return published


class BlipReward(nn.Module):
    """Maps a picture and a prompt to one number, before ImageReward's mean and deviation are applied."""

    def __init__(self, vision: Any, text: Any, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.image_size = int(vision.config.image_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return a number (B,) for each of the normalised pictures (B, 3, S, S) with token ids and mask (B, T)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        scored: Tensor = self.head(read[:, 0])
        return scored.squeeze(1)


def build_network(published: Mapping[str, Tensor], med_config: Mapping[str, Any], where: str) -> BlipReward:
    """Return the network that holds exactly the published tensors, in float32 on the CPU; see `blip_skeleton`.

    Raises RewardError if a tensor is missing, unknown or of another shape.
    """
    state = renamed(without(published, DROPPED), our_name)
    network = blip_skeleton(state, med_config, where)
    load_strictly(network, state, where)
    positions = torch.arange(med_config["max_position_embeddings"])[None]
    network.text.get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)
    return network


def published_skeleton(med_config: Mapping[str, Any] | None) -> BlipReward:
    """Return the published network without weights: BLIP's ViT-L/16 at 224 pixels, and BERT's base size by default."""
    published = bundled_json("published_imagereward.json")
    settings = med_config or published["med_config"]
    state = {name: torch.empty(shape, device="meta") for name, shape in published["shapes"].items()}
    state["head.0.weight"] = torch.empty(len(state["head.0.weight"]), settings["hidden_size"], device="meta")
    return blip_skeleton(state, settings, "the published checkpoint")


def blip_skeleton(state: Mapping[str, Tensor], med_config: Mapping[str, Any], where: str) -> BlipReward:
    """Return the network without weights, on the meta device.

    Args:
        state: Tensors under their names in `BlipReward`, whose shapes tell the sizes of vision encoder and head.
        med_config: The published med_config.json, which tells those of the text encoder.
        where: The checkpoint's name in messages.

    Raises:
        RewardError: a tensor or a setting that tells a size is missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        _, positions, width = state["vision.embeddings.position_embedding"].shape
        patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
        blocks = [name.split(".")[3] for name in state if name.startswith("vision.encoder.layers.")]
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=1 + max(map(int, blocks)),
            num_attention_heads=width // VISION_HEAD,
            image_size=round((positions - 1) ** 0.5) * patch,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=VISION_EPS,
        )
        text = BlipTextConfig(
            **{name: med_config[name] for name in bundled_json("published_imagereward.json")["med_config"]},
            encoder_hidden_size=width,
            is_decoder=True,  # makes the layers that attend to the picture; the forward pass reads in both directions
            use_cache=False,
            bos_token_id=None,  # the defaults are ids of the full vocabulary, and only generation uses them
            sep_token_id=None,
        )
        linear = {index: state[f"head.{index}.weight"].shape for index in HEAD_LAYERS}
        with torch.device("meta"):
            head = [
                nn.Linear(linear[index][1], linear[index][0]) if index in linear else nn.Identity()
                for index in range(HEAD_LAYERS[-1] + 1)
            ]
            text_model = BlipTextModel(text, add_pooling_layer=False)
            return BlipReward(BlipVisionModel(vision), text_model, nn.Sequential(*head))
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise RewardError(f"the weights and settings of '{where}' are not ImageReward's ({cause(error)})") from error


register_rewards = reward_hook((ImageReward, ImageRewardConfig))
