"""The benchmarks at their smallest size, and their arithmetic against counting by other means."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import costs
import full_size
import iteration_cost
import objectives
import overhead
import plot_comparison
import pytest
import startup
import torch
from branchtree_adapters.flux import FluxConfig
from branchtree_adapters.wan_layout import WanConfig
from full_size_tables import MARKS, MeanRows
from full_size_work import Settings, adapter, cost_of, recipe_of
from operations import Operations, count_operations, matrix_rate
from random_models import Execution, RandomFlux, RandomWan, build_at
from sampling import SampledDenoiser, Timed, part_of, share_within
from sessions import edge_by_edge
from tiny_flux import tiny_flux

from branchtree.core.families import Families
from branchtree.plugins import Footprint
from branchtree.recipe import load_recipe
from branchtree.studies.compare.request import parse_recipe

SMALLEST = {
    "tree.steps": 6,
    "tree.splits": [0, 2],
    "model.height": 16,
    "model.width": 16,
    "model.max_sequence_length": 8,
    "batch.prompts": 2,
    "data.prompts": ["a seven", "a three"],
}
META = torch.device("meta")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A benchmark may tell accelerate to stay on the CPU; what comes after it shall not."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make the quickstart tiny."""
    changes = {**SMALLEST, "model.path": str(tiny_flux(tmp_path_factory.mktemp("flux")))}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


