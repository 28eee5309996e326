"""Record what the publisher's own ImageReward code says of a tiny random model, as test data.

    python scripts/record_imagereward.py --code CHECKOUT --commit COMMIT [--out tests/data/rewards]

CHECKOUT is a working tree of https://github.com/THUDM/ImageReward. Its code needs transformers 4, timm 0.6 and
fairscale, so this runs in an environment of its own, and imports nothing of this project. The recorded files came from
commit c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb under Python 3.11.7 with torch 2.14.1, torchvision 0.29.1, transformers
4.45.2, tokenizers 0.20.3, timm 0.6.13, fairscale 0.4.13, numpy 1.26.4 and pillow 13.0.0, on a CPU.

The publisher's classes fix the sizes of the vision encoder and of the head. The tiny model is made of the same classes
with smaller numbers: the vision encoder through its own arguments, the text encoder through med_config.json, and the
head by narrowing each of its linear layers. All that computes, from pictures and
prompts to rewards, is the publisher's.

Written are

    imagereward_tiny.safetensors   weights under their published names, whole multiples of 1/64 stored as int8
                                   multipliers, and pictures as bytes (H, W, 3)
    imagereward_tiny.json          med_config.json, vocabulary, prompts, their token ids, rewards by picture and prompt
    imagereward_keys.json          name and shape of every tensor of the full-size model
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

STEP = 1 / 64
SEED = 4
IMAGE, PATCH, WIDTH, DEPTH = 32, 8, 128, 2
HEAD = {768: 24, 1024: 20, 128: 14, 64: 10, 16: 6, 1: 1}  # the head's widths, published: tiny
SIZES = ((40, 56), (33, 33), (72, 32), (32, 75), (24, 20))  # heights and widths of the pictures
PROMPTS = (
    "a painting of an ocean with clouds and birds, day time, low depth field effect",
    "A red cat.",
    "a red cat",
    "",
    "Café déjà vu: über-große Straße",
    "it's 7 o'clock (somewhere); 100% of them - #1!",
    "两只猫 on a mat",
    "a cat \N{SMILING FACE WITH SUNGLASSES} and   some\ttabs\nand lines",
    " ".join(["ocean"] * 50),
    "[SEP] a special token in a prompt",
    "İstanbul ﬁne \N{LEFT DOUBLE QUOTATION MARK}curly\N{RIGHT DOUBLE QUOTATION MARK} \N{ZERO WIDTH SPACE}gaps",
)
WORDS = (
    "an",
    "and",
    "the",
    "of",
    "on",
    "with",
    "ocean",
    "clouds",
    "birds",
    "painting",
    "day",
    "time",
    "low",
    "depth",
    "field",
    "effect",
    "red",
    "cat",
    "mat",
    "some",
    "it",
)
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HEAD[768],
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "encoder_width": HEAD[768],
    "add_cross_attention": True,
}
FULL_MED_CONFIG = {
    **MED_CONFIG,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "encoder_width": 768,
    "vocab_size": 30524,
}


def vocabulary() -> list[str]:
    """A BERT vocabulary: special tokens, ASCII characters as first and later pieces, and a few words and endings."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    later = [f"##{character}" for character in characters if character.isalnum()]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *later, *WORDS, "##ing", "猫"]


