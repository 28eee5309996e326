"""What a user is told when something is wrong: one message with the place and the remedy, and no work half done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from guests import Outcome, fake_distribution, run_command

from branchtree.errors import (
    BranchTreeError,
    CheckpointError,
    DataError,
    ModelError,
    OutputError,
    PluginError,
    RecipeError,
    RewardError,
    nearest,
)

FAILING = """
    import torch
    from pydantic import BaseModel

    from branchtree.data.frames import first_frame, last_frame
    from branchtree.plugins.hookspecs import hookimpl
    from branchtree.core.scores import Scores
    from branchtree_guest.model import GuestGaussian, GuestGaussianConfig


    class Config(BaseModel):
        pass


    class Reward:
        modalities = frozenset({"image"})

        def __init__(self, config):
            pass

        def load(self, device):
            pass


    class Raises(Reward):
        def score(self, media, conditions):
            raise ConnectionError("the judge does not answer")


    class Nan(Reward):
        def score(self, media, conditions):
            return Scores(torch.full((len(media),), torch.nan), torch.ones(len(media), dtype=torch.bool))


    class Short(Reward):
        def score(self, media, conditions):
            return Scores(torch.zeros(1), torch.ones(1, dtype=torch.bool))


    class Unloadable(Reward):
        def load(self, device):
            raise FileNotFoundError("judge.safetensors")


    class Film(Reward):
        modalities = frozenset({"video"})


    class Framed(GuestGaussian):
        def check(self, condition):
            first_frame(condition)
            last_frame(condition)

        def load(self, device, dtype, denoiser_dtype):
            raise SystemExit("loaded before the frames were looked at")


    @hookimpl
    def register_models(register):
        register("framed", build=Framed, config=GuestGaussianConfig, summary="reads frames")


    @hookimpl
    def register_rewards(register):
        for build in (Raises, Nan, Short, Unloadable, Film):
            register(f"failing_{build.__name__.lower()}", build=build, config=Config, summary="fails")
