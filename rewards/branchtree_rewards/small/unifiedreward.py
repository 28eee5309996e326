"""A small UnifiedReward in the layout of the published Qwen2.5-VL checkpoints, written without downloads.

Purely random weights would say nothing that can be read as a score, so a few dimensions of the language model are set
by hand and make it answer in the right form: every step's token is a heading with a number, and which heading follows
depends on the last token alone. The numbers are random but steady functions of picture and prompt, through a random
vision tower and random attention; they mean nothing.

    state       dimensions 0-4: the heading that comes next, or the end; set by the token's embedding alone
    one         dimension 5: always 1
    picture     dimension 6: 1 at the picture's tokens; attention looks for it
    measure     dimensions 7-10: what attention and MLP make of picture and prompt, read as the heading's number
    free        the others: random
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.shared.weights import State, build_pretrained, quiet_libraries
from branchtree_rewards.small.checkpoint import meta_shapes, random_state, write_kept_settings
from branchtree_rewards.unifiedreward.templates import FILES, LABELS, fill_template

SEED = 20260904
WIDTH, HEADS, HEAD, LAYERS = 64, 4, 16, 2  # as in data/small_unifiedreward.json
END, ONE, PICTURE, MEASURE, FREE = 4, 5, 6, 7, 11
STEADY = HEAD // 2 - 1  # the slowest pair of rotary dimensions: hardly turned by position
FINEST = 0.05  # the step between two numbers that it can say
FIRMNESS = 20.0  # how much the state outweighs all else in the choice of the next token
SPREAD = 0.45  # standard deviation of a number about 3, in units of half its range, over the pictures below
IM_END = "<|im_end|>"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def write_small_unifiedreward(folder: Path) -> None:
    """Write the small checkpoint that answers in the right form."""
    _write(folder, talks=True)


def write_silent(folder: Path) -> None:
    """Write a model of the same shape that is random throughout: what it says is no score."""
    _write(folder, talks=False)


def _write(folder: Path, talks: bool) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    turns = headings() if talks else []
    tokenizer = _tokenizer(turns)
    with quiet_libraries():
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
        write_kept_settings(folder, "unifiedreward", {**ids, "vocabulary": len(tokenizer)})
        tokenizer.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        state = _random_state(config, tokenizer, turns)
        model = build_pretrained(Qwen2_5_VLForConditionalGeneration, config, state, "the small model", torch.float32)
        if talks:
            _teach(model.eval(), folder, tokenizer)
    # In several shards, under the published names, which are those of transformers 4.
    published = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in model.state_dict().items()
    }
    save_torch_state_dict(published, folder, filename_pattern="model{suffix}.safetensors", max_shard_size="400KB")


def numbers() -> list[str]:
    """Return the numbers that it can say, in ascending order."""
    return [f"{1 + step * FINEST:.2f}" for step in range(round(4 / FINEST) + 1)]


def headings() -> list[list[str]]:
    """Return the tokens that it says: for each heading in turn, one with each number."""
    starts = [label if turn == 0 else f"\n{label}" for turn, label in enumerate(LABELS.values())]
    return [[f"{start}: {number}" for number in numbers()] for start in starts]


def _tokenizer(turns: Sequence[Sequence[str]]) -> Any:
    """Return a tokenizer with a token for each byte, each line of the templates, and each heading with its number."""
    from tokenizers import pre_tokenizers
    from transformers import AddedToken, Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2TokenizerFast(
        vocab={letter: index for index, letter in enumerate(alphabet)},
        merges=[],
        unk_token=None,
        eos_token=IM_END,
        pad_token="<|endoftext|>",
    )
    lines = sorted({line for name in FILES for line in fill_template(name, "\n").splitlines() if len(line) > 8})
    spoken = [token for turn in turns for token in turn]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in [*lines, *spoken]])
    return tokenizer


def _random_state(config: Any, tokenizer: Any, turns: Sequence[Sequence[str]]) -> State:
    """Return random weights in which nothing but the embeddings writes to the dimensions set by hand."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    generator = torch.Generator().manual_seed(SEED)
    state = random_state(meta_shapes(lambda: Qwen2_5_VLForConditionalGeneration(config)), generator)
    state["model.language_model.embed_tokens.weight"] = _embeddings(tokenizer, turns, generator)
    merger = "model.visual.merger.mlp.2"
    state[f"{merger}.weight"][:FREE] = 0
    state[f"{merger}.bias"][:FREE] = 0
    state[f"{merger}.bias"][[ONE, PICTURE]] = 1
    for layer in range(LAYERS):
        prefix = f"model.language_model.layers.{layer}"
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"{prefix}.{name}.weight"][:MEASURE] = 0
        _seek_pictures(state, f"{prefix}.self_attn")
    return state


