"""What CLIP's publishers do, for the tests of the rewards made of CLIP: their vocabulary, and prompts of many kinds.

The vocabulary is built from the merges that open-clip-torch ships, as its own SimpleTokenizer does.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import open_clip.tokenizer
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
MERGES = 49152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"

HARD = [
    "",
    " ",
    "a cat",
    "A CAT, Sitting",
    "\u201ccurly\u201d and \u2018single\u2019 quotes \u2014 a dash\u2026",
    "it's, they're, we've, I'M, you'll, he'd",
    "&amp;amp; &lt;b&gt; fish &amp; chips &quot;here&quot; &#8217;",
    "e&#769; accents: e\u0301 n\u0303 \u00e9 \u00f1",
    "\uff26\uff55\uff4c\uff4c \uff57\uff49\uff44\uff54\uff48 \uff11\uff12\uff13",
    "\ufb01ne \ufb02ow ligatures",
    "a dog \U0001f436 and a flag \U0001f1eb\U0001f1f7 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "line one\nline two\r\n\ttabbed\u00a0hard\u2003wide",
    "\u732b\u304c\u30bd\u30d5\u30a1\u306b\u5ea7\u308b \uace0\uc591\uc774",
    "\u043a\u043e\u0448\u043a\u0430 \u0642\u0637\u0629",
    "1234567890 3.14 1,000,000 2nd 50% $5 x2",
    "\u0130stanbul stra\u00dfe \u01c5 \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
    "schÃ¶n, mojibake cafÃ©",
    "<b>html</b> <!-- comment --> {json: [1]} ~!@#$%^&*()_+",
    "word " * 200,
    "antidisestablishmentarianism" * 20,
    "\U0001f436" * 100,
    "'s'S''\u2019s \u017ft",
    "zero\u200bwidth soft\u00adhyphen \u2028separator \x1cfile",
    "text <|endoftext|> after it <|startoftext|>'s",
    "<b> e&#769;te\u0301, which ftfy leaves alone",
    "<i> fish &amp;amp; chips &amp;lt;b&amp;gt;",
]


SCORED = [text for text in HARD if text.strip()]
"""Those that hold something to read; the others are masked."""


@functools.cache
def prompts() -> list[str]:
    """Some hundred prompts: hard cases, those of the recipes, and random mixtures of pieces of both."""
    shipped = sorted((ROOT / "recipes" / "prompts").glob("*"))
    lines = [line for file in shipped if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    recipe = [json.loads(line)["prompt"] if line.startswith("{") else line for line in lines]
    draw = random.Random(4)
    pieces = list(itertools.chain.from_iterable(text.split(" ") for text in [*HARD[:17], *recipe]))
    spaces = [" ", "  ", "\n", ", ", "", "\t"]
    mixed = [
        "".join(f"{draw.choice(pieces)}{draw.choice(spaces)}" for _ in range(n)) for n in range(1, 61) for _ in "abcde"
    ]
    cased = ["".join(letter.upper() if draw.random() < 0.5 else letter for letter in text) for text in mixed[::5]]
    return list(dict.fromkeys([*HARD, *recipe, *mixed, *cased]))


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt of the 49408-entry tokenizer, as the hub's CLIP repositories hold them."""
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : MERGES + 1]
    symbols = list(open_clip.tokenizer.bytes_to_unicode().values())
    joined = ["".join(merge.split()) for merge in merges]
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *joined, START, END]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def up_to_end(row: Tensor, end: int) -> list[int]:
    """The ids of one prompt, with its first end token and without what pads them."""
    ids: list[int] = row.tolist()
    return ids[: ids.index(end) + 1]


def tiny_open_clip(quick_gelu: bool, embed: int = 24, image: int = 28) -> tuple[open_clip.CLIP, dict[str, Any]]:
    """open_clip's own small CLIP with no weight left as it is initialised, and its `model_cfg`."""
    vision = {"image_size": image, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.CLIP(
            embed, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu=quick_gelu
        ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, {"embed_dim": embed, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


def write_hps(folder: Path, quick_gelu: bool) -> open_clip.CLIP:
    """Write the weights of open_clip's own small model as HPS is published, and its configuration."""
    model, config = tiny_open_clip(quick_gelu)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}), encoding="utf-8")
    return model


@functools.cache
def open_clip_tokenizer() -> open_clip.tokenizer.SimpleTokenizer:
    """open_clip's own tokenizer, which takes a while to read."""
    return open_clip.tokenizer.SimpleTokenizer()


@torch.no_grad()
def open_clip_cosine(model: open_clip.CLIP, pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """The published score: features of open_clip's towers, and of its tokenizer, normalised and multiplied."""
    ids = open_clip_tokenizer()(list(texts), context_length=77)
    images, words = model.encode_image(pictures, normalize=True), model.encode_text(ids, normalize=True)
    cosine: Tensor = (images * words).sum(dim=-1)
    return cosine


def random_pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """8-bit pictures (count, 3, height, width) with both edges and flat parts."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, height, width, generator=generator)
    blocks = torch.rand(count, 3, 3, 3, generator=generator).round()
    shapes = torch.nn.functional.interpolate(blocks, (height, width), mode="nearest")
    return ((0.5 * noise + 0.5 * shapes) * 255).round().to(torch.uint8)
