"""What the commands print: text as it is, on terminals that show less than Unicode too, and never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from guests import Outcome, fake_distribution
from hypothesis import example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from strategies import thorough

from branchtree.cli import main
from branchtree.cli.console import make_console, visible
from branchtree.cli.display import ProgressDisplay, figures_table
from branchtree.data.frames import first_frame
from branchtree.errors import DataError
from branchtree.plugins import Condition
from branchtree.training.evaluation import Figure

MARKUP = "[bold]x[/red] :cat: \\[a]"
"""Text that rich would take for markup, for an error in markup, and for a picture of a cat."""


def run(*arguments: str, encoding: str = "utf-8", errors: str = "strict") -> Outcome:
    """Run ``branchtree`` in this process, with standard output of an encoding that raises errors, as Python's does."""
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace", write_through=True)
    with (
        mock.patch.object(sys, "argv", ["branchtree", *arguments]),
        mock.patch.dict(os.environ, {"COLUMNS": "160"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    written = [stream.buffer.getvalue().decode(encoding, "replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return Outcome(code, *written)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- encodings ---


@pytest.fixture
def foreign(here: Path) -> Path:
    """A recipe, and a picture with its prompt, of characters that most encodings lack."""
    (here / "r.yaml").write_text("extends: quickstart\ndescription: 描述 🐈 é\n", encoding="utf-8")
    Image.new("RGB", (28, 28)).save(here / "猫.png")
    (here / "l.jsonl").write_text('{"image": "猫.png", "prompt": "一只猫 🐈 3"}\n', encoding="utf-8")
    return here


@pytest.mark.parametrize(
    ("encoding", "description", "top"),
    [
        ("utf-8", "r: 描述 🐈 é", "┬━━━━━━━━┬"),
        ("cp1252", "r: ?? ? é", "+========+"),
        ("ascii", "r: ?? ? ?", "+========+"),
        ("gbk", "r: 描述 ? é", "+========+"),
    ],
)
def test_a_plan_can_be_printed_in_any_encoding(encoding: str, description: str, top: str, foreign: Path) -> None:
    done = run("plan", "r.yaml", encoding=encoding)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == description
    assert top in done.out
    words = "heavy: stochastic steps, light: det" if encoding == "utf-8" else "=: stochastic steps, -: deterministic"
    assert words in done.out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "koi8-r"])
@pytest.mark.parametrize(
    "arguments", [("recipes",), ("plugins",), ("rewards",), ("score", "l.jsonl", "-r", "digits"), ("train", "--help")]
)
def test_tables_can_be_printed_in_any_encoding(arguments: Sequence[str], encoding: str, foreign: Path) -> None:
    done = run(*arguments, encoding=encoding)
    assert done.code == 0, done.err
    assert done.out.strip()


def test_a_message_can_be_printed_in_any_encoding(foreign: Path) -> None:
    done = run("plan", "猫", encoding="cp1252")
    assert done.code == 2 and done.err.startswith("error: no recipe '\\u732b'.")
    done = run("plan", "r.yaml", "data.prompts=猫.txt", encoding="ascii")
    assert done.code == 2 and done.err.startswith("error: no prompt file ") and "\\u732b.txt; " in done.err


def test_the_stream_of_a_c_locale_can_show_a_plan(foreign: Path) -> None:
    """Python lets it write back the bytes of arguments, and still has it raise an error for every other character."""
    done = run("plan", "r.yaml", encoding="ascii", errors="surrogateescape")
    assert (done.code, done.err) == (0, "")
    assert "+========+" in done.out


# --- markup ---


def printed(show: Callable[[Console], None]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        console = make_console()
        console.width = 200
        show(console)
    return out.getvalue()


def test_a_console_takes_no_text_for_markup() -> None:
    assert printed(lambda console: console.print(MARKUP)) == f"{MARKUP}\n"
    figures = {MARKUP: Figure(0.5, 8, 8)}
    assert MARKUP in printed(lambda console: console.print(figures_table(figures, figures)))


def test_labels_and_folders_of_a_run_are_no_markup() -> None:
    def show(console: Console) -> None:
        with ProgressDisplay(console) as display:
            display.on_start(Path(MARKUP), 0, 2)
            display.on_iteration(0, {f"reward/a/{MARKUP}/mean": 0.25, "loss": 1.0})
            display.on_evaluation(1, {MARKUP: 0.5})

    out = printed(show)
    assert f"Run directory: {MARKUP}\n" in out
    assert f"a/{MARKUP} 0.250" in out
    assert f"Held out after 1 iterations: {MARKUP} 0.5000\n" in out


def test_names_and_descriptions_of_recipes_are_no_markup(
    tmp_path: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "recipes"
    (folder / "methods").mkdir(parents=True)
    name = "[bold]x[red] :cat: a"  # a name holds no slash
    (folder / "[mine].yaml").write_text(f"extends: quickstart\nname: '{name}'\ndescription: '{MARKUP}'\n")
    (folder / "methods" / "[its].yaml").write_text(f"description: '{MARKUP}'\n")
    (folder / "folder.yaml").mkdir()
    code = f"""
        from pathlib import Path
        from branchtree.plugins.hookspecs import hookimpl
        from pydantic import BaseModel

        @hookimpl
        def register_recipes(register):
            register(Path({str(folder)!r}))

        @hookimpl
        def register_callbacks(register):
            register("[red]", build=print, config=BaseModel, summary={MARKUP!r})
    """
    modules = {"marked": code, "broken": f"raise ValueError({MARKUP!r})"}
    plug(fake_distribution(tmp_path / "site", "marked", {"[marked]": "marked", "[broken]": "broken"}, modules))
    listed = command("recipes")
    assert listed.code == 0, listed.err
    assert "[mine]" in listed.out and "+[its]" in listed.out
    assert listed.out.count(MARKUP) == 2
    planned = command("plan", "[mine]+[its]")
    assert planned.out.startswith(f"{name}+[its]: {MARKUP}; {MARKUP}\n"), planned
    plugins = command("plugins")
    assert "[red]" in plugins.out and MARKUP in plugins.out
    assert f"plug-in '[broken]' of marked cannot be loaded: ValueError: {MARKUP}" in plugins.out


def test_files_prompts_and_rewards_that_are_scored_are_no_markup(here: Path) -> None:
    Image.new("RGB", (28, 28)).save(here / "[red]:cat:.png")
    (here / "l.jsonl").write_text('{"image": "[red]:cat:.png", "prompt": "[bold]3[/red] :cat: \\u001b[31m"}\n')
    done = run("score", "l.jsonl", "-r", "digits label='\"[blue]:cat:\"'", "--output", "[red].jsonl")
    assert done.code == 0, done.err
    for text in ("[red]:cat:.png", "[bold]3[/red] :cat: \\x1b[31m", "[blue]:cat:", "Scores: [red].jsonl"):
        assert text in done.out
    assert "\x1b" not in done.out


def test_messages_are_no_markup_and_move_no_cursor(here: Path) -> None:
    assert run("plan", MARKUP).err.startswith(f"error: no recipe '{MARKUP}'.")
    assert run("plan", "\x1b[31mred\x07\r").err.startswith("error: no recipe '\\x1b[31mred\\x07\\x0d'.")
    assert run("report", MARKUP).err.startswith(f"error: {MARKUP}: is not a run directory")
    for usage in (("plan", "quickstart", "--x[red]"), ("[red]",)):
        done = run(*usage)
        assert done.code == 2 and "[red]" in done.err
    assert visible("a\tb\nc\x00\x9b\u2028é") == "a\tb\nc\\x00\\x9b\u2028é"


def test_a_message_names_a_long_prompt_in_part(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        first_frame(Condition("x" * 100_000, image=tmp_path / "none.png", location="p.jsonl:1"))
    assert len(str(refused.value)) < 1000


# --- paths that no system takes ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "quickstart", f"model.path={'x' * 5000}"), "is neither an existing folder nor a hub id"),
        (("plan", "quickstart", "model.path=~nosuchuser/x"), "model folder '~nosuchuser/x' does not exist"),
        (("plan", "quickstart", f"data.folder={'x' * 300}"), "data.folder: no folder "),
        (("plan", f"{'x' * 300}.yaml"), "cannot be read: File name too long"),
        (("report", "x" * 300), "cannot be used: File name too long"),
        (("evaluate", "x/" * 3000), "there is no run's directory x/x"),
        (("evaluate", "~nosuchuser/x"), "there is no run's directory ~nosuchuser/x"),
        (("train", "quickstart", "--smoke", "--output", "x" * 300), "cannot be used: File name too long"),
        (("compare", "quickstart", "--output", "x" * 300), "cannot be used: File name too long"),
        (("diversity", "quickstart", "--smoke", "--output", "x" * 300), "cannot be used: File name too long"),
        (("score", "a.png", "-r", "digits", "--output", "x" * 300), "cannot be used: File name too long"),
        (("score", "a.png", "-r", f"aesthetic path={'x' * 5000}"), "aesthetic"),
        (("serve-reward", "digits", "--host", "x" * 300, "--port", "0"), "is not known (it is no name of a machine)"),
        (("serve-reward", "digits", "--host", "\udcff", "--port", "0"), "is not known (it is no name of a machine)"),
    ],
)
def test_a_path_that_cannot_be_is_one_message(arguments: Sequence[str], message: str, here: Path) -> None:
    Image.new("RGB", (28, 28)).save(here / "a.png")
    done = run(*arguments)
    assert done.code == 2 and done.err.startswith("error: "), done
    assert message in done.err and "Traceback" not in done.err
    assert [path.name for path in here.iterdir()] == ["a.png"]


# --- anything at all ---

words = st.text(st.characters(), max_size=8) | st.sampled_from(
    [
        *("", ".", "..", "/", "~", "~nosuchuser/x", "quickstart+", "+", "x.yaml", "[red]", ":cat:", "\x1b[31m"),
        *("-", "--", "--help", "--smoke", "=", "=1", "a=", "optim.lr=[", "seed=\udcff", "x" * 300, f"{'x' * 300}.yaml"),
        *("/dev/zero", "nul\0", "quickstart+\u212a", "data.prompts=/dev/zero", "tree.splits=&a [*a]", "int=1"),
        *("\udcff", "%", "model.path=\u2028", "rewards.0="),
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = Path.cwd()
    folder = tmp_path_factory.mktemp("empty")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@limits(thorough, max_examples=60)
@given(
    start=st.sampled_from(
        [
            ("plan",),
            ("plan", "quickstart"),
            ("train", "quickstart", "no.such.key=1"),
            ("train",),
            ("evaluate",),
            ("diversity",),
            ("report",),
            ("score", "--reward", "digits"),
            ("score", "x.png", "--prompt", "3", "--reward"),
            ("compare", "--grid", "no.such.key=1"),
            ("recipes",),
            (),
        ]
    ),
    more=st.lists(words, max_size=3),
    encoding=st.sampled_from(["utf-8", "cp1252"]),
)
@example(start=("plan",), more=["\udcff.yaml"], encoding="cp1252")
def test_any_arguments_end_in_output_or_one_message(
    start: Sequence[str], more: Sequence[str], encoding: str, empty: Path
) -> None:
    done = run(*start, *more, encoding=encoding)
    assert done.code in (0, 2)
    assert "Traceback" not in done.out + done.err
    assert done.code == 0 or done.err.count("error: ") <= 1
    assert not any(empty.iterdir())