def _seek_pictures(state: State, attention: str) -> None:
    """Make every head prefer the picture's tokens, wherever they stand, to a prompt's many others."""
    for name, heads in (("q", HEADS), ("k", HEADS // 2)):
        weight, bias = state[f"{attention}.{name}_proj.weight"], state[f"{attention}.{name}_proj.bias"]
        steady = torch.arange(heads) * HEAD + STEADY
        weight.mul_(0.4)
        weight[steady] = 0
        if name == "q":
            bias[steady] = 6.0
        else:
            weight[steady, PICTURE] = 6.0


def _embeddings(tokenizer: Any, turns: Sequence[Sequence[str]], generator: torch.Generator) -> Tensor:
    """Return embeddings that lead from any token to the first heading, then to the next, and at last to the end."""
    table = 0.5 * torch.randn(len(tokenizer), WIDTH, generator=generator)
    table[:, :FREE] = 0
    table[:, ONE] = 1
    table[:, 0] = 1
    for turn, tokens in enumerate(turns):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        table[ids] = table[ids[0]].clone()  # which number came does not matter to the next one
        table[ids, 0] = 0
        table[ids, turn + 1] = 1
    return table


@torch.no_grad()
def _teach(model: Any, folder: Path, tokenizer: Any) -> None:
    """Set the language head so that each heading's number follows its measure, spread about 3 over some pictures.

    With f the measure, centred and scaled, and a in [-1, 1] standing for a number, the logit of that number is
    a f - a^2 / 2: greatest for the a nearest to f.
    """
    head, norm = model.lm_head.weight, model.model.language_model.norm.weight
    head.mul_(0.1)
    head[:, :FREE] = 0
    head[tokenizer.convert_tokens_to_ids(IM_END), END] = FIRMNESS
    centre, width = _measures(model, folder, tokenizer)
    levels = torch.linspace(-1, 1, len(numbers()))
    for turn, tokens in enumerate(headings()):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        slope = SPREAD / width[turn]
        head[ids, :] = 0
        head[ids, turn] = FIRMNESS
        head[ids, MEASURE + turn] = slope * levels
        head[ids, ONE] = -slope * centre[turn] * levels - levels**2 / 2
    head[:, :FREE] /= norm[:FREE]


def _measures(model: Any, folder: Path, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each heading's measure over flat, graded and noisy pictures, (4,) each."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": fill_template("semantic", "a picture")}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text += "".join(turn[0] for turn in headings()[:-1])
    generator = torch.Generator().manual_seed(SEED)
    flat = torch.rand(6, 3, 1, 1, generator=generator).expand(-1, -1, 56, 56)
    coarse = torch.rand(6, 3, 4, 4, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size=(56, 56), mode="bilinear")
    noisy = (coarse + 0.3 * torch.randn(6, 3, 56, 56, generator=generator)).clamp(0, 1)
    pictures = to_pil(torch.cat([flat, coarse, noisy]))
    inputs = processor(text=[text] * len(pictures), images=pictures, return_tensors="pt")
    hidden = model.model(**inputs).last_hidden_state[:, -4:] / model.model.language_model.norm.weight
    measures = torch.stack([hidden[:, turn, MEASURE + turn] / hidden[:, turn, ONE] for turn in range(4)], dim=1)
    return measures.mean(0), measures.std(0)