def import_code(checkout: Path) -> types.ModuleType:
    """The publisher's module of the reward, without the rest of its package, which needs training libraries."""
    for name in ("ImageReward", "ImageReward.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("ImageReward.ImageReward")


def build_tiny(code: types.ModuleType, med_config: Path) -> Any:
    """The publisher's model in tiny sizes, with random weights that are multiples of STEP."""
    vit: Any = importlib.import_module("ImageReward.models.BLIP.vit")
    pretrain: Any = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")

    def create_vit(*_: Any) -> tuple[nn.Module, int]:
        encoder = vit.VisionTransformer(
            img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=WIDTH // 64, mlp_ratio=0.5
        )
        return encoder, WIDTH

    original, pretrain.create_vit = pretrain.create_vit, create_vit
    model = code.ImageReward(med_config=str(med_config))
    pretrain.create_vit = original
    layers = [
        nn.Linear(HEAD[layer.in_features], HEAD[layer.out_features]) if isinstance(layer, nn.Linear) else layer
        for layer in model.mlp.layers
    ]
    model.mlp.layers = nn.Sequential(*layers)
    model.preprocess = code._transform(IMAGE)
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    """Give every parameter random values, so that each matters: norms near 1, matrices that keep sizes."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower():
            values = noise / 4 + (1 if name.endswith("weight") else 0)
        elif parameter.ndim == 1:
            values = noise / 8
        elif "embed" in name and "proj" not in name:
            values = noise / 2
        else:
            values = 1.5 * noise / parameter[0].numel() ** 0.5
        parameter.data = (values / STEP).round().clamp(-127, 127) * STEP


def pictures() -> list[Tensor]:
    """Pictures (H, W, 3) as bytes: coloured waves under noise."""
    generator = torch.Generator().manual_seed(SEED + 1)
    made = []
    for height, width in SIZES:
        waves = torch.rand(3, 2, generator=generator)
        down, across = torch.linspace(0, 9, height)[:, None, None], torch.linspace(0, 9, width)[None, :, None]
        picture = 0.5 + 0.4 * torch.sin(down * waves[:, 0] + across * waves[:, 1] + 6 * waves[:, 0])
        picture = picture + 0.1 * torch.randn(height, width, 3, generator=generator)
        made.append((picture * 255).round().clamp(0, 255).to(torch.uint8))
    return made


@torch.no_grad()
def record_tiny(code: types.ModuleType, med_config: Path, out: Path, provenance: dict[str, str]) -> None:
    """Write the tiny model and what it says of every picture and prompt."""
    model = build_tiny(code, med_config)
    drawn = pictures()
    images = [Image.fromarray(picture.numpy()) for picture in drawn]
    rewards = [[model.score(prompt, image) for prompt in PROMPTS] for image in images]
    ranked = [model.inference_rank(prompt, images)[1] for prompt in PROMPTS]
    assert torch.allclose(torch.tensor(rewards).T, torch.tensor(ranked), atol=1e-5), "the publisher's two ways differ"
    ids = [
        model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35).input_ids
        for prompt in PROMPTS
    ]
    stored = {
        name: (value / STEP).to(torch.int8) if value.is_floating_point() else value.contiguous()
        for name, value in model.state_dict().items()
    }
    stored |= {f"pictures.{place}": picture for place, picture in enumerate(drawn)}
    save_file(stored, out / "imagereward_tiny.safetensors")
    lines = {
        "provenance": provenance,
        "step": STEP,
        "med_config": json.loads(med_config.read_text()),
        "vocabulary": vocabulary(),
        "prompts": PROMPTS,
        "ids": ids,
        "rewards": rewards,
    }
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in lines.items())
    (out / "imagereward_tiny.json").write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


def record_keys(code: types.ModuleType, med_config: Path, out: Path) -> None:
    """Write name and shape of every tensor of the full-size model."""
    state = code.ImageReward(med_config=str(med_config)).state_dict()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(list(value.shape))}" for name, value in state.items())
    (out / "imagereward_keys.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def provenance(commit: str) -> dict[str, str]:
    """The code and the versions that the recording comes from."""
    names = ("torch", "torchvision", "transformers", "tokenizers", "timm", "fairscale", "numpy", "PIL")
    versions = {name: str(importlib.import_module(name).__version__) for name in names}
    return {"code": f"https://github.com/THUDM/ImageReward at {commit}", **versions}


def main() -> None:
    """Read the arguments and write the three files."""
    parser = argparse.ArgumentParser(description="Record the publisher's ImageReward code as test data.")
    parser.add_argument("--code", type=Path, required=True, help="working tree of the publisher's repository")
    parser.add_argument("--commit", required=True, help="its commit, to be written down")
    parser.add_argument("--out", type=Path, default=Path("tests/data/rewards"))
    given = parser.parse_args()
    checkout, out = given.code.resolve(), given.out.resolve()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        tokenizer = Path("bert-base-uncased")  # the name by which the publisher's code loads it
        tokenizer.mkdir()
        (tokenizer / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
        code = import_code(checkout)
        tiny, full = Path("tiny.json"), Path("full.json")
        tiny.write_text(json.dumps({**MED_CONFIG, "vocab_size": len(vocabulary()) + 2}))
        full.write_text(json.dumps(FULL_MED_CONFIG))
        record_tiny(code, tiny, out, provenance(given.commit))
        record_keys(code, full, out)


if __name__ == "__main__":
    main()
