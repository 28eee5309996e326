"""What the scripts that build the bundled small models share: a word tokenizer, and writing a pipeline's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import T5TokenizerFast


def build_t5_tokenizer(vocabulary: Sequence[str], max_length: int, pieces: Sequence[str] = ()) -> T5TokenizerFast:
    """Return a unigram tokenizer in which every word of `vocabulary` is one token; other words are unknown.

    `pieces` are tokens of which longer words consist, after a word of the vocabulary that these begin with.
    """
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    scores += [(f"▁{word}", -2.0) for word in vocabulary]
    scores += [(piece, -2.0) for piece in pieces]
    tokenizer = T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=max_length)
    for word in vocabulary:
        assert len(tokenizer(word).input_ids) == 2, f"{word!r} is not one token"
    return tokenizer


def save_pipeline(pipeline: Any, output: Path, t5_tokenizer: str) -> None:
    """Write a pipeline whose part `t5_tokenizer` both transformers 4 and 5 read."""
    pipeline.save_pretrained(output)
    rewrite_json(output / t5_tokenizer / "tokenizer_config.json", extra_special_tokens=None)
    rewrite_json(output / "model_index.json", **{t5_tokenizer: ["transformers", "T5TokenizerFast"]})
    for file in output.rglob("*.safetensors"):
        file.chmod(0o644)


def write_clip_weights(encoder: nn.Module, folder: Path, prefix: str) -> None:
    """Write a CLIP encoder's weights under prefixed names, which transformers 4 needs and 5 does not mind.

    From what transformers 5 writes, version 4 would load an encoder with random weights.
    """
    weights = {f"{prefix}.{name}": value for name, value in encoder.state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))


def rewrite_json(file: Path, **changes: object) -> None:
    """Set entries of a JSON file; a value of None removes the entry."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in content.items() if name not in changes or value is not None}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
