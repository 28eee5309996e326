"""Words for the small FLUX that writes them: the prompts' words, random letters, and pictures of both."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_uppercase

import matplotlib
import numpy as np
import torch
from _digits import ROOT
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HEIGHT, WIDTH = 32, 128
LENGTHS = (3, 4, 5)
PROMPT = 'The word "{}"'


@dataclass(frozen=True)
class Style:
    """How words are drawn: in free fonts that come with matplotlib, `shift` pixels or less from the middle."""

    fonts: tuple[str, ...]
    sizes: tuple[int, ...]
    shift: int


VARIED = Style(("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold"), sizes=(23, 24, 25), shift=2)
SPACED = Style(("DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono"), sizes=(34,), shift=1)
"""Letters of one width: where a letter is depends on the length of its word, but on no other letter."""


def read_words(split: str) -> list[str]:
    """Return the quoted words of ``recipes/prompts/words_{split}.txt``."""
    lines = (ROOT / f"recipes/prompts/words_{split}.txt").read_text(encoding="utf-8").splitlines()
    return [re.findall('"(.*)"', line)[0] for line in lines]


def random_words(count: int, excluded: set[str], rng: random.Random) -> list[str]:
    """Return strings of random capital letters, evenly many of each length, none of them ``excluded``."""
    drawn: list[str] = []
    while len(drawn) < count:
        word = "".join(rng.choices(ascii_uppercase, k=LENGTHS[len(drawn) % len(LENGTHS)]))
        if word not in excluded:
            drawn.append(word)
    return drawn


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / f"fonts/ttf/{name}.ttf", size)


def draw_word(word: str, style: Style, rng: random.Random) -> Image.Image:
    """Return a grey picture of a word, black on white, in a random font and size of a style."""
    name, size, shift = rng.choice(style.fonts), rng.choice(style.sizes), style.shift
    while _font(name, size).getlength(word) > WIDTH - 2 * shift:
        size -= 1
    picture = Image.new("L", (WIDTH, HEIGHT), 255)
    middle = (WIDTH / 2 + rng.randint(-shift, shift), HEIGHT / 2 + rng.randint(-shift, shift))
    ImageDraw.Draw(picture).text(middle, word, fill=0, font=_font(name, size), anchor="mm")
    return picture


def draw_words(words: Sequence[str], style: Style, rng: random.Random) -> Tensor:
    """Return pictures of words, uint8 (N, 32, 128)."""
    return torch.from_numpy(np.stack([np.asarray(draw_word(word, style, rng)) for word in words]))