@pytest.fixture
def guests_words(guest_site: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> list[str]:
    """The guest's recipe as tiny, for processes: unlike a pipeline it imports nothing large."""
    monkeypatch.setenv("PYTHONPATH", str(guest_site))
    return ["--recipe", "guest", *(word for word in words if not word.startswith("model."))]


# Exactness of the large models


def loaded_on_meta(name: str) -> tuple[Any, Footprint]:
    model: Any = adapter(name, recipe_of(name, "mix", Settings(), Path()), Settings())
    model.load(META, torch.bfloat16, torch.bfloat16)
    return model, model.footprint()


@pytest.mark.parametrize(("name", "published"), [("flux", 11_901_408_320), ("wan", 1_418_996_800)])
def test_full_architectures_have_the_published_parameters(name: str, published: int) -> None:
    """Of FLUX.1-dev's transformer and Wan2.1-T2V-1.3B's; the planner counts the same."""
    model, footprint = loaded_on_meta(name)
    assert sum(parameter.numel() for parameter in model.denoiser.parameters()) == published
    assert footprint.denoiser_parameters == published
    assert {parameter.device.type for parameter in model.denoiser.parameters()} == {"meta"}
    noise = model.initial_noise(torch.Generator())
    tokens = {"flux": (45 * 45, 64), "wan": (16, 14, 50, 80)}[name]  # patches of 16 pixels; 53 // 4 + 1 frames
    assert tuple(noise.shape) == tokens == footprint.latent_shape


def test_weights_have_the_dtypes_of_a_checkpoint_that_was_loaded(tmp_path: Path) -> None:
    """diffusers keeps parts of Wan in float32 when it loads bfloat16; so must weights that are drawn."""
    from diffusers import WanTransformer3DModel

    config = {"num_attention_heads": 1, "attention_head_dim": 24, "num_layers": 1, "ffn_dim": 16}
    config |= {"text_dim": 8, "freq_dim": 8}
    drawn = build_at(torch.device("cpu"), torch.bfloat16, lambda: WanTransformer3DModel(**config))
    drawn.save_pretrained(tmp_path)
    read = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in drawn.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in read.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert {name: b.dtype for name, b in drawn.named_buffers()} == {name: b.dtype for name, b in read.named_buffers()}
    assert torch.get_default_dtype() == torch.float32


# Operations


def test_operations_are_those_of_the_products_written_out(tmp_path: Path) -> None:
    """FLUX of one double and two single blocks, LoRA of rank r on attention's projections, by hand.

    With S tokens of width D a block's frozen products are 24 S D^2, attention 4 S^2 D, and a LoRA 4 S D r. The backward
    pass does the frozen products once, for the inputs' gradients, attention's and LoRA's twice. Embedders and
    modulations, which are not per token, are the few per cent left over.
    """
    rank, settings = 4, Settings(small=True)
    recipe = recipe_of("flux", "branchgrpo", settings, tmp_path)
    found = count_operations(adapter("flux", recipe, settings), rank)
    text, image, width, blocks = 16, 4 * 4, 2 * 128, 3
    tokens = text + image
    frozen, attention = blocks * 24 * tokens * width**2, blocks * 4 * tokens**2 * width
    lora = (
        4 * tokens * width * rank * (4 + 2 * 3)
    )  # to_q, k, v and out: a double block's two streams hold half the tokens
    assert found.forward == pytest.approx(frozen + attention + lora, rel=0.06)
    assert found.trained == pytest.approx(3 * frozen + 4 * (attention + lora), rel=0.06)
    assert found.forwards_per_trained_row < 4


def test_matrix_rate_counts_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("operations.time.perf_counter", lambda: float(next(ticks)))  # each product takes a second
    assert matrix_rate(torch.device("cpu"), 8, repetitions=2) == 2 * 8**3


# Sampling and scaling


@pytest.mark.parametrize(
    ("rows", "batch", "share", "expected"),
    [(578, 8, 1.0, 578), (578, 8, 0.0, 8), (578, 8, 0.1, 64), (578, None, 0.1, 578), (5, 8, 0.0, 5), (17, 8, 0.99, 17)],
)
def test_whole_batches_are_run(rows: int, batch: int | None, share: float, expected: int) -> None:
    assert part_of(rows, batch, share) == expected


def test_a_sampled_rollout_is_scaled_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of 2 rows and nineteen of 16: at a tenth, 1 and 2 are run, and 19 times the mean counts."""
    clock = [0.0]
    monkeypatch.setattr("sampling.time.perf_counter", lambda: clock[0])

    def velocity(latents: torch.Tensor, sigma: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        clock[0] += len(latents) / 2
        return latents + 1

    denoiser = SampledDenoiser(velocity, torch.device("cpu"), share=0.1)
    answers = [denoiser(torch.ones(rows, 3), torch.ones(rows), torch.zeros(rows)) for rows in (2, *[16] * 19)]
    run = [bool(answer.any()) for answer in answers]
    assert run == [True, True] + [False] * 9 + [True] + [False] * 8  # the 1st and the 11th of 19
    timed = denoiser.timed(total=clock[0] + 5.0)  # 5 seconds around the denoiser
    assert timed == Timed(rows=2 + 19 * 16, rows_run=2 + 2 * 16, seconds_run=1 + 16 + 5.0, seconds=1 + 19 * 8 + 5.0)


def test_the_share_fits_the_time_that_is_left() -> None:
    assert share_within(None, [1e9]) == 1.0
    assert share_within(300.0, [400.0, 200.0]) == 0.5
    assert share_within(-1.0, [1.0]) == 0.0
    assert Timed.scaled(100, 25, 3.0).seconds == 12.0


# Rows


def test_rows_of_the_methods(tmp_path: Path) -> None:
    """Two prompts, by the figures that the paper's tree fixes, and Mix's window counted step by step."""
    recipes = {method: recipe_of("flux", method, Settings(), tmp_path) for method in full_size.METHODS}
    costs_at_start = {method: cost_of(recipe, 0) for method, recipe in recipes.items()}
    assert (costs_at_start["dancegrpo"].rollout_rows, costs_at_start["dancegrpo"].gradient_rows) == (610, 578)
    assert (costs_at_start["branchgrpo"].rollout_rows, costs_at_start["branchgrpo"].gradient_rows) == (406, 2 * 187)
    # Nodes above each step of a Dense tree; under Mix a step is trained if it splits or lies in the window.
    widths = [1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 10]
    windows = [range(first, first + 4) for first in (min(i // 30, 15) for i in range(300))]
    rows = [2 * sum(widths[step] for step in {0, 3, 6, 9, *window}) for window in windows]
    mean = MeanRows.of(recipes["mix"])
    assert mean.gradient == pytest.approx(sum(rows) / 300)
    assert mean.flops(Operations(2.0, 5.0)) == pytest.approx(2 * 406 + 5 * sum(rows) / 300)


def test_edge_by_edge_keeps_the_edges() -> None:
    families = Families(*map(torch.tensor, ([0, 1], [0, 1], [0, 0], [0, 0, 1], [0, 1, 3], [0.5, -0.5, 1.0])))
    apart = edge_by_edge(families)
    assert len(apart) == apart.edges == 3
    assert (apart.depth.tolist(), apart.parent.tolist()) == ([0, 0, 1], [0, 0, 1])
    assert (apart.edge_depth.tolist(), apart.child.tolist()) == ([1, 1, 2], [0, 1, 3])


# Every script at its smallest


def test_full_size_runs_small_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of the batches; what was not run is scaled."""
    output = tmp_path / "deep" / "results.json"
    chosen = ["--device", "cpu", "--size", "small", "--sample", "0.02", "--output", str(output), "tree.steps=12"]
    found = full_size.main(["--model", "flux", "--methods", "mix", "branchgrpo", *chosen])
    saved = json.loads(output.read_text())
    assert [(row["model"], row["method"]) for row in saved["results"]] == [("flux", "mix"), ("flux", "branchgrpo")]
    found += full_size.main(["--model", "wan", "--methods", "mix", *chosen])
    for result in found:
        assert result.rollout.rows == 2 * (1 + 3 * 2 + 3 * 4 + 3 * 8 + 2 * 16)
        assert 0 < result.rollout.rows_run < result.rollout.rows
        assert 0 < result.update.rows_run < result.update.rows
        assert result.update.seconds == pytest.approx(
            result.update.seconds_run * result.update.rows / result.update.rows_run
        )
        assert result.decode is not None
        assert result.decode.rows == 32
        assert result.seconds > result.seconds_run > 0
        assert result.update_rate * result.update.seconds == pytest.approx(
            result.operations.trained * result.update.rows
        )
    printed = capsys.readouterr().out
    assert printed.count("| mix |") == 2


def test_full_size_predicts_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "flux", "--size", "small", "--methods", "branchgrpo", "--predict", "395", "790"]
    assert full_size.main(words) == []
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| branchgrpo"))
    assert line.split(" | ")[1:3] == ["406", "374"]
    assert line.endswith(f"| {MARKS['branchgrpo']} |")


