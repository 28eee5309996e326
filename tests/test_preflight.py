"""What a run needs of a device is compared with what is free there before anything is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from branchtree_adapters.flux import Flux
from guests import Outcome, run_code

from branchtree import evaluate, load_recipe, plan, train
from branchtree.errors import DeviceMemoryError, ModelError
from branchtree.planning.gpus import GIB, DeviceMemory, device_memory
from branchtree.planning.memory import Surroundings, estimate_evaluation, estimate_memory
from branchtree.planning.preflight import RewardSize, RewardSizes, TrainingNeed, reward_sizes, step_shortage
from branchtree.plugins import DecoderFootprint, Footprint, RewardFootprint
from branchtree.recipe import Recipe
from branchtree.training.processes import process_group

FLUX = "flux_t2i_branchgrpo"
PLAIN = {"data.prompts": ["a"], "evaluation": None, "rewards": [{"reward": "digits"}]}
SHORT = {
    "tree.steps": 4,
    "tree.splits": [0, 1],
    "batch.prompts": 1,
    "evaluation": None,
    "run.iterations": 1,
    "run.sample_prompts": 1,
}
FULL = "CUDA out of memory. Tried to allocate 64.00 MiB."


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Pretend that there is a GPU with so many GiB in all, and so many of them free."""

    def pretend(total: float, free: float) -> None:
        memory = DeviceMemory("cuda:0", int(total * GIB), int(free * GIB))
        for module in ("planning.preflight", "training.loading"):
            monkeypatch.setattr(f"branchtree.{module}.device_memory", lambda: memory)

    return pretend


@pytest.fixture(autouse=True)
def _nothing_large_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub that is loaded all the same ends the test with an error of another kind."""
    plainly = Flux.load

    def load(adapter: Flux, *arguments: Any, **settings: Any) -> None:
        if not adapter.config.path.startswith("bundled:"):
            raise ModelError("it was loaded")
        plainly(adapter, *arguments, **settings)

    monkeypatch.setattr(Flux, "load", load)


# --- the refusal ---


def test_training_that_does_not_fit_is_refused_before_prompts_are_read(
    card: Callable[[float, float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(79.1, 78.5)
    monkeypatch.setattr("branchtree.training.trainer.read_inputs", lambda recipe: pytest.fail("prompts were read"))
    with pytest.raises(DeviceMemoryError) as refused:
        train(FLUX, output=tmp_path / "run")
    told = str(refused.value)
    assert "needs 215 GiB of cuda:0" in told and "78.5 of its 79.1 GiB are free" in told
    assert "gradients and optimiser 133 GiB, denoiser weights 66.5 GiB" in told
    assert "lora.rank=64" in told
    assert "FSDP2 over 4 such GPUs (accelerate launch --config_file recipes/accelerate/fsdp2.yaml" in told
    assert "--force (force=True)" in told
    assert not (tmp_path / "run").exists()


def test_what_is_refused_may_be_forced(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(79.1, 78.5)
    with pytest.raises(ModelError, match="it was loaded"):
        train(FLUX, PLAIN, output=tmp_path / "run", force=True)


def test_the_changes_that_are_named_let_it_start(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(79.1, 78.5)
    with pytest.raises(ModelError, match="it was loaded"):
        train(FLUX, {**PLAIN, "lora.rank": 64}, output=tmp_path / "run")


def test_memory_that_others_use_counts(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(79.1, 10)
    with pytest.raises(DeviceMemoryError, match=r"10 of its 79\.1 GiB are free"):
        train(FLUX, {**PLAIN, "lora.rank": 64}, output=tmp_path / "run")


def test_batches_are_named_where_they_suffice(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(79.1, 78.5)
    large = {**PLAIN, "lora.rank": 64, "batch.update_rows": 64, "run.gradient_checkpointing": False}
    with pytest.raises(DeviceMemoryError, match=r"What would fit: batch\.update_rows=2;? ?"):
        train(FLUX, large, output=tmp_path / "run")


def test_batches_that_the_recipe_leaves_open_refuse_nothing(
    card: Callable[[float, float], None], tmp_path: Path
) -> None:
    """They begin with what fits."""
    card(79.1, 78.5)
    opened = {"lora.rank": 64, "batch.update_rows": None, "batch.rollout_rows": None, "batch.decode_rows": None}
    assert plan(FLUX, {**opened, **PLAIN}).memory.device > 100 * GIB
    with pytest.raises(ModelError, match="it was loaded"):
        train(FLUX, {**opened, **PLAIN}, output=tmp_path / "run")


def test_an_evaluation_is_asked_too(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(44.3, 43.8)
    given = {"prompts": ["a"], "output": tmp_path / "e"}
    with pytest.raises(DeviceMemoryError) as refused:
        evaluate(FLUX, rewards="digits", **given)
    assert "this evaluation needs" in str(refused.value) and "denoiser weights 66.5 GiB" in str(refused.value)
    with pytest.raises(DeviceMemoryError, match=r"What would fit: evaluation\.rows=(8|16|32|64)\."):
        evaluate(FLUX, {"lora.rank": 8, "evaluation.rows": 128}, rewards="digits", **given)
    with pytest.raises(ModelError, match="it was loaded"):
        evaluate(FLUX, rewards="digits", force=True, **given)


def test_the_commands_take_force(
    card: Callable[[float, float], None], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    card(23.6, 23.0)
    words = [FLUX, "--output", str(tmp_path / "run"), "data.prompts=[a]", "rewards=[{reward: digits}]"]
    words += ["evaluation.prompts=[a]", "evaluation.rewards=[{reward: digits}]"]
    for name in ("train", "evaluate"):
        refused, forced = command(name, *words), command(name, *words, "--force")
        assert (refused.code, forced.code) == (2, 2)
        assert "--force" in refused.err and "it was loaded" not in refused.err
        assert "it was loaded" in forced.err


def test_without_an_accelerator_nothing_is_asked(tmp_path: Path) -> None:
    assert torch.accelerator.is_available() or device_memory() is None
    with pytest.raises(ModelError, match="it was loaded"):
        train(FLUX, PLAIN, output=tmp_path / "run")


def test_free_memory_is_asked_of_the_processs_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the allocator keeps for this process is as good as free."""
    asked: list[int] = []

    def tell(*values: int) -> Callable[[int], Any]:
        return lambda index: (asked.append(index), values if len(values) > 1 else values[0])[1]

    library = SimpleNamespace(mem_get_info=tell(60, 80), memory_reserved=tell(9), memory_allocated=tell(2))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "get_device_module", lambda device: library)
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert device_memory() == DeviceMemory("xpu:3", 80, 67)
    assert set(asked) == {3}
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert device_memory() is None


