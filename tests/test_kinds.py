"""Samples that are neither images nor videos, sent to a reward elsewhere, scored from files and compared: as commands.

They are those of the examples, tokens and actions, installed as strangers' packages.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from guests import Outcome, fake_distribution
from reward_servers import TOKEN, VARIABLE, Process
from safetensors.torch import load_file, save_file
from test_samples import STRANGER
from torch import Tensor
from training_runs import arguments

from branchtree import load_recipe, score
from branchtree.errors import DataError
from branchtree.plugins import Condition, Media, RewardAdapter, Samples
from branchtree.plugins.registry import registry
from branchtree.plugins.saved import make_samples, read_samples, write_samples
from branchtree.recipe.build import make_reward
from branchtree.serving.wire import decode_request, encode_request

SHORT = {"batch.prompts": 2, "run.iterations": 1, "run.sample_prompts": 3, "run.tree_every": None, "optim.warmup": 0}


@pytest.fixture
def installed(examples_site: Path, plug: Callable[[Path], None]) -> None:
    plug(examples_site)


@pytest.fixture(scope="module")
def servers(examples_site: Path) -> Iterator[dict[str, Process]]:
    """``branchtree serve-reward`` for a reward of each example."""
    with Process("addition", site=examples_site) as addition, Process("reach", site=examples_site) as reach:
        for process in (addition, reach):
            process.await_ready()
        yield {"addition": addition, "reach": reach}
        for process in (addition, reach):
            process.send(signal.SIGTERM)
            assert process.ended() == 0


@pytest.fixture
def train(command: Callable[..., Outcome], installed: None, tmp_path: Path) -> Callable[..., Path]:
    """Run ``branchtree train`` on a recipe with changes, without held-out figures, and return its directory."""

    def run(recipe: str, name: str, **changes: Any) -> Path:
        words = arguments({**SHORT, "evaluation": None, **changes})
        outcome = command("train", recipe, *words, "--output", str(tmp_path / name), "--no-report")
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return run


def loaded(name: str, **options: Any) -> RewardAdapter:
    reward, _ = make_reward(name, options, (name,))
    reward.load(torch.device("cpu"))
    return reward


def values(run: Path, reward: str) -> list[float]:
    """A reward's scores of the samples that a run kept, from its own class and the recipe's prompts."""
    recipe = load_recipe(run / "recipe.yaml")
    [file] = (run / "samples").glob("iteration_000001.safetensors")
    rows = [json.loads(line) for line in Path(str(recipe.data.prompts)).read_text().splitlines()[:3]]
    conditions = [Condition(row.pop("prompt"), metadata=row) for row in rows]
    kind = {"addition": "text", "unicycle": "unicycle_actions"}[recipe.name]
    fields = {"task": "unicycle"} if kind != "text" else {}
    samples = make_samples(kind, load_file(file), fields)
    found: list[float] = loaded(reward).score(samples, conditions).values.tolist()
    return found


# A reward elsewhere


@pytest.mark.parametrize(("recipe", "reward"), [("addition", "addition"), ("unicycle", "reach")])
def test_a_run_with_a_remote_reward_is_that_of_the_reward_itself(
    recipe: str,
    reward: str,
    train: Callable[..., Path],
    servers: dict[str, Process],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its metrics to the byte; the server knows what it gets, with fields that are no tensors and with metadata."""
    monkeypatch.setenv(VARIABLE, TOKEN)
    remote = {"reward": "remote", "label": reward, "url": servers[reward].url, "token_env": VARIABLE}
    here = train(recipe, "here", rewards=[{"reward": reward}])
    there = train(recipe, "there", rewards=[remote])
    assert (there / "metrics.jsonl").read_bytes() == (here / "metrics.jsonl").read_bytes()
    assert f'"reward/{reward}/mean"' in (here / "metrics.jsonl").read_text()


