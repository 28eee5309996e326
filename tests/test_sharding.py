"""One process, two with whole weights (DDP) and two with sharded weights (FSDP2 under gloo) learn the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from forked import Python, end_together, shared_environment
from safetensors.torch import load_file
from tiny_flux import tiny_flux
from tiny_wan import Kind, tiny_wan
from torch import Tensor
from training_runs import metrics, small

from branchtree import train
from branchtree.errors import RecipeError
from branchtree.training.sharding import read_shard_settings

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"

# Three prompts, so that one process has one and the other two; the leaves of a prompt without a digit are masked, and
# only one process has it. Batches are small, so that processes need different numbers of forwards and backwards.
UNEVEN: dict[str, Any] = {
    "data__prompts": ["a seven", "a picture", "a one"],
    "data__shuffle": False,
    "batch__prompts": 3,
    "batch__rollout_prompts": 1,
    "batch__rollout_rows": 3,
    "batch__update_rows": 3,
    "pruning__kind": "parent_top1",
    "optim__steps_per_iteration": 2,
    "optim__lr": 1e-3,
    # Adam divides by the gradient's own size, which makes steps of rounding where a gradient is nothing else.
    "optim__eps": 1e-4,
    "loss__clip_range": 1e-2,
    "run__iterations": 2,
    "run__checkpoint_every": 2,
    "run__tree_every": 1,
}
LOW_RANK = {**UNEVEN, "lora__rank": 2, "loss__kl": 0.1, "optim__ema": 0.5, "run__gradient_checkpointing": True}
EVALUATED = {
    **UNEVEN,
    "loss__kl": 0.1,
    "loss__old_log_prob": "recomputed",
    "optim__ema": 0.5,
    "tree__continuation": 3,
    "evaluation": {"prompts": ["a two", "a six", "a nine"], "rows": 1, "rewards": [{"reward": "digits"}]},
}
# With one step an iteration, the gradient pass of a process that has two prompts begins with the first.
EARLY = {**UNEVEN, "optim__steps_per_iteration": 1}
# The weights are in bfloat16, the low-rank ones in float32.
HALF = {**LOW_RANK, "run__precision": "bf16"}
# Leaves are trained, and later steps compare with predictions from before the first.
FORWARD = {**UNEVEN, "loss__kind": "vgrpo", "loss__draws": 2, "loss__kl": 0.1}
QUANTIZED = {**LOW_RANK, "model__quantize": "int8"}
CASES = {
    "full": UNEVEN,
    "lora": LOW_RANK,
    "quantized": QUANTIZED,
    "evaluated": EVALUATED,
    "early": EARLY,
    "half": HALF,
    "forward": FORWARD,
}

LOOKED_AT = ["full_sharded", "lora_sharded"]
"""Runs of which each process writes how it holds the weights."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: NAME_one, NAME_ddp and NAME_sharded, and the full one stopped and resumed by others."""
    root = tmp_path_factory.mktemp("runs")
    asked = []
    for name, changes in CASES.items():
        train("quickstart", small(model, **changes), output=root / f"{name}_one")
        for kind in ("sharded", "ddp") if name not in ("lora", "quantized", "half", "forward") else ("sharded",):
            asked.append(_asked(root / f"{name}_{kind}", small(model, **changes), kind == "sharded"))
    first = small(model, **{**UNEVEN, "run__iterations": 1})
    train("quickstart", first, output=root / "stopped_one")
    for kind in ("sharded", "ddp"):
        shutil.copytree(root / "stopped_one", root / f"one_then_{kind}")
        asked.append(_asked(root / f"one_then_{kind}", small(model, **UNEVEN), kind == "sharded", resume=True))
        asked.append(_asked(root / f"{kind}_then_one", first, kind == "sharded"))
    video = tiny_wan(tmp_path_factory.mktemp("wan"), Kind(image_to_video=False))
    for precision in ("full", "lora"):
        shutil.copytree(video, root / precision / "pipeline")
        asked.append({"precision": precision, "path": str(video), "output": str(root / precision)})
    script, shared = str(Path(__file__).parent / "process_runs.py"), shared_environment()
    processes = [
        Python(script, json.dumps(asked), environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert end_together(processes) == [0, 0], "".join(process.out + process.err for process in processes)
    for kind in ("sharded", "ddp"):
        train("quickstart", small(model, **UNEVEN), output=root / f"{kind}_then_one", resume=True)
    return root


def _asked(output: Path, overrides: dict[str, Any], sharded: bool, resume: bool = False) -> dict[str, Any]:
    return {
        "output": str(output),
        "overrides": overrides,
        "sharded": sharded,
        "reshard": "evaluated" not in output.name,  # those runs go as zero2.yaml has it
        "resume": resume,
        "looked_at": output.name in LOOKED_AT,
    }


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def trained(run: Path) -> Tensor:
    """The weights in the last checkpoint, as one vector."""
    (file,) = (last_checkpoint(run) / "model").rglob("*.safetensors")
    tensors = load_file(file)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def close(first: Tensor, second: Tensor) -> float:
    """The difference's norm over the first's."""
    return float((first - second).norm() / first.norm())


def alone(other: str) -> str:
    """The case that a run of two processes belongs to."""
    return other.partition("_")[0]


PAIRS = [
    "full_ddp",
    "full_sharded",
    "lora_sharded",
    "quantized_sharded",
    "evaluated_ddp",
    "evaluated_sharded",
    "early_ddp",
    "early_sharded",
    "forward_sharded",
]


@pytest.mark.parametrize("other", PAIRS)
def test_two_processes_make_the_same_trees_rewards_and_advantages(runs: Path, other: str) -> None:
    one, two = metrics(runs / f"{alone(other)}_one"), metrics(runs / other)
    assert len(one) == len(two) >= 2
    assert all(row["reward/skipped_prompts"] == 1 for row in one)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in (name for name in first if not name.startswith(("loss", "log_prob/", "ratio/"))):
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    for iteration in range(len(one)):
        trees = [_numbers(runs / run, iteration) for run in (f"{alone(other)}_one", other)]
        assert trees[1] == pytest.approx(trees[0], rel=1e-3, abs=1e-4)


def _numbers(run: Path, iteration: int) -> list[float]:
    """All numbers in the record of an iteration's first tree, in order."""
    (file,) = (run / "trees").glob(f"*{iteration:06d}*.json")

    def walk(value: Any) -> list[float]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [number for part in value for number in walk(part)]
        return [float(value)] if isinstance(value, (int, float)) else []

    return walk(json.loads(file.read_text()))


@pytest.mark.parametrize("other", ["evaluated_ddp", "evaluated_sharded"])
def test_two_processes_evaluate_the_same(runs: Path, other: str) -> None:
    rows = [(runs / run / "evaluation.jsonl").read_text().splitlines() for run in ("evaluated_one", other)]
    assert rows[0][0] == rows[1][0]
    before, after = (json.loads(row[-1])["figures"]["digits"] for row in rows)
    assert after["mean"] == pytest.approx(before["mean"], rel=1e-4)
    assert after["samples"] == before["samples"] == 3


@pytest.mark.parametrize("other", PAIRS)
def test_two_processes_end_with_the_same_weights(runs: Path, other: str) -> None:
    one = trained(runs / f"{alone(other)}_one")
    assert close(one, trained(runs / other)) < 1e-5


def test_two_processes_learn_the_same_under_bf16(runs: Path) -> None:
    """The first iteration is the same but for the order of sums; what is learnt, up to bfloat16's rounding."""
    one, two = metrics(runs / "half_one"), metrics(runs / "half_sharded")
    for name in (name for name in one[0] if not name.startswith(("loss", "log_prob/", "ratio/"))):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-2, abs=1e-5), name
    assert all(row["ratio/first_step_max_deviation"] == 0 for row in (*one, *two))
    assert close(trained(runs / "half_one"), trained(runs / "half_sharded")) < 1e-2


@pytest.mark.parametrize("precision", ["full", "lora"])
def test_sharded_weights_are_gathered_as_the_pipeline_has_them_in_bf16(runs: Path, precision: str) -> None:
    """What it keeps in float32 is float32 in every forward, and so are LoRA's weights."""
    facts = json.loads((runs / precision / "precision.json").read_text())
    pipeline = WanPipeline.from_pretrained(runs / precision / "pipeline", dtype=torch.bfloat16)
    expected = {name: str(value.dtype) for name, value in pipeline.transformer.named_parameters()}
    lora = {name: dtype for name, dtype in facts["gathered"].items() if "lora_" in name}
    base = {name.replace(".base_layer", ""): d for name, d in facts["gathered"].items() if name not in lora}
    assert base == expected and set(expected.values()) == {"torch.bfloat16", "torch.float32"}
    assert set(lora.values()) == ({"torch.float32"} if precision == "lora" else set())
    assert set(facts["trained"]) == (set(lora) if precision == "lora" else set(base))
    assert facts["gradients"] == ["torch.float32"]
    # Full training differs in the weights of the queries' norms, which autocast leaves in float32.
    assert facts["repeated"] == 0 and facts["difference"] < (1e-6 if precision == "lora" else 2e-2)


def test_the_runs_learn_far_more_than_they_differ(runs: Path, model: Path) -> None:
    (start,) = (model / "transformer").glob("*.safetensors")
    before = load_file(start)
    flat = torch.cat([before[name].double().flatten() for name in sorted(before)])
    assert close(flat, trained(runs / "full_one")) > 1e-3


@pytest.mark.parametrize("run", ["one_then_sharded", "one_then_ddp", "sharded_then_one", "ddp_then_one"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, run: str) -> None:
    assert len(metrics(runs / run)) == 2
    assert close(trained(runs / "full_one"), trained(runs / run)) < 1e-5


def test_sharded_checkpoints_are_the_same_files(runs: Path) -> None:
    one, two = (last_checkpoint(runs / f"lora_{kind}") for kind in ("one", "sharded"))
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    averages = [load_file(folder / "average.safetensors") for folder in (one, two)]
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, two)]
    assert averages[0].keys() == averages[1].keys()
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for name, average in averages[0].items():
        assert torch.allclose(average, averages[1][name], atol=1e-5), name
    for place, entry in states[0]["state"].items():
        for name, value in entry.items():
            assert torch.allclose(value, states[1]["state"][place][name], atol=1e-5), (place, name)


