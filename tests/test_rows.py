"""Rows that users write: mistyped keys are named, and what could not be written is refused before anything is asked."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guests import Outcome, fake_distribution
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from branchtree.data.prompts import load_conditions
from branchtree.errors import BranchTreeError, CheckpointError, DataError
from branchtree.files.json_lines import MOST_DIGITS, json_object, parse_json, read_json_object, require_writable
from branchtree.studies.score.items import list_items
from branchtree.studies.score.run import score_files

PROBE = """
    import torch
    from pydantic import BaseModel

    from branchtree.plugins.hookspecs import hookimpl
    from branchtree.core.scores import Scores

    ASKED = []


    class Config(BaseModel):
        pass


    class Mean:
        modalities = frozenset({"image"})
        reads_prompt = False

        def __init__(self, config):
            pass

        def load(self, device):
            ASKED.append("load")

        def score(self, media, conditions):
            values = media.pixels.flatten(1).mean(dim=1)
            rows = {row: one.prompt for row, one in enumerate(conditions) if one.metadata.get("bad")}
            values[list(rows)] = float("nan")
            return Scores(values, values.isfinite(), reasons={row: "odd \\ud800 answer" for row in rows})


    @hookimpl
    def register_rewards(register):
        register("mean_pixel", build=Mean, config=Config, summary="Mean of pixels.")
"""


@pytest.fixture
def asked(tmp_path: Path, plug: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a small reward was asked for; the current folder holds a picture."""
    fake_distribution(tmp_path / "site", "rows-probe", {"probe": "rows_probe"}, {"rows_probe": PROBE})
    plug(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((2, 2, 3), 128, np.uint8)).save("a.png")
    import rows_probe

    calls: list[str] = rows_probe.ASKED
    calls.clear()
    return calls


# --- keys ---


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"image": "a.png", "image": "b.png"}', "image"),
        ('{"prompt": "a", "n": [{"x": {"b": 1, "c": 2, "b": 1}}]}', "b"),
        ('{"prompt": "a", "prom\\u0070t": "b"}', "prompt"),
        ('{"prompt": "a", "": 1, "": 1}', ""),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, key: str, tmp_path: Path) -> None:
    """Python's json keeps the last, other readers the first, so the row has no one meaning."""
    assert len(json.loads(text)) < len(json.loads(text, object_pairs_hook=list)) or "n" in json.loads(text)
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a", "image": "a.png"}}\n{text}\n')
    for read in (
        lambda path: load_conditions(str(path), "prompt", "train"),
        lambda path: list_items(path, None),
    ):
        with pytest.raises(DataError, match=rf"rows\.jsonl:2: not valid JSON: the key '{key}' is given twice"):
            read(tmp_path / "rows.jsonl")


NEAR = {
    "promt": "prompt",
    "prompts": "prompt",
    "Prompt": "prompt",
    "imgae": "image",
    "image ": "image",
    "vidoe": "video",
    "negative_promt": "negative_prompt",
    "negative-prompt": "negative_prompt",
    "last image": "last_image",
}


@pytest.mark.parametrize(("key", "meant"), NEAR.items())
def test_a_key_that_is_nearly_one_is_warned_of_once(
    key: str, meant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", key: "c"}, {"prompt": "d", key: "e"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert len(load_conditions(str(path), "prompt", "train")) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:2: nothing reads the key {key!r}; did you mean {meant!r}?"
    ]