# --- what is counted ---

SIZES = Footprint(
    denoiser_parameters=1000,
    frozen_parameters=500,
    latent_shape=(4, 5),
    activation_numbers_per_row=300,
    checkpointed_numbers_per_row=30,
    forward_flops_per_row=1.0,
    rows_per_prediction=1,
    lora_parameters_per_rank=7,
    source="this test",
    largest_block_parameters=40,
    decoder=DecoderFootprint(
        parameters=90, numbers_per_row=7000, flops_per_row=3.0, media_numbers_per_row=60, rows=3, number_bytes=4
    ),
)


def small(**sections: Any) -> Recipe:
    fixed = {"name": "r", "model": {"adapter": "x"}, "rewards": [{"reward": "y"}], "data": {"prompts": ["a"]}}
    return Recipe.model_validate(fixed | sections)


def cost(**changes: Any) -> Any:
    return plan("quickstart", {"model.path": "bundled:digits_flux", "evaluation": None, **changes}).iteration


@pytest.fixture(scope="module")
def some() -> Any:
    """The work of a tree of four leaves."""
    return replace(cost(**{"tree.steps": 4, "tree.splits": [0, 1], "batch.prompts": 1}), leaves=4, nodes=11)


def test_the_decoder_counts_what_it_decodes_at_once(some: Any) -> None:
    memory = estimate_memory(small(), SIZES, some)
    assert (memory.decoder, memory.decoding) == (90 * 4, 3 * 7000 * 4)  # three at once, of four leaves
    assert memory.media == (4 + 4) * 60 * 4  # all leaves, and what is copied together
    assert memory.device == memory.resident + memory.decoder + memory.media + memory.decoding
    one = estimate_memory(small(batch={"decode_rows": 1}), SIZES, some)
    assert (one.decoding, one.media) == (7000 * 4, 4 * 60 * 4)
    evaluation = {"prompts": ["a"], "rewards": [{"reward": "y"}], "rows": 2}
    assert estimate_memory(small(batch={"decode_rows": 1}, evaluation=evaluation), SIZES, some).decoding == 2 * 28000