def test_full_size_says_what_to_do_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is present")
    with pytest.raises(SystemExit, match="--device cpu --size small"):
        full_size.main(["--model", "flux"])


def test_iteration_cost_counts_what_it_times(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = costs.parse_overrides([word for word in words if not word.startswith("tree.splits")])
    tallies = iteration_cost.measure("quickstart", ["dancegrpo", "mix"], {**changes, "tree.steps": 11}, 1, 150)
    dance, mix = tallies["dancegrpo"], tallies["mix"]
    # 11 steps, the last of which is deterministic: 16 trajectories from one noise, and two prompts.
    assert (dance.rollout_rows, dance.families, dance.edges) == (2 * (1 + 10 * 16), 2 * (1 + 9 * 16), 2 * 10 * 16)
    assert dance.predicted_saving == pytest.approx(1 - 145 / 160)
    # A window over steps 5 to 8 beside the splits 0, 3, 6, 9.
    assert mix.families == 2 * (1 + 2 + 4 + 4 + 8 + 8 + 8)
    assert mix.edges == 2 * (2 + 4 + 4 + 8 + 8 + 8 + 16)
    assert mix.iteration > 0 and dance.iteration > 0
    iteration_cost.print_tables(tallies)


def test_costs_of_batches_pruning_and_checkpoints(words: list[str], tmp_path: Path) -> None:
    rates = costs.main(["batch", "--rounds", "1", *words])["batch"]
    assert list(rates) == [1, 2, 4, 8]  # two prompts of four leaves
    assert min(rates.values()) > 0
    figures = costs.main(["pruning", "--rounds", "1", *words])["pruning"]
    # The words' splits stay: a method's own, Dense, would not fit into 6 steps.
    assert figures["none"][0] == 2 * (1 + 2 + 2 + 4 + 4)
    assert figures["parent_top1"][0] == 2 * (1 + 2 + 2 + 2 + 2)
    written = costs.main(["checkpoint", "--rounds", "1", *words])["checkpoint"]
    assert written["bytes"] > 0
    assert written["load"] > 0


def test_costs_of_memory_in_a_process_of_its_own(guests_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "VARIANTS", {"small": {"batch.update_rows": 8}})
    added, planned = costs.main(["memory", *guests_words])["memory"]["small"]
    assert added >= 0
    assert planned > 0


def test_costs_of_processes(guests_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each prompt 17 rows rolled out and 13 trained, with splits 0 and 2 in 6 steps.

    Two processes that share each prompt's tree both compute its root.
    """
    monkeypatch.setattr(costs, "COUNTS", (2,))
    asked = ["processes", "--rounds", "1", *guests_words, "batch.processes_per_prompt=2"]
    shared = costs.main(asked)["processes"][2]
    alone = 2 * (1 + 2 + 2 + 4 + 4 + 4) + 2 * (1 + 2 + 2 + 4 + 4)
    assert alone / 2 < shared["rows"] < alone
    assert shared["total"] >= shared["rollout"] + shared["update"]


def test_overhead_with_an_expensive_decoder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["quickstart", "--iterations", "2", "--expensive", *words])
    assert "iteration / all in turn" in capsys.readouterr().out


def test_curves_of_a_comparison(tmp_path: Path) -> None:
    """Two seeds by hand: an iteration that was done twice counts once, with the time of the second go."""
    (tmp_path / "compare.json").write_text(json.dumps({"asked": {"seeds": [0, 1], "rows": {"a row": {"folder": "a"}}}}))
    for seed, (seconds, values) in enumerate([([9.0, 2.0, 3.0], [0.0, 1.0]), ([4.0, 4.0, 5.0], [0.0, 3.0])]):
        run = tmp_path / f"a/seed_{seed}"
        run.mkdir(parents=True)
        spent = zip([0, 0, 1], seconds, strict=True)
        told = zip([0, 2], values, strict=True)
        (run / "cpu.jsonl").write_text("".join(f'{{"iteration": {i}, "seconds": {each}}}\n' for i, each in spent))
        (run / "evaluation.jsonl").write_text(
            "".join(f'{{"iteration": {i}, "figures": {{"x": {{"mean": {value}}}}}}}\n' for i, value in told)
        )
    (curve,) = plot_comparison.read_curves(tmp_path, "x")
    assert (curve.name, curve.iterations, curve.seconds) == ("a row", [0, 2], [0.0, (2 + 3 + 4 + 5) / 2])
    assert (curve.mean, curve.std) == ([0.0, 2.0], [0.0, pytest.approx(2**0.5)])
    plot_comparison.main([str(tmp_path), "--figure", "x", "--output", str(tmp_path / "curves.svg")])
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_cells_of_the_comparison_of_objectives_are_recipes() -> None:
    """Forward objectives have trajectories of the ODE."""
    task = objectives.TASKS["quickstart"]
    rows = [parse_recipe(objectives.entry(task, *cell, "optim.lr=2e-5")) for cell in objectives.cells()]
    recipes = {row.name: load_recipe(row.recipe, row.overrides) for row in rows}
    assert next(iter(recipes)) == objectives.REFERENCE
    assert {recipe.optim.lr for recipe in recipes.values()} == {2e-5}
    losses = {(name.partition("/")[0], recipe.loss.kind, recipe.loss.ratio) for name, recipe in recipes.items()}
    forward = {(kind, kind, "plain") for kind in ("nft", "awm", "vgrpo", "crd")}
    assert losses == {("plain", "path", "plain"), ("centred", "path", "centred"), *forward}
    noise = [recipe.sampler.kind for name, recipe in recipes.items() if name.endswith("/independent")]
    assert noise == ["dance"] * 2 + ["cps"] * 4


def test_tables_of_the_comparison_of_objectives(tmp_path: Path) -> None:
    """Two seeds by hand: Student's t of one degree of freedom is 12.706 at 97.5%."""
    task = dataclasses.replace(objectives.TASKS["quickstart"], iterations=1)
    names = ["/".join(cell) for cell in objectives.cells()]
    tried = {f"{name} optim.lr={rate}": (rate, {100: {3: value}}) for name in names for rate, value in RATES}
    write_comparison(tmp_path / "search", dict(list(tried.items())[:-1]))
    with pytest.raises(SystemExit, match="not finished: crd/single"):
        objectives.chosen(task, tmp_path)
    write_comparison(tmp_path / "search", tried)
    assert objectives.chosen(task, tmp_path) == dict.fromkeys(names, 1e-4)
    head, _, first, *_ = objectives.search_table(task, tmp_path)
    assert head == "| objective | tree | lr 3e-05 | lr 0.0001 | lr 0.0003 |"
    assert first == "| plain | single | -1.000 | **-0.250** | -0.500 |"
    write_comparison(
        tmp_path / "rows",
        {
            "plain/single": (1e-4, {0: {1: -0.5, 3: -0.2}, 1: {1: -0.5, 3: -0.4}}),
            "nft/dense": (3e-5, {0: {1: -0.4, 2: -0.3}, 1: {1: -0.2, 2: -0.3}}),
        },
    )
    work = "12 | 4 | 2 | 0.125"
    assert objectives.final_table(task, tmp_path, None)[2:] == [
        f"| plain | single | 0.0001 | 3 | {work} | 0.700 +- 0.141 | -0.300 +- 0.141 | - |",
        f"| nft | dense | 3e-05 | 2 | {work} | 0.700 +- 0.000 | -0.300 +- 0.000 | +0.000 (-1.271 to +1.271) |",
    ]
    half = 12.706 * (0.1 * 2**0.5) / 2**0.5
    assert objectives.final_table(task, tmp_path, 1)[3].endswith(
        f"| -0.300 +- 0.141 | +0.200 ({0.2 - half:+.3f} to {0.2 + half:+.3f}) |"
    )


RATES = ((3e-5, -1.0), (1e-4, -0.25), (3e-4, -0.5))


def write_comparison(folder: Path, rows: dict[str, tuple[float, dict[int, dict[int, float]]]]) -> None:
    """Write what the tables read: by row the learning rate, and by seed and iteration a held-out figure.

    The other figure is 1 more. A run ends with its last evaluation.
    """
    asked = {name: {"folder": f"row_{i}"} for i, name in enumerate(rows)}
    results = [
        {"row": name, "runs": [{"seed": s, "status": "finished"} for s in runs]} for name, (_, runs) in rows.items()
    ]
    folder.mkdir(exist_ok=True)
    (folder / "compare.json").write_text(json.dumps({"asked": {"rows": asked}, "results": results}))
    for name, (rate, runs) in rows.items():
        for seed, values in runs.items():
            run = folder / asked[name]["folder"] / f"seed_{seed}"
            run.mkdir(parents=True, exist_ok=True)
            (run / "recipe.yaml").write_text(f"optim: {{lr: {rate}}}\n")
            rows_of = {
                "rows/rollout": 12.0,
                "rows/gradient": 4.0,
                "rows/rescored": 2.0,
                "ratio/clipped_fraction": 0.125,
            }
            logged = [{"iteration": i, **rows_of} for i in range(max(values))]
            judged = [
                {"iteration": done, "figures": {"log_prob": {"mean": value}, "accuracy": {"mean": value + 1}}}
                for done, value in values.items()
            ]
            for file, lines in (("metrics.jsonl", logged), ("evaluation.jsonl", judged)):
                (run / file).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_execution_reaches_the_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxTransformer2DModel, WanTransformer3DModel

    asked: list[object] = []
    for kind in (FluxTransformer2DModel, WanTransformer3DModel):
        monkeypatch.setattr(kind, "set_attention_backend", lambda self, name: asked.append((type(self), name)))
        monkeypatch.setattr(kind, "compile_repeated_blocks", lambda self: asked.append(type(self)))
    execution = Execution(attention="native", compiled=True)
    RandomFlux(FluxConfig(path="org/flux"), execution).load(META, torch.bfloat16, torch.bfloat16)
    wan = WanConfig(path="org/wan-1.3b", task="text_to_video", height=400, width=640, frames=53)
    RandomWan(wan, execution).load(META, torch.bfloat16, torch.bfloat16)
    flux, video = FluxTransformer2DModel, WanTransformer3DModel
    assert asked == [(flux, "native"), flux, (video, "native"), video]


def test_the_start_of_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "TORCH", ("-c", "sum(range(1_000_000))"))
    startup.main(["--repetitions", "2", "--command=--help"])
    *_, torch_line, help_line = capsys.readouterr().out.splitlines()
    assert torch_line.startswith("| `import torch` | ") and torch_line.endswith(" | 1.00 |")
    found = re.fullmatch(r"\| `--help` \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| ([\d.]+) \|", help_line)
    assert found is not None
    median, least, most, _ = map(float, found.groups())
    assert 0 < least <= median <= most