@pytest.mark.parametrize("key", ["caption", "text", "Description", "promt"])
def test_what_may_be_the_prompt_is_named_where_a_row_has_none(
    key: str, asked: list[str], tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    Path("list.jsonl").write_text(json.dumps({"image": "a.png", key: "a cat"}))
    done = command("score", "list.jsonl", "-r", "mean_pixel")
    assert done.code == 0 and f"list.jsonl:1: nothing reads the key '{key}'; did you mean 'prompt'?" in done.err
    rows = command("score", "list.jsonl", "-r", "mean_pixel", "--prompt", "a cat")
    assert rows.code == 0 and "did you mean" in rows.err  # the row itself has none


def test_other_keys_are_a_users_own(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    own = [
        "prompt_id",
        "image_id",
        "video_path",
        "stage",
        "usage",
        "page",
        "category",
        "seed",
        "answer",
        "model",
        "tag",
    ]
    row = {"prompt": "a", "caption": "b", "text": "c", "image": None, **dict.fromkeys(own, 1)}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    [condition] = load_conditions(str(path), "prompt", "train")
    assert condition.metadata.keys() == {*own, "caption", "text"} and not caplog.records
    load_conditions(str(path), "caption", "train")  # another column is the prompt
    assert not caplog.records


def test_rows_of_python_are_looked_through_too(caplog: pytest.LogCaptureFixture) -> None:
    list_items([{"image": "a.png", "promt": "x"}, "b.png", {"image": "c.png", "promt": "y", "vide": 1}], "p")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["item 1", "item 3"]
    assert "did you mean 'video'" in caplog.records[1].getMessage()


def test_a_prompt_may_be_null_or_missing() -> None:
    items = list_items([{"image": "a.png", "prompt": None}, {"image": "a.png"}], "given")
    assert [item.condition.prompt for item in items] == ["given", "given"]


# --- what cannot be written ---

LOOP: list[Any] = []
LOOP.append(LOOP)
REFUSED: dict[str, tuple[Any, str]] = {
    "nan": ({"n": float("nan")}, r"item 2: n: nan is no number in JSON"),
    "infinity": ({"n": [1, {"deep": float("-inf")}]}, r"item 2: n\[1\]: deep: -inf is no number in JSON"),
    "digits": ({"n": 10**5000}, "item 2: n: a number of more than 300 digits is too long"),
    "bytes": ({"n": b"x"}, "item 2: n: is a value of type bytes, which JSON does not have"),
    "object": ({"when": datetime(2026, 1, 1, tzinfo=UTC)}, "item 2: when: is a value of type datetime"),
    "array": ({"n": np.float32(1)}, "item 2: n: is a value of type float32"),
    "surrogate": ({"n": "a\ud800"}, r"item 2: n: holds \\ud800, which is half a character"),
    "surrogate key": ({"a\ud800": 1}, r"item 2: the key .* holds \\ud800"),
    "number key": ({1: "a", "1": "b"}, "item 2: the key 1 is no text"),
    "inner key": ({"n": {None: 1}}, "item 2: n: the key None is no text"),
    "loop": ({"n": LOOP}, "item 2: is nested deeper than 64 levels, or holds itself"),
    "prompt": ({"prompt": "a\ud800"}, r"item 2: prompt: holds \\ud800"),
    "path": ({"image": "a\0.png"}, "item 2: image: holds a NUL character"),
    "surrogate path": ({"image": "a\udc80.png"}, r"item 2: image: holds \\udc80"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_cannot_be_written_is_refused_first(changes: Any, message: str, asked: list[str]) -> None:
    rows = [{"image": "a.png"}, {"image": "a.png", **changes}]
    with pytest.raises(DataError, match=message):
        score_files(rows, "mean_pixel")
    assert not asked


def test_a_name_that_is_not_utf8_is_refused_first(
    asked: list[str], tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Path("a.png").rename(name)
    for given_file in (name, str(tmp_path)):
        done = command("score", given_file, "-r", "mean_pixel", "-o", "out.jsonl")
        assert done.code == 2 and "caf" in done.err and "Traceback" not in done.err
        assert not asked and not Path("out.jsonl").exists()
    with pytest.raises(DataError, match="file 1 is named by a value of type int"):
        score_files([3], "mean_pixel")  # type: ignore[list-item]
    with pytest.raises(DataError, match="prompt: write a text, or leave it out; it is of type int"):
        score_files("a.png", "mean_pixel", prompt=3)  # type: ignore[arg-type]


def test_a_reason_is_written_whatever_characters_it_has(asked: list[str]) -> None:
    score_files({"image": "a.png", "bad": 1}, "mean_pixel", output=Path("out.jsonl"))
    [row] = map(json.loads, Path("out.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["scores"]["mean_pixel"]["reason"] == "odd \\ud800 answer"


TEXTS = st.text(st.characters(), max_size=6)  # surrogates and NUL among them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=2)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3)
)
NAMES = st.sampled_from(["a.png", "./a.png", "a\0.png", "caf\udce9.png", "b\ud800.png"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(TEXTS | st.integers(), VALUES, max_size=3), prompt=st.none() | TEXTS, name=NAMES)
def test_any_row_is_refused_first_or_written_and_read_back(
    metadata: dict[Any, Any], prompt: str | None, name: str, asked: list[str]
) -> None:
    asked.clear()
    row = {**metadata, "image": name, "prompt": prompt}
    row.pop("video", None)
    try:
        score_files(row, "mean_pixel", output=Path("out.jsonl"))
    except BranchTreeError:
        assert not asked
        return
    [read] = Path("out.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    found = json_object(read, "out.jsonl:1")
    assert found["metadata"] == {key: value for key, value in row.items() if key not in ("image", "prompt")}
    assert found["prompt"] == (prompt or "").strip() and found["file"] == str(Path(name))


# --- JSON ---


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_what_is_writable_is_read_back_equal(value: Any) -> None:
    try:
        require_writable(value, "here")
    except DataError as error:
        assert str(error).startswith("here: ") or str(error).startswith("here[")
        return
    assert parse_json(json.dumps(value, ensure_ascii=False, allow_nan=False), "there") == value


def test_the_longest_number_is_read_back() -> None:
    for number in (10**MOST_DIGITS - 1, 1 - 10**MOST_DIGITS):
        require_writable(number, "here")
        assert parse_json(str(number), "there") == number


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "format": 2}', "the key 'format' is given twice"),
        (f'{{"format": {"9" * 5000}}}', "a number of 5000 digits"),
        ('{"format": NaN}', "NaN is no number"),
        ("[" * 100_000, "nested deeper than 64 levels|not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_files_that_a_program_wrote_are_held_to_the_same(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_json_object(path, CheckpointError)
    assert str(refused.value).startswith(str(path))


def test_a_damaged_line_of_a_log_says_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from branchtree.run.logs import read_lines

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1, "lr": 1, "lr": 2}\n')
    caplog.set_level(logging.WARNING)
    good, damaged = read_lines(path)
    assert not good.problem and "the key 'lr' is given twice" in damaged.problem
