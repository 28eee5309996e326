"""A video run end to end on the bundled small Wan: what it writes, and that diffusers reproduces its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from decord import VideoReader
from diffusers import WanImageToVideoPipeline
from guests import run_command
from PIL import Image
from torch import Tensor
from training_runs import metrics

from branchtree import load_recipe, plan
from branchtree.run.directory import RunDirectory
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.session import Session
from branchtree.training.trainer import Trainer

SHORT: dict[str, Any] = {
    "tree.steps": 4,
    "tree.splits": [1],
    "tree.branches": 3,
    "sampler.grid": "pipeline",
    "evaluation.limit": 2,
    "evaluation.noises": 1,
    "run.iterations": 2,
    "run.sample_prompts": 2,
    "optim.lr": 1e-3,
    "optim.ema": None,
}


def trained(output: Path, **changes: Any) -> Session:
    recipe = load_recipe("wan_i2v_motion", {**SHORT, **changes}, smoke=True)
    directory = RunDirectory(output)
    directory.claim(resume=False)
    session = open_session(read_inputs(recipe), directory, make_accelerator(recipe))
    Trainer(session, []).run(resume=False)
    return session


def sampled_by(session: Session) -> Tensor:
    policy = session.policy.under(session.inputs.held_out_conditions[:1])
    return policy.sample(policy.initial(3, 0, [(0, 0)]))


def sampled_by_diffusers(pipeline: Any, session: Session, noise: Tensor) -> Tensor:
    model, condition = session.recipe.model.options, session.inputs.held_out_conditions[0]
    pipeline.set_progress_bar_config(disable=True)
    frames: Tensor = pipeline(
        image=Image.open(condition.image).convert("RGB"),
        prompt=condition.prompt,
        negative_prompt="",
        num_inference_steps=4,
        latents=noise,
        output_type="latent",
        max_sequence_length=model["max_sequence_length"],
        guidance_scale=model["guidance"],
        height=model["height"],
        width=model["width"],
        num_frames=model["frames"],
    ).frames
    return frames


@pytest.mark.parametrize("lora", [True, False])
def test_final_reproduces_the_samples_in_diffusers(lora: bool, tmp_path: Path) -> None:
    from branchtree.core.noise import Purpose, generator

    session = trained(tmp_path / "run", **({} if lora else {"lora": None}))
    base = session.inputs.model.pipeline.config._name_or_path  # type: ignore[attr-defined]
    pipeline = WanImageToVideoPipeline.from_pretrained(base if lora else tmp_path / "run/final")
    noise = session.inputs.model.initial_noise(generator(3, 0, 0, 0, 0, Purpose.INITIAL))[None]
    untrained = sampled_by_diffusers(WanImageToVideoPipeline.from_pretrained(base), session, noise)
    if lora:
        pipeline.load_lora_weights(tmp_path / "run/final")
    theirs, ours = sampled_by_diffusers(pipeline, session, noise), sampled_by(session)
    assert (theirs - ours).abs().max() < 1e-4
    assert (theirs - untrained).abs().max() > 1e-3


def test_a_run_shows_its_videos_and_keeps_to_its_plan(tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [f"{key}={json.dumps(value)}" for key, value in SHORT.items()]
    done = run_command("train", "wan_i2v_motion", *words, "--smoke", "--output", str(output))
    assert done.code == 0, done.err
    expected = plan("wan_i2v_motion", SHORT, smoke=True)
    for row in metrics(output):
        assert row["rows/rollout"] == expected.rollout_rows == 2 * 2 * (2 + 3 * 2)  # guidance, prompts, depths
        assert row["rows/gradient"] <= expected.gradient_rows
    for folder in ("iteration_000000", "iteration_000002"):
        video = VideoReader(str(output / "samples" / folder / "sample_000.mp4"))
        assert len(video) == 9
        assert video.get_avg_fps() == pytest.approx(8)
    assert len(list((output / "trees/iteration_000000").glob("leaf_*.webp"))) == 3
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:video/mp4;base64,") == 2
    assert page.count("data:image/webp;base64,") >= 3