def test_decoders_that_stay_in_float32_do_so(some: Any) -> None:
    reduced = small(run={"precision": "bf16"})
    assert estimate_memory(reduced, SIZES, some).decoding == 3 * 7000 * 4
    follows = replace(SIZES, decoder=replace(SIZES.decoder, number_bytes=None))  # type: ignore[type-var]
    assert estimate_memory(reduced, follows, some).decoding == 3 * 7000 * 2
    assert estimate_memory(reduced, replace(SIZES, frozen_float32_parameters=100), some).frozen == 400 * 2 + 100 * 4


def test_reward_models_stay_or_come_and_go(some: Any) -> None:
    sizes = RewardSizes(
        (RewardSize("a", RewardFootprint(100)), RewardSize("b", RewardFootprint(30, offloads=True))),
        (RewardSize("c", RewardFootprint(50, offloads=True)), RewardSize("d", None)),
    )
    around = sizes.around()
    assert (around.rewards, around.offloaded_rewards) == (100, 50)  # the two groups never score at the same time
    before, memory = (estimate_memory(small(), SIZES, some, each) for each in (Surroundings(), around))
    assert memory.resident == before.resident + 100
    assert memory.device == before.device + 150
    assert memory.host == before.host + 50


def test_ddp_sends_a_copy_of_the_gradients(some: Any) -> None:
    for recipe, trained in ((small(), 1000), (small(lora={"rank": 3}), 21)):
        alone, two = (estimate_memory(recipe, SIZES, some, Surroundings(processes=n)) for n in (1, 2))
        assert (alone.buckets, two.buckets) == (0, 4 * trained)
        assert two.device == alone.device + 4 * trained


def test_fsdp2_divides_what_it_shards(some: Any) -> None:
    recipe = small(run={"precision": "bf16"}, loss={"kl": 0.1}, optim={"ema": 0.9})
    memory = estimate_memory(recipe, SIZES, some, Surroundings(processes=4, sharded=True))
    assert memory.weights == 1000 * 4 // 4  # autocast copies no weights that are gathered in bfloat16
    assert memory.optimizer == 1000 * 12 // 4 + 2 * 40 * 4  # gradients of two blocks are whole until they are reduced
    assert memory.gathered == 2 * 40 * 2
    assert (memory.reference, memory.buckets, memory.average) == (1000, 0, 1000)
    kept = estimate_memory(recipe, SIZES, some, Surroundings(processes=4, sharded=True, gathered_whole=True))
    assert kept.gathered == 1000 * 2
    lora = estimate_memory(
        small(run={"precision": "bf16"}, lora={"rank": 3}), SIZES, some, Surroundings(processes=4, sharded=True)
    )
    assert lora.weights == 1000 * 2 // 4
    assert lora.optimizer == 21 * 16 // 4 + 21 * 4  # reduced once, when a step ends


def test_an_evaluation_trains_nothing() -> None:
    memory = estimate_evaluation(small(lora={"rank": 3}), SIZES, 2)
    assert memory.optimizer == 21 * 4
    assert (memory.activations, memory.reference, memory.buckets) == (0, 0, 0)
    assert memory.decoding == 2 * 28000


def test_a_launchers_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("quickstart", {"batch.prompts": 8})
    alone = TrainingNeed.of(recipe)
    monkeypatch.setenv("WORLD_SIZE", "4")
    ddp = TrainingNeed.of(recipe)
    assert ddp.cost.leaves * 4 == alone.cost.leaves
    assert ddp.estimate().buckets == 4 * ddp.footprint.denoiser_parameters
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    sharded = TrainingNeed.of(recipe).estimate()
    assert sharded.buckets == 0 and sharded.weights * 4 == alone.estimate().weights
    assert not TrainingNeed.of(recipe).here.gathered_whole
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert TrainingNeed.of(recipe).here.gathered_whole


