"""The seconds of an iteration of FLUX.1-dev and Wan2.1-1.3B, exact architectures with random weights, by method.

Nothing is downloaded: weights are drawn in bfloat16 on the device; prompts' embeddings and rewards are random numbers.
So this is about denoiser, gradient pass and decoder alone. Rollout, credit and update are the library's own.
LoRA of rank 64, gradient checkpointing, 720 x 720 for FLUX, 400 x 640 x 53 for Wan, 20 steps, 16 leaves, two prompts.

    python benchmarks/full_size.py --device cuda --model flux
    python benchmarks/full_size.py --device cuda --model flux --budget 480
    python benchmarks/full_size.py --predict 395
    python benchmarks/full_size.py --device cpu --size small

With ``--budget`` or ``--sample`` only a share of the batches is run, each at its true size. Their time is scaled by
their count, and the table says what was run. ``--predict`` prints rows, operations and seconds at a rate, and runs
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from full_size_tables import Result, print_predictions, print_results, to_json
from full_size_work import SUBJECTS, Measurement, Settings, adapter, inputs_of, measure, recipe_of
from operations import Operations, count_operations, matrix_rate
from random_models import Execution
from sampling import share_within
from sessions import opened, under

METHODS = ("dancegrpo", "mixgrpo", "branchgrpo", "width_pruned", "depth_pruned", "mix")
MATRIX = {"cuda": 8192, "cpu": 1024}  # size of the product that tells a device's rate


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=[*SUBJECTS, "both"], default="both")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rollout-rows", type=int, help="predictions per forward of a rollout")
    parser.add_argument("--update-rows", type=int, help="predictions per forward and backward of the gradient pass")
    parser.add_argument("--iteration", type=int, help="which one is timed: windows move; half of the run by default")
    parser.add_argument("--attention", help="diffusers' attention back-end, such as _flash_3_hub or _native_cudnn")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    parser.add_argument("--no-decode", action="store_true")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--sample", type=float, help="share of the batches that is run, up to 1, the default")
    share.add_argument("--budget", type=float, help="seconds, from which the share follows")
    parser.add_argument("--predict", type=float, nargs="+", metavar="RATE", help="TFLOP/s; runs nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/full_size.json"), help="written after each method")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipes")
    arguments = parser.parse_intermixed_args(words)
    if arguments.sample is not None and not 0 < arguments.sample <= 1:
        parser.error(f"--sample is a share above 0 and up to 1, not {arguments.sample}")
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What changes the recipes."""
    return Settings(
        small=arguments.size == "small",
        prompts=arguments.prompts,
        rollout_rows=arguments.rollout_rows,
        update_rows=arguments.update_rows,
        execution=Execution(arguments.attention, arguments.compile),
        overrides=tuple(arguments.overrides),
    )


def run(name: str, arguments: argparse.Namespace, folder: Path, done: list[Result], deadline: float | None) -> None:
    """Time the methods on one model, adding each to ``done`` and to the file of results."""
    settings, methods = settings_of(arguments), arguments.methods
    recipes = {method: recipe_of(name, method, settings, folder) for method in methods}
    first = recipes[methods[0]]
    assert first.lora is not None
    operations = count_operations(adapter(name, first, settings), first.lora.rank)
    with opened(first, inputs_of(name, first, settings)) as session:
        rate = matrix_rate(session.device, MATRIX[session.device.type])
        iteration = first.run.iterations // 2 if arguments.iteration is None else arguments.iteration
        decoding = not arguments.no_decode
        sessions = {method: under(session, recipe) for method, recipe in recipes.items()}
        # One batch of each size: kernels are chosen, the allocator fills, and rates are known. Compiling takes so long
        # that every method's sizes have their turn.
        warming = methods if arguments.compile else methods[:1]
        trial = [measure(sessions[method], iteration, 0.0, decoding) for method in warming][-1]
        needed = {method: trial.expected(recipe, iteration) for method, recipe in recipes.items()}
        for place, method in enumerate(methods):
            left = None if deadline is None else deadline - time.perf_counter()
            share = arguments.sample or share_within(left, [needed[other] for other in methods[place:]])
            found = measure(sessions[method], iteration, share, decoding)
            done.append(result(name, method, found, operations, rate, session.device))
            print_results(done[-1:], heading=place == 0)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(to_json(done, arguments), indent=1), encoding="utf-8")


def result(
    name: str, method: str, found: Measurement, operations: Operations, rate: float, device: torch.device
) -> Result:
    """What was measured, with what it is compared with."""
    return Result(
        model=name,
        method=method,
        rollout=found.rollout,
        update=found.update,
        decode=found.decode,
        peak_bytes=found.peak_bytes,
        planned_bytes=found.planned_bytes,
        operations=operations,
        matrix_rate=rate,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )


def main(words: list[str] | None = None) -> list[Result]:
    """Print a table per model; returns its rows."""
    arguments = parse(words)
    names = list(SUBJECTS) if arguments.model == "both" else [arguments.model]
    done: list[Result] = []
    with TemporaryDirectory() as folder:
        if arguments.predict:
            for name in names:
                settings = settings_of(arguments)
                recipes = {method: recipe_of(name, method, settings, Path(folder)) for method in arguments.methods}
                print_predictions(name, recipes, adapter(name, next(iter(recipes.values())), settings), arguments)
            return done
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device is present; give --device cpu --size small, or --predict RATE")
        if arguments.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        deadline = None if arguments.budget is None else time.perf_counter() + arguments.budget
        for place, name in enumerate(names):
            left = None if deadline is None else deadline - time.perf_counter()
            until = None if left is None else time.perf_counter() + left / (len(names) - place)
            run(name, arguments, Path(folder), done, until)
    return done


if __name__ == "__main__":
    main()
