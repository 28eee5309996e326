"""A plug-in of somebody else's: found, used and trained with from the outside, or told about when it is broken."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from guests import Outcome, fake_distribution, run_command
from pydantic import BaseModel
from safetensors.torch import load_file

from branchtree import register
from branchtree.errors import PluginError, RecipeError
from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins.registry import Registry, collect_plugins, registry
from branchtree.recipe import find_recipe
from branchtree.run.directory import METRICS, RunDirectory

CPU = torch.device("cpu")
BROKEN = """
    raise ImportError("no module named 'frobnicate'")
"""


def rewards_module(name: str) -> str:
    return f"""
        from pydantic import BaseModel

        from branchtree.plugins.hookspecs import hookimpl

        @hookimpl
        def register_rewards(register):
            register("{name}", build=object, config=BaseModel, summary="made up")
    """


def rows(output: str, label: str) -> list[str]:
    """The cells of the first printed row that starts with ``label``."""
    line = next(line for line in output.splitlines() if re.match(rf"\W*{label}\b", line))
    return [cell.strip() for cell in re.split(r"│|\s{2,}", line) if cell.strip()]


def test_the_guest_is_listed(guest_site: Path) -> None:
    done = run_command("plugins", sites=[guest_site], fresh=True)
    assert (done.code, done.err) == (0, "")
    for kind, name in (("model", "guest_gaussian"), ("reward", "guest_brightness"), ("callback", "guest_best")):
        line = next(line for line in done.out.splitlines() if f" {name} " in line)
        assert line.split()[0] == kind
        assert line.split()[-1] == "branchtree-guest"


def test_the_guests_recipe_is_listed(
    guest_site: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    plug(guest_site)
    done = command("recipes")
    assert rows(done.out, "guest") == ["guest", "BranchGRPO teaches a Gaussian to be bright"]
    assert rows(done.out, "quickstart")[0] == "quickstart"


def test_the_guest_trains(guest_run: tuple[Outcome, Path]) -> None:
    done, output = guest_run
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    for name in ("recipe.yaml", "summary.json", "report.html", "final/denoiser.safetensors"):
        assert (output / name).is_file(), name
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["iteration_000010", "iteration_000020"]
    assert "guest_brightness" in (output / "report.html").read_text(encoding="utf-8")


def test_the_guests_reward_goes_up(guest_run: tuple[Outcome, Path]) -> None:
    _, output = guest_run
    rewards = [row["reward/guest_brightness/mean"] for row in RunDirectory(output).rows(METRICS)]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05
    before, after = (
        row["figures"]["guest_brightness"]["mean"] for row in RunDirectory(output).rows("evaluation.jsonl")
    )
    assert after > before + 0.1
    best = json.loads((output / "best.json").read_text())
    assert best["reward/guest_brightness/mean"] == max(rewards)
    assert best["iteration"] == rewards.index(max(rewards))


def test_the_plan_is_what_the_run_did(
    guest_run: tuple[Outcome, Path], guest_site: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    plug(guest_site)
    done = command("plan", "guest")
    assert done.code == 0
    first = RunDirectory(guest_run[1]).rows(METRICS)[0]
    for label, name in (
        ("rollout rows", "rows/rollout"),
        ("gradient rows", "rows/gradient"),
        ("trained edges", "edges/trained"),
        ("leaves", "leaves/scored"),
    ):
        assert float(rows(done.out, label)[2]) == first[name], label


def test_what_the_guest_exports_it_loads(
    guest_run: tuple[Outcome, Path], guest_site: Path, plug: Callable[[Path], None]
) -> None:
    plug(guest_site)
    entry = registry().model("guest_gaussian")
    model = entry.build(entry.config(path=guest_run[1] / "final"))
    model.load(CPU, torch.float32, torch.float32)
    saved = load_file(guest_run[1] / "checkpoints" / "iteration_000020" / "model" / "denoiser.safetensors")
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_the_guests_velocity_leads_from_noise_to_its_gaussian(guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)
    entry = registry().model("guest_gaussian")
    model = entry.build(entry.config(spread=0.5))
    model.load(CPU, torch.float32, torch.float32)
    torch.nn.init.constant_(model.denoiser.mean.bias, 0.3)
    noise = torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(3)])
    latents, sigmas, words = noise, model.sigmas(1000), {"words": torch.zeros(3, 16)}
    with torch.no_grad():
        for here, there in itertools.pairwise(sigmas):
            latents = latents + (there - here) * model.predict(latents, here.expand(3), words)
    # The exact flow between two Gaussians is the affine map between them.
    torch.testing.assert_close(latents, 0.3 + 0.5 * noise, atol=5e-3, rtol=0)


def test_the_plugins_of_the_page_are_found_and_trained_with(
    tmp_path: Path, guest_site: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    """Each block of docs/extending.md that is a module of its own; the others are files of the guest."""
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.sub(r"<!-- generated.*?<!-- end of", "", page, flags=re.DOTALL)
    blocks = re.findall(r"^```python\n(.*?)^```", shown, re.DOTALL | re.MULTILINE)
    codes = [block for block in blocks if "@hookimpl" in block]
    assert (len(blocks), len(codes)) == (4, 3)
    points = {f"page_{number}": f"page_{number}" for number in range(len(codes))}
    plug(guest_site)
    plug(fake_distribution(tmp_path / "site", "page", points, dict(zip(points, codes, strict=True))))
    rules = ("credit.estimator={name: powered, power: 2}", "loss.forward={name: weighted, power: 2}")
    changes = ("rewards.0.reward=brightness", *rules, "run.iterations=1")
    done = command("train", "guest", *changes, "--output", str(tmp_path / "run"), "--no-report")
    assert done.code == 0, done.err
    assert RunDirectory(tmp_path / "run").rows(METRICS)[0]["reward/brightness/mean"] > 0


def test_a_broken_plugin_takes_nothing_else_down(tmp_path: Path, guest_site: Path) -> None:
    broken = fake_distribution(tmp_path, "acme-models", {"acme": "acme_broken"}, {"acme_broken": BROKEN})
    listed = run_command("plugins", sites=[broken, guest_site])
    assert listed.code == 0
    assert "guest_gaussian" in listed.out
    assert "flux" in listed.out
    assert (
        "plug-in 'acme' of acme-models cannot be loaded: ImportError: no module named 'frobnicate'"
        in listed.out.strip()
    )
    assert "Traceback" not in listed.out + listed.err


@pytest.mark.parametrize(
    "arguments",
    [("guest", "model.adapter=acme_model"), ("guest", "callbacks.0.callback=acme_watch"), ("acme_recipe",)],
    ids=["model", "callback", "recipe"],
)
def test_asking_for_what_a_broken_plugin_brings_names_it(
    arguments: tuple[str, ...],
    tmp_path: Path,
    guest_site: Path,
    plug: Callable[[Path], None],
    command: Callable[..., Outcome],
) -> None:
    plug(guest_site)
    plug(fake_distribution(tmp_path, "acme-models", {"acme": "acme_broken"}, {"acme_broken": BROKEN}))
    done = command("train", *arguments, "--output", str(tmp_path / "run"))
    assert done.code == 2
    assert f"'{arguments[-1].rpartition('=')[2]}'" in done.err
    assert "plug-in 'acme' of acme-models cannot be loaded: ImportError: no module named 'frobnicate'" in done.err
    assert not (tmp_path / "run").exists()


def test_two_distributions_that_register_one_name_are_both_named(
    tmp_path: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    fake_distribution(tmp_path, "acme-rewards", {"acme": "acme_shine"}, {"acme_shine": rewards_module("shine")})
    plug(
        fake_distribution(tmp_path, "other-rewards", {"other": "other_shine"}, {"other_shine": rewards_module("shine")})
    )
    done = command("plugins")
    assert done.code == 2
    assert "two plug-ins register the reward 'shine': acme-rewards and other-rewards" in done.err


def test_two_distributions_with_one_entry_point_name_are_both_named(
    tmp_path: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    fake_distribution(tmp_path, "acme-rewards", {"shine": "acme_gloss"}, {"acme_gloss": rewards_module("gloss")})
    plug(fake_distribution(tmp_path, "other-rewards", {"shine": "other_glow"}, {"other_glow": rewards_module("glow")}))
    done = command("plugins")
    assert done.code == 2
    assert "two plug-ins are named 'shine': one of acme-rewards, one of other-rewards" in done.err


def test_a_misspelt_hook_is_named_with_the_nearest(
    tmp_path: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    code = rewards_module("shine").replace("register_rewards", "register_reward")
    plug(fake_distribution(tmp_path, "acme-rewards", {"acme": "acme_misspelt"}, {"acme_misspelt": code}))
    done = command("plugins")
    assert done.code == 2
    assert "plug-in 'acme' of acme-rewards has an unknown hook 'register_reward'" in done.err
    assert "did you mean 'register_rewards'?" in done.err


def test_a_distribution_without_metadata_is_passed_over(tmp_path: Path, plug: Callable[[Path], None]) -> None:
    (tmp_path / "leftover-1.0.dist-info").mkdir()
    plug(tmp_path)
    assert "flux" in registry().models


class Config(BaseModel):
    pass


def plugin(**hooks: Callable[..., None]) -> Callable[[], ModuleType]:
    """A loader of a module with these functions as hooks."""
    module = ModuleType("made_up")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return lambda: module


def adds(name: str) -> Callable[..., None]:
    def hook(register: Callable[..., None]) -> None:
        register(name, build=dict, config=Config, summary=f"the {name}")

    return hook


def gather(**plugins: Callable[[], object]) -> Registry:
    return collect_plugins([((name, f"{name}-dist"), load) for name, load in plugins.items()])


def test_collect_files_each_kind_with_its_distribution(tmp_path: Path) -> None:
    def folder(register: Callable[[Path], None]) -> None:
        register(tmp_path)

    found = gather(
        one=plugin(register_models=adds("m"), register_callbacks=adds("c")),
        two=plugin(register_rewards=adds("r"), register_recipes=folder),
    )
    assert (found.model("m").distribution, found.callback("c").summary) == ("one-dist", "the c")
    assert found.reward("r").distribution == "two-dist"
    assert (found.recipe_folders, found.broken) == ([tmp_path], [])


def test_the_same_name_may_stand_for_a_model_and_a_reward() -> None:
    found = gather(one=plugin(register_models=adds("x")), two=plugin(register_rewards=adds("x")))
    assert (found.model("x").distribution, found.reward("x").distribution) == ("one-dist", "two-dist")


def test_an_unknown_name_comes_with_the_nearest_and_all() -> None:
    found = gather(one=plugin(register_rewards=adds("brightness")), two=plugin(register_rewards=adds("motion")))
    with pytest.raises(PluginError, match=re.escape("did you mean 'brightness'? Known: brightness, motion.")):
        found.reward("brightnes")
    with pytest.raises(PluginError, match=re.escape("no model 'brightness' is installed. Known: none.")):
        found.model("brightness")


def raises(register: Callable[..., None]) -> None:
    raise OSError("no such library")


def takes_something_else(registry: Callable[..., None]) -> None:
    """A hook whose parameter has another name than the hook's specification."""