"""


@pytest.fixture(scope="session")
def failing_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("failing_site")
    return fake_distribution(site, "failing-rewards", {"failing": "failing_rewards"}, {"failing_rewards": FAILING})


@dataclass(frozen=True)
class Desk:
    """Where a user works: a folder, and the command line with the guest and the failing rewards installed."""

    folder: Path
    command: Callable[..., Outcome]

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def refused(self, *arguments: str) -> str:
        """The one message of a training command that is refused before anything is written."""
        message = self.failed("train", *arguments, "--output", str(self.output))
        assert not self.output.exists()
        return message

    def failed(self, *arguments: str) -> str:
        done = self.command(*arguments)
        assert done.code == 2, done
        return told(done)


def told(done: Outcome) -> str:
    """The message on standard error: one, and no traceback."""
    assert "Traceback" not in done.out + done.err
    assert done.err.startswith("error: ")
    assert done.err.count("error: ") == 1
    return done.err.removeprefix("error: ").strip()


@pytest.fixture
def desk(
    guest_site: Path,
    failing_site: Path,
    tmp_path: Path,
    plug: Callable[[Path], None],
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    plug(guest_site)
    plug(failing_site)
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, command)


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- in processes of their own: what a shell sees ---


def test_a_shell_sees_one_message_and_exit_code_2(guest_site: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: guest\n\noptim:\n  learning_rate: 1e-3\n  warmop: 3\n")
    done = run_command("train", str(recipe), "--output", str(output), sites=[guest_site], fresh=True)
    assert done.code == 2
    assert done.out.strip() == ""
    message = told(done).splitlines()
    assert message[0].startswith(f"{recipe}:4: optim.learning_rate: unknown key 'learning_rate'")
    assert message[1].startswith(
        f"{recipe}:5: optim.warmop: unknown key 'warmop'; did you mean 'warmup'? Known: betas,"
    )
    assert not output.exists()


def test_a_shell_sees_which_reward_failed(guest_site: Path, failing_site: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("train", "guest", "rewards.0.reward=failing_raises", "--output", str(output))
    done = run_command(*arguments, sites=[guest_site, failing_site])
    assert done.code == 2
    assert told(done) == "reward 'failing_raises' failed: ConnectionError: the judge does not answer"


# --- refused before anything is written ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guest", "optim.lrr=1"], "override optim.lrr=1: optim.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        (["guest", "tree.steps=many"], "override tree.steps=many: tree.steps: input should be a valid integer"),
        (["guest", "lr"], "override 'lr': write it as key=value, for example optim.lr=2e-5"),
        (["guest", "tree.splits=[0, 7]"], "split step 7 lies outside the grid: with 8 steps, steps 0 to 6 can split"),
        (["guest", "tree.branches=1"], "override tree.branches=1: tree.branches: a split needs at least 2 children"),
        (["gest"], "no recipe 'gest'; did you mean 'guest'? Known: "),
        (["gest.yaml"], "no recipe file gest.yaml"),
        (["guest", "model.adapter=guest_gaus"], "no model 'guest_gaus' is installed; did you mean 'guest_gaussian'?"),
        (["guest", "rewards.0.reward=guest_br"], "no reward 'guest_br' is installed; did you mean 'guest_brightness'?"),
        (["guest", "callbacks.0.callback=best"], "no callback 'best' is installed; did you mean 'guest_best'?"),
        (["guest", "model.spred=2"], "model.spred: unknown key 'spred'; did you mean 'spread'? Known: path, spread."),
        (["guest", "rewards.0.target=2"], "rewards.0.target: input should be less than or equal to 1 (it is 2)"),
        (["guest", "rewards.0.reward=failing_film"], "reward 'failing_film' scores video, but the model makes images; "
            "'branchtree rewards' lists those that score images"),
        (["guest", "model.path=nowhere"], "/nowhere'; name a folder that holds"),
        (["guest", "lora.rank=4", "lora.targets=[nothing]"], "LoRA target 'nothing' names no linear layer"),
        (["guest", "sampler.kind=ddim"], "sampler.kind: 'ddim' does not suit a model that predicts velocity; use"),
        (["guest", "data.prompts=p.txt"], "/p.txt; set data.prompts to a .txt, .jsonl or .parquet file"),
        (["guest", "data.prompts=[]"], "the list of prompts: holds no prompts; write at least one"),
        (["guest", "run.trackers=[no_such]"], "run.trackers: 'no_such' is not installed; installed: "),
        (["guest", "rewards.0.reward=failing_unloadable"], "reward 'failing_unloadable' cannot be loaded: FileNot"),
        (["guest", "--resume"], "run: holds no run to resume; leave out --resume to start one"),
        (["quickstart_single", "--smoke", "model.adapter=flx"], "no model 'flx' is installed; did you mean 'flux'?"),
    ],
)  # fmt: skip
def test_it_is_refused_with_place_and_remedy(arguments: list[str], message: str, desk: Desk) -> None:
    assert message in desk.refused(*arguments)


def test_a_plan_refuses_a_reward_that_does_not_score_what_the_model_makes(desk: Desk) -> None:
    for at in ("rewards.0", "evaluation.rewards.0"):
        message = desk.failed("plan", "guest", f"{at}.reward=failing_film")
        assert f"{at}: reward 'failing_film' scores video, but the model makes images" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "p.txt: holds no prompts; write at least one"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not valid JSON"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl:1: needs a non-empty text under 'prompt'; it has text"),
        ("p.txt", b"\xff\n", "p.txt:1: is not UTF-8 text: byte 0xff"),
    ],
)
def test_a_bad_prompt_file_is_placed(name: str, content: str | bytes, message: str, desk: Desk) -> None:
    path = desk.write(name, content)
    before = everything(desk.folder)
    assert desk.refused("guest", f"data.prompts={path}").startswith(f"{desk.folder}/{message}")
    assert desk.refused("guest", f"evaluation.prompts={path}").startswith(f"{desk.folder}/{message}")
    assert everything(desk.folder) == before


# Each file of this name and content is refused with this message.
BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("image", None, "there is no file '{file}'"),
    "empty": ("image", b"", "file '{file}' is empty (0 bytes)"),
    "no image": ("image", b"a picture of a cat", "file '{file}' is no image; give a PNG or JPEG file"),
    "truncated": ("last_image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1", "image '{file}' cannot be read: "),
    "text": ("video", b"a video of a cat\n" * 9, "video '{file}' cannot be opened: it is no video"),
    "empty video": ("video", b"", "file '{file}' is empty (0 bytes)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_a_bad_file_is_placed_before_anything_is_loaded(case: str, section: str, desk: Desk) -> None:
    key, content, message = BAD_FILES[case]
    file = desk.folder / f"x.{'mp4' if key == 'video' else 'png'}"
    if content is not None:
        file.write_bytes(content)
    prompts = desk.write("p.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "b", "{key}": "{file.name}"}}\n')
    before = everything(desk.folder)
    arguments = ("guest", "model.adapter=framed", f"{section}.prompts={prompts}")
    expected = f"{prompts}:2: 'b': {message.format(file=file)}"
    assert desk.refused(*arguments).startswith(expected)
    assert desk.failed("plan", *arguments).startswith(expected)
    assert everything(desk.folder) == before


@pytest.mark.parametrize("value", ["../x.png", "/etc/hostname", "link/x.png"])
def test_a_path_out_of_the_data_folder_is_placed(value: str, desk: Desk) -> None:
    (desk.folder / "set").mkdir()
    (desk.folder / "set" / "link").symlink_to(desk.folder)
    prompts = desk.write("set/p.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "b", "image": "{value}"}}\n')
    for command in (desk.refused, lambda *words: desk.failed("plan", *words)):
        message = command("guest", f"data.prompts={prompts}")
        assert message.startswith(f"{prompts}:2: image '{value}' lies outside the data folder '{prompts.parent}'")


def test_bad_files_are_told_together(desk: Desk) -> None:
    rows = "".join(f'{{"prompt": "p{n}", "image": "{n}.png"}}\n' for n in range(9))
    prompts = desk.write("p.jsonl", rows)
    lines = desk.refused("guest", "model.adapter=framed", f"data.prompts={prompts}").splitlines()
    told_of = [f"{prompts}:{n + 1}: 'p{n}': there is no file '{desk.folder / f'{n}.png'}'" for n in range(5)]
    assert lines == [*told_of, "and 4 more"]


def test_a_data_folder_that_is_missing_is_named(desk: Desk) -> None:
    prompts = desk.write("p.jsonl", '{"prompt": "a"}\n')
    message = desk.refused("guest", f"data.prompts={prompts}", "data.folder=nowhere")
    assert message.startswith("data.folder: no folder /") and message.endswith("/nowhere")


def test_a_model_that_takes_no_negative_prompt_says_where_one_is(desk: Desk) -> None:
    prompts = desk.write("p.jsonl", '{"prompt": "a one"}\n{"prompt": "a two", "negative_prompt": "blur"}\n')
    message = desk.refused("quickstart", f"data.prompts={prompts}")
    assert message == f"{prompts}:2: 'a two' has a negative prompt, which flux does not take; remove it."


def test_the_plan_refuses_what_training_would(desk: Desk) -> None:
    assert "no model 'x' is installed" in desk.failed("plan", "guest", "model.adapter=x")
    assert "/nowhere'; name a folder that holds" in desk.failed("plan", "guest", "model.path=nowhere")
    assert "/p.txt; set data.prompts to" in desk.failed("plan", "guest", "data.prompts=p.txt")
    assert "lies outside the grid" in desk.failed("plan", "guest", "tree.steps=4")


def test_two_rewards_of_one_label_are_told_apart_or_refused(desk: Desk) -> None:
    both = "rewards=[{reward: guest_brightness}, {reward: guest_brightness, target: 0.5}]"
    assert "rewards.1: two rewards are labelled 'guest_brightness'; give one a 'label'" in desk.refused("guest", both)


def test_an_output_that_cannot_be_written_is_told_before_the_run(desk: Desk) -> None:
    file = desk.write("file", "precious")
    for output in (file, file / "run", file / "deep" / "run"):
        message = desk.failed("train", "guest", "--output", str(output))
        assert message.startswith(f"{output}: cannot be written: ")
        assert message.endswith("choose another --output")
    assert everything(desk.folder) == {file: b"precious"}


def test_a_run_is_not_written_over(desk: Desk, guest_run: tuple[Outcome, Path]) -> None:
    output = guest_run[1]
    before = everything(output)
    message = desk.failed("train", "guest", "--output", str(output))
    assert message == f"{output}: already holds a run; continue it with --resume, or choose another --output"
    assert everything(output) == before


def test_a_run_is_continued_by_its_own_recipe_alone(desk: Desk, guest_run: tuple[Outcome, Path]) -> None:
    output = guest_run[1]
    before = everything(output)
    message = desk.failed("train", "guest", "optim.lr=1.0", "--resume", "--output", str(output))
    assert "iteration_000020 was written under another recipe: optim.lr was 0.05 and is 1.0. Use the same" in message
    assert message.endswith("or another --output, or, to go on with what changed, add --allow optim.lr")
    assert everything(output) == before


# --- found only when the first samples are scored ---


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "reward 'failing_raises' failed: ConnectionError: the judge does not answer"),
        ("nan", "reward 'failing_nan' gave no valid value for 16 of 16 samples of the last iteration (100%; "),
        ("short", "its 'values' has the shape (1,), not (8,)"),
    ],
)
def test_a_reward_that_fails_ends_the_run_and_can_be_put_right(reward: str, message: str, desk: Desk) -> None:
    arguments = ("train", "guest", "run.iterations=1", "run.checkpoint_every=1", "--output", str(desk.output))
    assert message in desk.failed(*arguments, f"rewards.0.reward=failing_{reward}")
    assert not desk.output.exists()
    assert desk.command(*arguments, "--no-report").code == 0


# --- the errors themselves ---


def test_every_error_is_a_branchtree_error() -> None:
    for kind in (RecipeError, PluginError, DataError, ModelError, RewardError, CheckpointError, OutputError):
        assert issubclass(kind, BranchTreeError)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("digts", ["digits", "motion"], "; did you mean 'digits'? Known: digits, motion."),
        ("zzz", ["digits", "motion"], ". Known: digits, motion."),
        ("x", [], ". Known: none."),
    ],
)
def test_the_nearest_name_is_offered(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
