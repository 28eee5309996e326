"""Whole runs on the pretended GPU (tests/pretend_gpu): every recipe, every method, and what a run can be asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from branchtree_adapters.flux import Flux
from pretend_gpu import pretend_gpu
from shipped_recipes import DRIVEN, ON_GPU, constants_of, require_shipped
from tiny_flux import tiny_flux
from tiny_wan import tiny_wan
from torch import nn
from training_runs import iterated, metrics, opened, shortened, small

from branchtree import evaluate, load_recipe, train
from branchtree.plugins.values import Condition, Conditioning
from branchtree.recipe.build import make_model
from branchtree.recipe.load import method_names

NAMES = ("cuda", "cuda:0")  # as accelerate gives it, without an index, and with one
JUDGED = {"quickstart", "flux_t2i_branchgrpo", "ocr_quickstart", "wan_i2v_14b_motion"}
"""The recipes that are evaluated: the held-out rewards of the others are the same, or those that they train with."""


@pytest.mark.parametrize(("recipe", "device"), [(recipe, NAMES[i % 2]) for i, recipe in enumerate(ON_GPU)])
def test_a_recipe_trains_and_is_evaluated_on_a_gpu(recipe: str, device: str, tmp_path: Path) -> None:
    """One of those that share a model, rewards and held-out figures; test_training.py trains the others on a CPU."""
    changes = shortened(recipe) | ({} if recipe in JUDGED else {"evaluation": None})
    with constants_of(recipe):
        if recipe in DRIVEN:  # on the CPU as on a GPU; pretending takes several times as long
            make_model(load_recipe(recipe, changes, smoke=True)).footprint()
        with pretend_gpu(device):
            result = train(recipe, changes, smoke=True, output=tmp_path / "run")
    assert result.finished and result.iterations == 1 and device_of(tmp_path / "run") == "cuda:0"
    (row,) = metrics(tmp_path / "run")
    assert row["steps/taken"] == 1 and row["ratio/first_step_max_deviation"] == 0
    assert (result.before is not None) == (recipe in JUDGED)
    require_shipped(recipe, tmp_path / "run", result.before)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def device_of(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["device"])


def on_both(recipe: str, changes: dict[str, Any], folder: Path, device: str = "cuda") -> None:
    """Iterate on the CPU and on the pretended GPU, whose arithmetic is the same: so are all figures, to the bit."""
    session = opened(recipe, changes, folder / "cpu")
    assert session.device.type == "cpu"
    expected = iterated(session)
    with pretend_gpu(device):
        session = opened(recipe, changes, folder / "gpu")
        assert session.device.type == "cuda"
        found = iterated(session)
    assert json.dumps(found) == json.dumps(expected)  # in which NaN equals NaN


CONTAINED = {"dancegrpo", "trajectories_10", "single", "mixgrpo"}
"""Methods that others are but for a number or a further setting."""


@pytest.mark.parametrize("method", [name for name in method_names() if name not in CONTAINED])
def test_a_method_gives_the_same_figures_on_a_gpu(method: str, flux: Path, tmp_path: Path) -> None:
    changes = small(flux, tree__steps=5, run__iterations=1)
    del changes["tree.splits"]
    tree = load_recipe(f"quickstart+{method}").tree
    if tree.split_steps:
        changes["tree.splits"] = list(range(min(len(tree.split_steps), 2)))
    on_both(f"quickstart+{method}", changes, tmp_path, NAMES[len(method) % 2])


FEATURES: dict[str, dict[str, Any]] = {
    "states on the host, several steps": {"batch__states": "host", "optim__steps_per_iteration": 2},
    "a KL to a frozen copy, and an average": {"loss__kl": 0.1, "optim__ema": 0.9, "run__iterations": 2},
    "LoRA, a KL to the model without it, and checkpointed blocks": {
        "lora__rank": 2,
        "loss__kl": 0.1,
        "run__gradient_checkpointing": True,
    },
    "encoders alone on the device, quantised weights": {
        "run__encode_alone": True,
        "lora__rank": 2,
        "model__quantize": "int8",
        "run__iterations": 2,
    },
    "a solver on states on the host, in small batches": {
        "tree__solver": "dpm2m",
        "tree__sde": "splits",
        "tree__continuation": 3,
        "tree__steps": 8,
        "batch__states": "host",
        "batch__rollout_rows": 3,
        "batch__update_rows": 3,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_gives_the_same_figures_on_a_gpu(feature: str, flux: Path, tmp_path: Path) -> None:
    on_both("quickstart", small(flux, **{"run__iterations": 1, **FEATURES[feature]}), tmp_path)


@pytest.mark.parametrize("alone", [True, False])
def test_encoders_are_alone_on_a_gpu_where_a_recipe_asks(
    alone: bool, flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[set[str]] = []

    def encode(adapter: Flux, conditions: Sequence[Condition]) -> Conditioning:
        encoded = encode_as_before(adapter, conditions)
        beside.append(devices(adapter.denoiser))
        assert devices(adapter.pipeline.text_encoder) == devices(adapter.pipeline.text_encoder_2) == {"cuda"}
        return encoded

    encode_as_before = Flux.encode
    monkeypatch.setattr(Flux, "encode", encode)
    changes = small(flux, run__encode_alone=alone, run__iterations=2, loss__kl=0.1, lora__rank=2)
    with pretend_gpu():
        session = opened("quickstart", changes, tmp_path / "run")
        iterated(session)
        adapter = session.inputs.model
        assert isinstance(adapter, Flux)
        assert beside and all(found == {"cpu" if alone else "cuda"} for found in beside)
        assert devices(adapter.denoiser) == {"cuda"} and devices(adapter.pipeline.text_encoder) == {"cpu"}


def devices(module: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_bfloat16_trains_on_a_gpu(lora: dict[str, int] | None, flux: Path, tmp_path: Path) -> None:
    """Not compared: CUDA's autocast runs other functions in float32 than the CPU's."""
    changes = small(flux, run__precision="bf16", lora=lora, run__iterations=1)
    with pretend_gpu():
        (row,) = iterated(opened("quickstart", changes, tmp_path / "run"))
    assert row["steps/taken"] == 1 and row["ratio/first_step_max_deviation"] == 0


def test_a_run_is_resumed_and_evaluated_on_a_gpu_by_its_other_name(flux: Path, tmp_path: Path) -> None:
    changes = small(flux, run__sample_prompts=1, optim__ema=0.9)
    train("quickstart", changes, output=tmp_path / "cpu")
    with pretend_gpu("cuda"):
        train("quickstart", {**changes, "run.iterations": 1}, output=tmp_path / "run")
    with pretend_gpu("cuda:0"):
        train("quickstart", changes, output=tmp_path / "run", resume=True, allow=["run.iterations"])
        rewards = [{"reward": "digits"}]
        evaluate(tmp_path / "run", rewards=rewards, prompts=["a six"], noises=2, output=tmp_path / "evaluation")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "cpu")


def test_a_small_wan_gives_nearly_the_same_figures_on_a_gpu(tmp_path: Path) -> None:
    """Its decoder's weights lie with channels last on a CPU alone, which rounds otherwise."""
    changes = {
        "model.path": str(tiny_wan(tmp_path / "wan")),
        "tree.steps": 4,
        "batch.prompts": 2,
        "evaluation": None,
        "run.iterations": 1,
    }
    (plain,) = iterated(opened("wan_quickstart", changes, tmp_path / "cpu"))
    with pretend_gpu():
        (pretended,) = iterated(opened("wan_quickstart", changes, tmp_path / "gpu"))
    assert pretended.keys() == plain.keys()
    for name in ("reward/digits/mean", "rows/rollout", "rows/gradient", "edges/trained"):
        assert pretended[name] == pytest.approx(plain[name], rel=1e-3)
