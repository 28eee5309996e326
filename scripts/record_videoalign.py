"""Record what VideoAlign's own code makes of a tiny checkpoint, as test data for the `videoalign` reward.

The publisher's code needs old libraries, so this script runs in an environment of its own and imports nothing of
branchtree. Recorded with KwaiVGI/VideoAlign at commit 219ab9db64c045e5181a2202d11f686439351292, Python 3.11, torch
2.14.1, torchvision 0.29.1, transformers 4.45.2, tokenizers 0.20.3, peft 0.13.2, trl 0.8.6, accelerate 0.34.2, datasets
2.21.0, decord 0.6.0 and av 18.1.0, on a CPU. Its class `VideoVLMRewardInference` does all the work: it reads the videos
from files, samples, resizes, tokenises, builds the model with peft, loads the checkpoint and normalises the scores. Two
things are set from outside: sdpa in place of flash attention, and float32 in place of bfloat16.

In this project's environment, write a checkpoint:

    python -c "from pathlib import Path; from branchtree_rewards.small.videoalign import write_small_videoalign; \
write_small_videoalign(Path('small'))"

In the other one, record:

    python scripts/record_videoalign.py --code VideoAlign --checkpoint small --output tests/data/rewards

which writes `videoalign_small/`, the checkpoint with the names, files and tokenizer as the old libraries save them,
`videoalign_inputs.npz`, the decoded videos and what the model was given, and `videoalign_scores.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLIPS = (  # name, frames, height, width, frames per second
    ("a", 21, 20, 36, 16),
    ("b", 27, 36, 28, 6),
)
PROMPTS = (
    "A red kite climbs over the dunes",
    "Two children chase a dog along the beach,\nwhile the camera follows {slowly}; it's late - 5 o'clock!",
)
STEP = "checkpoint-7"
ROWS_KEPT = 499  # one patch in so many is recorded
# As Qwen2-VL's chat_template.json renders one user turn of a video and a text.
CHAT = (
    "{% for message in messages %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}{% if part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Record both kinds of head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="a checkout of KwaiVGI/VideoAlign")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder that write_small filled")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.code.resolve()))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        videos = {clip[0]: write_clip(work / f"{clip[0]}.mkv", *clip[1:]) for clip in CLIPS}
        base = write_base(arguments.checkpoint, work / "base")
        scores: dict[str, Any] = {
            "prompts": PROMPTS,
            "fps": [clip[4] for clip in CLIPS],
            "every": ROWS_KEPT,
            "heads": {},
        }
        for outputs in (1, 3):
            run = open_publisher(write_run(arguments.checkpoint, base, work / f"run{outputs}", outputs))
            scores["heads"][str(outputs)] = score(run, work)
        # ``run`` has the head of three rows; the checkpoint that is kept has the published one.
        run = open_publisher(work / "run1")
        save_checkpoint(run, arguments.checkpoint, arguments.output / "videoalign_small")
        head = torch.load(work / "run3" / STEP / "model.pth")["base_model.model.rm_head.weight"]
        scores["head_of_three"] = head.tolist()
        inputs = {key: value.numpy() for key, value in model_inputs(run, work).items()}
        arrays: dict[str, Any] = {**videos, **inputs}
        np.savez_compressed(arguments.output / "videoalign_inputs.npz", **arrays)
        (arguments.output / "videoalign_scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def write_clip(file: Path, frames: int, height: int, width: int, fps: int) -> np.ndarray:
    """Write a moving pattern without loss, and return (F, H, W, 3) uint8 as decord reads it back."""
    import av
    import decord

    down, across, time = np.mgrid[0:height, 0:width, 0:frames].astype(np.float64)
    waves = [
        np.sin(across / (5 + shade) + time / 3) + np.cos(down / (4 + shade) - time * shade / 4) for shade in range(3)
    ]
    content = ((np.stack(waves, -1) + 2) * 63).astype(np.uint8).transpose(2, 0, 1, 3) // 16 * 16
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        for picture in content:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    reader = decord.VideoReader(str(file))
    if len(reader) != frames or not math.isclose(reader.get_avg_fps(), fps):
        raise SystemExit(f"{file} came back as {len(reader)} frames at {reader.get_avg_fps()} a second")
    return np.asarray(reader.get_batch(list(range(frames))).asnumpy())


def write_base(checkpoint: Path, folder: Path) -> Path:
    """The base model that the publisher's code starts from: random weights, all of which the checkpoint replaces."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    shutil.copytree(checkpoint / STEP / "tokenizer", folder)
    config = json.loads((checkpoint / "config.json").read_text())
    Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(config)).save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


def write_run(checkpoint: Path, base: Path, folder: Path, outputs: int) -> Path:
    """The checkpoint as the publisher's code expects it, with a head of ``outputs`` rows."""
    settings = json.loads((checkpoint / "model_config.json").read_text())
    settings["model_config"].update(model_name_or_path=str(base), output_dim=outputs)
    state = torch.load(checkpoint / STEP / "model.pth")
    name = "base_model.model.rm_head.weight"
    if outputs > len(state[name]):
        state[name] = torch.cat([state[name], torch.randn(outputs - len(state[name]), state[name].shape[1]).bfloat16()])
    (folder / STEP).mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(settings))
    torch.save(state, folder / STEP / "model.pth")
    return folder


def open_publisher(folder: Path) -> Any:
    """The publisher's inference class on a checkpoint."""
    inference: Any = importlib.import_module("inference")
    original = inference.TrainingConfig

    def without_gpu(**settings: Any) -> Any:
        """Flash attention needs a GPU, and the publisher's class asks for it."""
        return original(**{**settings, "disable_flash_attn2": True, "use_cpu": True})

    inference.TrainingConfig = without_gpu
    try:
        return inference.VideoVLMRewardInference(str(folder), device="cpu", dtype=torch.float32)
    finally:
        inference.TrainingConfig = original


def score(run: Any, work: Path) -> dict[str, Any]:
    """The publisher's scores of both clips in one padded batch, and of each alone; and before normalisation."""
    files = [str(work / f"{clip[0]}.mkv") for clip in CLIPS]
    with torch.no_grad():
        return {
            "batch": run.reward(files, list(PROMPTS), use_norm=True),
            "alone": [run.reward([file], [prompt])[0] for file, prompt in zip(files, PROMPTS)],  # noqa: B905
            "unnormalised": run.reward(files, list(PROMPTS), use_norm=False),
        }


def model_inputs(run: Any, work: Path) -> dict[str, torch.Tensor]:
    """What the publisher's code gives its model: tokens, mask, grids, and some of the patches."""
    batch = run.prepare_batch([str(work / f"{clip[0]}.mkv") for clip in CLIPS], list(PROMPTS))
    return {
        "input_ids": batch["input_ids"].int(),
        "attention_mask": batch["attention_mask"].to(torch.uint8),
        "video_grid_thw": batch["video_grid_thw"],
        "patches": batch["pixel_values_videos"][::ROWS_KEPT],
    }


def save_checkpoint(run: Any, checkpoint: Path, folder: Path) -> None:
    """The model as the publisher's trainer saves it, and the tokenizer as transformers 4.45 does."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / STEP).mkdir(parents=True)
    for name in ("config.json", "model_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    torch.save({key: value.bfloat16() for key, value in run.model.state_dict().items()}, folder / STEP / "model.pth")
    run.processor.tokenizer.save_pretrained(folder / STEP / "tokenizer")


if __name__ == "__main__":
    main()