def test_bytes_are_for_pixels_alone(
    command: Callable[..., Outcome], installed: None, servers: dict[str, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)
    rewards = [{"reward": "remote", "url": servers["addition"].url, "token_env": VARIABLE, "pixels": "uint8"}]
    outcome = command("train", "addition", *arguments({**SHORT, "rewards": rewards}))
    assert outcome.code == 2
    assert "uint8 is for images and videos" in outcome.err and "scores text; leave it out" in outcome.err


@pytest.fixture
def stranger(tmp_path: Path, plug: Callable[[Path], None]) -> None:
    """A plug-in that registers a model and a reward, but not the kind of samples."""
    plug(fake_distribution(tmp_path / "stranger", "acme-walks", {"acme": "acme_walks"}, {"acme_walks": STRANGER}))


def test_a_kind_that_no_plug_in_registers_stays_here(
    stranger: None, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The server says so before anything is sent, and a plan does on the client's side; files name it too."""
    outcome = command("serve-reward", "arrives", "--port", "0")
    assert outcome.code == 2 and "reward 'arrives' cannot be served" in outcome.err
    assert "no plug-in here registers the samples 'walk' (hook register_samples)" in outcome.err
    recipe = {"model": {"adapter": "walker"}, "rewards": [{"reward": "remote", "url": "http://127.0.0.1:1"}]}
    (tmp_path / "walk.yaml").write_text(json.dumps({**recipe, "data": {"prompts": ["go"]}}))
    outcome = command("plan", str(tmp_path / "walk.yaml"))
    assert outcome.code == 2 and "'remote' does once a plug-in registers the kind 'walk'" in outcome.err
    save_file({"points": torch.zeros(1, 2)}, tmp_path / "walks.safetensors", {"modality": "walk", "fields": "{}"})
    outcome = command("score", str(tmp_path / "walks.safetensors"), "--reward", "arrives")
    assert outcome.code == 2 and "no plug-in here registers the samples 'walk'" in outcome.err


def test_kinds_are_listed(command: Callable[..., Outcome], installed: None) -> None:
    lines = [line.split() for line in command("plugins").out.splitlines()]
    assert {line[1] for line in lines if line[:1] == ["samples"]} >= {"image", "video", "grid", "text", "pusht_actions"}


@pytest.mark.parametrize(
    ("fields", "tensors", "reason"),
    [
        ({}, {}, "task: "),
        ({"task": "unicycle", "rate": 2}, {}, "rate: Unexpected"),
        ({"task": "unicycle", "actions": [1, 2]}, {"actions": None}, "actions: Input should be an instance of Tensor"),
        ({"task": "pusht"}, {}, "samples 'pusht_actions', not 'unicycle_actions'"),
        ({"task": "unicycle"}, {"actions": torch.zeros(0, 16, 2)}, "of equally many samples"),
        ({"task": "unicycle"}, {"actions": torch.zeros(())}, "TypeError"),
    ],
)
def test_what_makes_no_samples_is_refused(
    fields: dict[str, Any], tensors: dict[str, Tensor | None], reason: str, installed: None
) -> None:
    """Whoever sends it, and before the class sees it where its annotations tell."""
    given = {"actions": torch.zeros(1, 16, 2), **tensors}
    with pytest.raises(DataError, match=reason):
        make_samples("unicycle_actions", {name: value for name, value in given.items() if value is not None}, fields)


@dataclass(frozen=True)
class Notes(Samples):
    """All that a field can be."""

    pitch: Tensor
    codes: Tensor
    words: tuple[str, ...]
    rate: float
    mask: Tensor | None = None
    origin: Path | None = None
    modality = "notes"


def test_every_field_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over the wire and in a file: NaN, half precision, texts of each sample, what holds for all, and what is None."""
    monkeypatch.setitem(registry().samples, "notes", registry().samples["image"].__class__("notes", Notes, *[None] * 3))
    pitch = torch.tensor([[0.1, math.nan], [-0.0, 1e-45]])
    notes = Notes(pitch, torch.tensor([[3], [2**40]]), ("a", "é\n"), 0.1, origin=Path("x/y"))
    conditions = [Condition("p", "n", metadata={"a": [1, {"b": 0.1}]}, image=tmp_path / "none.png"), Condition("q")]
    write_samples(tmp_path / "notes.safetensors", notes, conditions)
    read, kept = read_samples(tmp_path / "notes.safetensors")
    request = decode_request(encode_request(notes, conditions), tmp_path)
    for found, listed in ((read, kept), (request.media, request.conditions)):
        assert isinstance(found, Notes)
        assert torch.equal(found.pitch.view(torch.int32), pitch.view(torch.int32))
        assert torch.equal(found.codes, notes.codes) and found.codes.dtype == torch.int64
        assert (found.words, found.rate, found.mask, found.origin) == (("a", "é\n"), 0.1, None, Path("x/y"))
        assert [(each.prompt, each.negative_prompt, each.metadata) for each in listed] == [
            ("p", "n", {"a": [1, {"b": 0.1}]}),
            ("q", None, {}),
        ]
    assert kept == tuple(conditions)


# Files


@pytest.mark.parametrize(("recipe", "reward"), [("addition", "addition"), ("unicycle", "reach")])
def test_what_a_run_kept_is_scored(
    recipe: str, reward: str, train: Callable[..., Path], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Under the conditions that the file has, in one batch or in several."""
    run = train(recipe, "run")
    file, output = run / "samples" / "iteration_000001.safetensors", tmp_path / "scores.jsonl"
    outcome = command("score", str(file), "--reward", reward, "--output", str(output), "--batch", "2")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["scores"][reward]["value"] for row in rows] == values(run, reward)
    assert [row["file"] for row in rows] == [f"{file}[{index}]" for index in range(3)]
    assert {row["kind"] for row in rows} == {"text" if recipe == "addition" else "unicycle_actions"}
    assert all(row["metadata"] for row in rows)


def test_a_list_gives_prompts_and_metadata(installed: None, tmp_path: Path) -> None:
    """Where the file has none, or in their place."""
    kind = registry().kind("text")
    digits = torch.tensor([[1, 2, 3, 10, 4, 5, 6, 11, 0, 5, 7, 9], [1, 2, 3, 10, 4, 5, 6, 11, 0, 5, 7, 8]])
    sums = kind.unpack({"tokens": digits, "ages": torch.ones_like(digits)}, {})
    write_samples(tmp_path / "bare.safetensors", sums, [])
    write_samples(tmp_path / "kept.safetensors", sums, [Condition("1 + 1", metadata={"a": 1, "b": 1})] * 2)
    (tmp_path / "list.jsonl").write_text(
        '{"samples": "bare.safetensors", "prompt": "123 + 456", "a": 123, "b": 456}\n'
        '{"samples": "kept.safetensors"}\n'
        '{"samples": "kept.safetensors", "a": 123, "b": 456}\n'
    )
    scored = score(tmp_path / "list.jsonl", ["addition"], prompt="a sum")
    assert [one.scores["addition"].value for one in scored] == [1, 0.75, 0.25, 0.25, 1, 0.75]
    assert [one.prompt for one in scored] == ["123 + 456"] * 2 + ["1 + 1"] * 4
    [again, *_] = score(
        {"samples": str(tmp_path / "bare.safetensors"), "a": 0, "b": 579}, ["addition measure=exact"], prompt="p"
    )
    assert (again.prompt, again.metadata, again.scores["addition"].value) == ("p", {"a": 0, "b": 579}, 1)


def test_files_that_cannot_be_scored_say_why(installed: None, command: Callable[..., Outcome], tmp_path: Path) -> None:
    zeros = torch.zeros(2, 12, dtype=torch.int64)
    sums = registry().kind("text").unpack({"tokens": zeros, "ages": zeros}, {})
    good = tmp_path / "sums.safetensors"
    write_samples(good, sums, [Condition("a")] * 2)
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    save_file(
        {"tokens": torch.zeros(2, 12), "ages": torch.zeros(2, 12)},
        tmp_path / "few.safetensors",
        {"modality": "text", "conditions": '[{"prompt": "a"}]'},
    )
    save_file({"letters": torch.zeros(2, 12)}, tmp_path / "other.safetensors", {"modality": "text"})
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-3])
    (tmp_path / "list.jsonl").write_text('{"samples": "none.safetensors"}\n')
    for name, reward, reason in [
        ("sums.safetensors", "digits", f"reward 'digits' scores images and videos, but '{good}[0]' is a text"),
        ("sums.safetensors", "sudoku", f"reward 'sudoku' scores grids, but '{good}[0]' is a text"),
        ("weights.safetensors", "addition", "holds no samples: its metadata have no 'modality'"),
        ("few.safetensors", "addition", "has 2 samples and 1 conditions"),
        ("other.safetensors", "addition", "makes no samples 'text'"),
        ("cut.safetensors", "addition", "is no whole safetensors file"),
        ("none.safetensors", "addition", "there is no file"),
        ("list.jsonl", "addition", "list.jsonl:1: there is no file"),
        ("", "addition", f"name its files of samples one by one, as in '{tmp_path / 'cut.safetensors'}'"),
    ]:
        outcome = command("score", str(tmp_path / name), "--reward", reward, "--prompt", "a")
        assert outcome.code == 2 and reason in outcome.err, (name, outcome.err)


# Other commands


def test_tokens_are_compared_by_their_own_numbers(
    installed: None, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    words = ["diversity", "addition", "--samples", "64", "--output", str(tmp_path)]
    outcome = command(*words, "--features", "pixels")
    assert outcome.code == 2
    assert (
        "features 'pixels' are of images, videos, but the model makes texts; 'tensors' takes any samples" in outcome.err
    )
    assert command(*words, "--features", "tensors").code == 0
    found = json.loads((tmp_path / "diversity.json").read_text())
    branched = found["within_group_distance"][0]["spreads"]
    # Clean latents of this model are its tokens: two ways to the same distance.
    assert (
        branched["tensors"]["mean"] == pytest.approx(branched["latents"]["mean"], rel=1e-5) and found["discrepancies"]
    )
    with torch.no_grad():
        space = registry().feature("tensors").build(None)
        space.load(torch.device("cpu"))
        assert torch.equal(space.features(Media(images=torch.ones(2, 3, 1, 1))), torch.ones(2, 3))


def test_noise_is_no_sample_of_another_kind() -> None:
    from branchtree.testing import noise_media

    with pytest.raises(ValueError, match="give the case a function 'media' that makes samples 'grid'"):
        noise_media("grid", 4)