def test_processes_need_prompts(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(79.1, 78.5)
    with pytest.raises(DeviceMemoryError, match=r"FSDP2 over 4 such GPUs .*, with batch\.prompts=4"):
        train(FLUX, {**PLAIN, "batch.prompts": 1}, output=tmp_path / "run")


def test_what_cannot_be_sharded_is_switched_off(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(79.1, 78.5)
    with pytest.raises(DeviceMemoryError, match=r"FSDP2 over 4 such GPUs .*, with .*run\.encode_alone=false"):
        train(FLUX, {**PLAIN, "run.encode_alone": True}, output=tmp_path / "run")


def test_a_reward_that_judges_and_trains_counts_once() -> None:
    one = {"reward": "hps", "path": "random:small"}
    evaluation = {"prompts": ["a"], "rewards": [one, {"reward": "hps", "version": "v2.0", "label": "older"}]}
    sizes = reward_sizes(small(rewards=[one], evaluation=evaluation))
    assert [size.label for size in sizes.trained] == ["hps"]
    assert [size.label for size in sizes.held_out] == ["older"]


# --- memory that runs out all the same ---


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), RuntimeError(FULL)])
def test_an_optimisers_step_without_memory_names_the_changes(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(optimizer: Any, closure: Any = None) -> None:
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(DeviceMemoryError) as ended:
        train("quickstart", SHORT, output=tmp_path / "run")
    assert "memory ran out in the optimiser's step" in str(ended.value)
    assert "What would fit: " in str(ended.value)
    assert str(ended.value).endswith(FULL)


def test_other_errors_of_a_step_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(optimizer: Any, closure: Any = None) -> None:
        raise RuntimeError("shapes")

    monkeypatch.setattr(torch.optim.AdamW, "step", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        train("quickstart", SHORT, output=tmp_path / "run")


def test_a_shortage_asks_for_less_than_was_estimated(card: Callable[[float, float], None]) -> None:
    card(1000, 1000)
    assert "lora.rank=64" in step_shortage(load_recipe(FLUX, PLAIN))


# --- how long processes wait ---


def test_the_timeout_reaches_the_process_group() -> None:
    """Of gloo too, whose default is another than NCCL's."""
    code = """
        import os
        import torch
        os.environ |= dict(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        from accelerate.state import AcceleratorState
        from branchtree import load_recipe
        from branchtree.run.directory import RunDirectory
        from branchtree.training.loading import make_accelerator
        from pathlib import Path
        for changes in ({}, {"run.timeout": 10}, {"run.timeout": 0.5}):
            make_accelerator(load_recipe("quickstart", changes))
            group = torch.distributed.group.WORLD
            print(round(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()))
            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
        """
    done = run_code(code)
    assert done.out.split() == [str(2 * 3600), "600", "30"], done.err


def test_the_timeout_is_never_left_out() -> None:
    for minutes in (10, 30, 120):
        assert "timeout" in process_group(minutes).to_kwargs()


# --- models without figures of their own ---


def warnings(recipe: str, overrides: dict[str, Any], command: Callable[..., Outcome]) -> list[str]:
    words = [f"{key}={value}" for key, value in overrides.items()]
    return [line for line in command("plan", recipe, *words).out.splitlines() if line.startswith("Warning: ")]


def test_a_plan_warns_of_figures_that_are_assumed(command: Callable[..., Outcome]) -> None:
    known = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")
    quiet = {"rewards": "[{reward: digits}]", "evaluation": "null", "data.prompts": "[a]"}
    assert [warnings(FLUX, {"model.path": path, **quiet}, command) for path in known] == [[], []]
    (told,) = warnings(FLUX, {"model.path": "someone/other", **quiet}, command)
    assert "the model's sizes are assumed to be those of FLUX.1-dev" in told and "may be wrong" in told
    video = {"rewards": "[{reward: motion_smoothness}]", "evaluation": "null"}
    (told,) = warnings("wan_i2v_motion", {"model.path": "Wan-AI/Wan2.2-I2V-A14B-Diffusers", **video}, command)
    assert "assumed to be those of Wan2.1-I2V-14B-480P" in told
    assert warnings("wan_i2v_motion", video, command) == []


def test_a_refusal_says_that_figures_are_assumed(card: Callable[[float, float], None], tmp_path: Path) -> None:
    card(23.6, 23.0)
    for path, expected in (("someone/other", True), ("black-forest-labs/FLUX.1-dev", False)):
        with pytest.raises(DeviceMemoryError) as refused:
            train(FLUX, {**PLAIN, "model.path": path}, output=tmp_path / "run")
        assert ("assumed to be those of FLUX.1-dev" in str(refused.value)) == expected


def test_what_a_plan_prints_adds_up(command: Callable[..., Outcome]) -> None:
    done = command("plan", "wan_i2v_motion+single")
    assert "Reward models: videoalign 4.11 GiB." in done.out
    assert "activations of the decoder" in done.out and "and decoding" in done.out