@pytest.mark.parametrize("run", LOOKED_AT)
def test_each_process_holds_a_part_of_every_weight(runs: Path, run: str) -> None:
    facts = [json.loads((runs / run / f"facts_{rank}.json").read_text()) for rank in range(2)]
    assert [fact["processes"] for fact in facts] == [2, 2]
    assert all(fact["sharded"] for fact in facts)
    assert sum(fact["here"] for fact in facts) == facts[0]["numbers"]
    assert max(fact["here"] for fact in facts) < 0.6 * facts[0]["numbers"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: must be 2"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "run.gradient_checkpointing"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    from accelerate import Accelerator

    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=told):
        read_shard_settings(Accelerator(cpu=True))


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match=r"zero2\.yaml"):
        train("quickstart", small(model), output=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"), [({}, "there is only one"), ({"run__encode_alone": True}, r"run\.encode_alone.*set it")]
)
def test_sharding_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RecipeError, match=said):
        train("quickstart", small(model, **changes), output=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "launcher", "processes", "machines"),
    [
        ("one_gpu", "simple_launcher", 1, 1),
        ("eight_gpus", "multi_gpu_launcher", 8, 1),
        ("fsdp2", "multi_gpu_launcher", 8, 1),
        ("fsdp2_nodes", "multi_gpu_launcher", 16, 2),
        ("zero2", "multi_gpu_launcher", 8, 1),
        ("cpu", "multi_gpu_launcher", 2, 1),
    ],
)
def test_accelerate_reads_every_configuration(
    monkeypatch: pytest.MonkeyPatch, name: str, launcher: str, processes: int, machines: int
) -> None:
    from accelerate.commands import launch

    started: list[Any] = []
    for kind in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, kind, _recorder(started, kind))
    parser = launch.launch_command_parser()
    launch.launch_command(parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "branchtree"]))
    ((kind, arguments),) = started
    assert (kind, arguments.num_processes, arguments.num_machines) == (launcher, processes, machines)
    assert arguments.mixed_precision == "no"
    if name.startswith(("fsdp2", "zero2")):
        assert (arguments.fsdp_version, arguments.fsdp_auto_wrap_policy) == (2, "TRANSFORMER_BASED_WRAP")
        assert arguments.fsdp_reshard_after_forward == (name != "zero2")


def test_no_configuration_is_left_out() -> None:
    names = {"one_gpu", "eight_gpus", "fsdp2", "fsdp2_nodes", "zero2", "cpu"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == names


def _recorder(started: list[Any], kind: str) -> Callable[[Any], None]:
    return lambda arguments: started.append((kind, arguments))