def registers_without_a_config(register: Callable[..., None]) -> None:
    register("half", build=dict)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (raises, "OSError: no such library"),
        (takes_something_else, "PluginValidationError"),
        (registers_without_a_config, "TypeError"),
    ],
)
def test_a_hook_that_fails_breaks_its_own_plugin_alone(hook: Any, message: str) -> None:
    found = gather(bad=plugin(register_models=hook), good=plugin(register_models=adds("fine")))
    assert found.model("fine").distribution == "good-dist"
    assert message in str(found.broken[0])
    with pytest.raises(PluginError, match="plug-in 'bad' of bad-dist cannot be loaded"):
        found.model("half")


def test_two_recipes_of_one_name_are_both_named(tmp_path: Path) -> None:
    files = [tmp_path / folder / "same.yaml" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text(yaml.safe_dump({"seed": 1}))
    with pytest.raises(RecipeError, match=re.escape(f"two recipes are named 'same': {files[0]} and {files[1]}")):
        find_recipe("same", [file.parent for file in files])


def test_a_notebook_can_register_what_it_defines(guest_site: Path, plug: Callable[[Path], None]) -> None:
    """Again under the same name, as when a cell is run twice; a name that is another's stays so."""
    plug(guest_site)
    module = ModuleType("notebook")
    exec(textwrap.dedent(rewards_module("mine")), module.__dict__)
    for _ in range(2):
        register(module)
        assert registry().reward("mine").distribution == "this process"
    other = ModuleType("another")
    exec(textwrap.dedent(rewards_module("guest_brightness")), other.__dict__)
    with pytest.raises(PluginError, match="two plug-ins register the reward 'guest_brightness'"):
        register(other)
    assert "mine" not in registry().rewards and registry().reward("guest_brightness").distribution == "branchtree-guest"
