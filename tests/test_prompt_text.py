"""Prompt files of every kind of text and bytes: each is read, or refused in one message with line and remedy."""

from __future__ import annotations

import datetime
import decimal
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from strategies import thorough

from branchtree.data.prompts import load_conditions
from branchtree.errors import DataError, RewardError, shortened
from branchtree.files.reading import read_text
from branchtree.plugins import Condition, Media
from branchtree.recipe import load_recipe
from branchtree.serving.wire import encode_request
from branchtree.studies.score.items import list_items


def read(prompts: Any, folder: str | None = None) -> list[Condition]:
    return load_conditions(str(prompts) if isinstance(prompts, Path) else prompts, "prompt", "train", folder)


def texts(prompts: Any) -> list[str]:
    return [condition.prompt for condition in read(prompts)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_table(path: Path, table: pyarrow.Table) -> Path:
    pyarrow.parquet.write_table(table, path)
    return path


def refusal(prompts: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(prompts, **settings)
    assert len(str(refused.value)) < 1000
    return str(refused.value)


# --- encodings ---


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n\N{LEFT DOUBLE QUOTATION MARK}b".encode("cp1252"), ":2: is not UTF-8 text: byte 0x93 after ''"),
        (b"\xef\xbb\xbfa\r\ncaf\xe9", ":2: is not UTF-8 text: byte 0xe9 after 'caf', as in"),
        ("a\n\nb\ud800".encode(errors="surrogatepass"), ":3: is not UTF-8 text: byte 0xed after 'b', as in"),
        ("a cat\n".encode("utf-16"), ": is UTF-16 or UTF-32 text; save it as UTF-8"),
        (b"\xfe\xff" + "a cat\n".encode("utf-16-be"), ": is UTF-16 or UTF-32 text; save it as UTF-8"),
        ("a cat\n".encode("utf-16-le"), ":1: holds NUL characters, as UTF-16 and binary files do; save it as UTF-8"),
        (b"a\nb\0c\n", ":2: holds NUL characters"),
    ],
)
def test_other_encodings_are_named_with_line_and_remedy(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    told = refusal(write(tmp_path / name, content))
    assert told.startswith(f"{tmp_path / name}{message}")
    assert "save it as UTF-8" in told


@pytest.mark.parametrize(
    "content",
    ["a\nb\n", "a\r\nb\r\n", "a\rb\r", "\ufeffa\n\ufeffb\n", "a\n\n \n\u3000\nb", "\ufeff\ufeffa\n\ufeff\nb"],
)
def test_ends_of_lines_and_marks_are_no_prompts(content: str, tmp_path: Path) -> None:
    assert texts(write(tmp_path / "p.txt", content.replace("\ufeff\ufeff", "\ufeff"))) == ["a", "b"]
    rows = content.replace("a", '{"prompt": "a"}').replace("b", '{"prompt": "b"}')
    assert texts(write(tmp_path / "p.jsonl", rows)) == ["a", "b"]


def test_a_file_put_together_of_several_keeps_its_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '\ufeff{"prompt": "a"}\n\ufeff{"prompt": "b"}\n\ufeff{}\n')
    assert refusal(path).startswith(f"{path}:3: needs a non-empty text")


@pytest.mark.parametrize("suffix", [".TXT", ".Txt", ".JSONL", ".Parquet"])
def test_suffixes_are_known_in_capitals(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"P{suffix}"
    if suffix == ".Parquet":
        write_table(path, pyarrow.table({"prompt": ["a"]}))
    else:
        write(path, "a" if suffix.lower() == ".txt" else '{"prompt": "a"}')
    assert texts(path) == ["a"]
    recipe = write(
        tmp_path / "r.yaml", f"model: {{adapter: x}}\nrewards: [{{reward: x}}]\ndata: {{prompts: P{suffix}}}"
    )
    assert load_recipe(recipe, folders=[]).data.prompts == str(path)  # beside the recipe that names it


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "\u2028\n\x85\n"])
def test_a_blank_file_holds_no_prompts(content: str, tmp_path: Path) -> None:
    for name in ("p.txt", "p.jsonl"):
        assert refusal(write(tmp_path / name, content)) == f"{tmp_path / name}: holds no prompts; write at least one"


# --- what JSON can hold and nothing else ---


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a\\ud800b"}', "\\ud800 is half a character; write both halves, or leave it out"),
        ('{"prompt": "a", "\\uDC00": 1}', "\\udc00 is half a character"),
        ('{"prompt": "a", "tags": [["\\ud800"]]}', "\\ud800 is half a character"),
        ('{"prompt": "a\\u0000"}', "prompt: holds a NUL character"),
        ('{"prompt": "a", "negative_prompt": "\\u0000"}', "negative_prompt: holds a NUL character"),
        (f'{{"prompt": "a", "n": {"9" * 5000}}}', "not valid JSON: a number of 5000 digits is too long"),
        (f'{{"prompt": {"9" * 5000}}}', "not valid JSON: a number of 5000 digits is too long"),
        ('{"prompt": "a", "n": NaN}', "not valid JSON: NaN is no number in JSON; write null, or leave it out"),
        ('{"prompt": "a", "n": [-Infinity]}', "not valid JSON: -Infinity is no number in JSON"),
        ('{"prompt": "a", "n": -1e999}', "not valid JSON: -1e999 is too large a number"),
        (f'{{"prompt": "a", "n": {"[" * 100_000}{"]" * 100_000}}}', "is nested deeper than 64 levels"),
        (f'{{"prompt": "a", "n": {"[" * 70}{"]" * 70}}}', "is nested deeper than 64 levels"),
        (f'{{"prompt": {"{" * 100_000}', ""),
        ("null", "each line is one JSON object"),
        ("'a'", "not valid JSON: Expecting value"),
        ('{"prompt": null}', "needs a non-empty text under 'prompt'; it is null"),
        ('{"prompt": ["a"]}', "needs a non-empty text under 'prompt'; it is a list"),
        ('{"prompt": "\\t"}', "needs a non-empty text under 'prompt'; it is empty"),
        (f'{{"{"x" * 5000}": "a"}}', "needs a non-empty text under 'prompt'; it has xxx"),
    ],
)
def test_a_row_that_no_other_file_could_hold_is_refused(row: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", f'{{"prompt": "fine"}}\n{row}\n')
    told = refusal(path)
    assert told.startswith(f"{path}:2: {message}")
    with pytest.raises(DataError):  # a list of files to score is read by the same rules
        list_items(path, None)


def test_what_looks_alike_and_is_right_is_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a\N{GRINNING FACE}", "n": 10**299, "deep": [[[[{}]]] for _ in range(99)]},
        {"prompt": "\\ud800", "note": "NaN"},
    ]
    found = read(write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [{"prompt": one.prompt, **one.metadata} for one in found] == rows


def test_lists_are_held_to_the_same_characters() -> None:
    assert refusal(["a", "b\0"]).startswith("data.prompts.1: prompt: holds a NUL character")
    assert refusal(["a\ud800"]).startswith("data.prompts.0: prompt: holds \\ud800")
    with pytest.raises(DataError, match="prompt: holds "):
        list_items("x.png", "a\udcff")


def test_a_long_prompt_is_read_whole_and_named_in_part(tmp_path: Path) -> None:
    (condition,) = read(write(tmp_path / "p.txt", "x" * 1_000_000))
    assert len(condition.prompt) == 1_000_000
    assert len(str(condition)) < 500 and "(1000000 characters)" in str(condition)
    assert shortened("x" * 9) == "x" * 9


# --- what is no regular file ---


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    for name in ("pipe.txt", "pipe.jsonl", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: is no regular file but a pipe")
    assert "is no regular file" in refusal("/dev/zero")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert refusal(tmp_path / "loop.txt").endswith("cannot be read: Too many levels of symbolic links")
    assert refusal(tmp_path / f"{'x' * 300}.txt").endswith("cannot be read: File name too long")
    assert "cannot be read: " in refusal("a\0b.txt")
    assert "cannot be read: " in refusal("\ud800.txt")
    write(tmp_path / "file", "a")
    for missing in ("file/p.txt", "~nosuchuser/p.txt", "."):
        assert refusal(missing).startswith(f"no prompt file {missing}; set data.prompts to a ")
    for folder in ("~nosuchuser", "x" * 300, "a\0b", str(tmp_path / "file")):
        assert refusal(["a"], folder=folder).startswith("data.folder: no folder ")


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made up."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "p.txt", "a")
    (tmp_path / "folder").mkdir()
    for method in ("read_bytes", "stat"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, forbidden)
            assert refusal(path) == f"{path}: cannot be read: Permission denied"
    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(DataError, match=r"folder '.*' cannot be read: Permission denied"):
        list_items(tmp_path / "folder", None)


def test_files_to_score_are_held_to_the_same_rules(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for given_file, message in {
        tmp_path / "pipe.jsonl": "is no regular file but a pipe",
        tmp_path / "pipe.jsonl/x": "there is no file",
        "": "file 1 is named by an empty text",
        "~nosuchuser/x": "there is no file '~nosuchuser/x'",
        "x" * 300: "cannot be read: File name too long",
        "a\0b": "its name: holds a NUL character",
    }.items():
        with pytest.raises(DataError, match=message):
            list_items(given_file, None)


# --- tables ---


@pytest.fixture(scope="module")
def table_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("table") / "p.parquet"
    return write_table(path, pyarrow.table({"prompt": ["a", "b"] * 50})).read_bytes()


@pytest.mark.parametrize("kept", [0, 3, 8, 100, -100, -1])
def test_a_cut_table_is_refused(kept: int, table_bytes: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", table_bytes[:kept])
    told = refusal(path)
    assert told.startswith(f"{path}: not a readable parquet file: ") and "\n" not in told


@pytest.mark.parametrize("part", range(1, 12))
def test_a_flipped_byte_is_refused_or_does_no_harm(part: int, table_bytes: bytes, tmp_path: Path) -> None:
    damaged = bytearray(table_bytes)
    damaged[len(damaged) * part // 12] ^= 255
    path = write(tmp_path / "p.parquet", bytes(damaged))
    try:
        assert len(read(path)) == 100
    except DataError as error:
        assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([b"a"]), "it is bytes"),
        (pyarrow.array([[b"a"]]), "it is a list"),
        (pyarrow.array([{"text": "a"}]), "it is an object"),
        (pyarrow.array([1]), "it is a number"),
        (pyarrow.nulls(1), "it is null"),
        (pyarrow.array([None], pyarrow.large_string()), "it is null"),
        (pyarrow.array([" "]), "it is empty"),
    ],
)
def test_a_column_that_holds_no_texts_is_named(column: pyarrow.Array, message: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "p.parquet", pyarrow.table({"prompt": column}))
    assert refusal(path) == f"{path}: row 1: needs a non-empty text under 'prompt'; {message}"


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view"])
def test_texts_are_read_however_they_are_stored(kind: str, tmp_path: Path) -> None:
    plain = pyarrow.array(["a", "b"])
    column = plain.dictionary_encode() if kind == "dictionary" else plain.cast(getattr(pyarrow, kind)())
    assert texts(write_table(tmp_path / "p.parquet", pyarrow.table({"prompt": column}))) == ["a", "b"]


def test_what_json_lacks_is_a_text_or_null_in_metadata(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {
        "prompt": ["a"],
        "at": [moment],
        "day": [moment.date()],
        "hour": [moment.time()],
        "price": [decimal.Decimal("1.50")],
        "score": [float("nan")],
        "scores": [[float("inf"), 1.5]],
        "raw": [b"\xff"],
        "inside": [{"at": moment, "n": 3}],
    }
    (condition,) = read(write_table(tmp_path / "p.parquet", pyarrow.table(columns)))
    assert condition.metadata == {
        "at": "2026-01-02T03:04:05",
        "day": "2026-01-02",
        "hour": "03:04:05",
        "price": "1.50",
        "score": None,
        "scores": [None, 1.5],
        "raw": b"\xff",
        "inside": {"at": "2026-01-02T03:04:05", "n": 3},
    }


def test_metadata_that_cannot_be_sent_are_placed(tmp_path: Path) -> None:
    import torch

    path = write_table(tmp_path / "p.parquet", pyarrow.table({"prompt": ["a", "b"], "raw": [None, b"x"]}))
    with pytest.raises(RewardError, match=r"p\.parquet: row 2: the conditions' metadata cannot be sent .*keep to JSON"):
        encode_request(Media(images=torch.zeros(2, 3, 4, 4)), read(path))


def test_a_column_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    path = write_table(tmp_path / "p.parquet", pyarrow.table({"prompt": ["a"], "at": far}))
    assert refusal(path).startswith(f"{path}: not a readable parquet file: column 'at': ")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    path = write_table(tmp_path / "p.parquet", table)
    assert refusal(path) == f"{path}: two columns are named 'prompt'; rename one"


def test_a_folder_named_like_a_key_brings_no_column(tmp_path: Path) -> None:
    (tmp_path / "lang=en").mkdir()
    (condition,) = read(write_table(tmp_path / "lang=en" / "p.parquet", pyarrow.table({"prompt": ["a"]})))
    assert condition.metadata == {}


# --- anything at all: one message, or prompts ---

few = limits(thorough, max_examples=100)
SCRAPS = [
    *('{"prompt": "', '"}', "\n", "\r", "{", "}", "[", "]", ",", ":", '"', "'"),
    *("\\", "\\ud800", "\\u0000", "\\ud83d\\ude00"),
    *("null", "NaN", "1e999", "9" * 5000, "[" * 5000, "\ufeff", "\u2028", "\0", "\x1b[31m", "true", "-", " "),
    *('"image": "', '"negative_prompt": ', '"video": "../', '"last_image": "\\u0000'),
]  # fmt: skip


@few
@given(
    content=st.binary(max_size=50)
    | st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=12).map(lambda scraps: "".join(scraps).encode()),
    suffix=st.sampled_from([".txt", ".jsonl", ".JSONL"]),
)
def test_any_file_holds_prompts_or_is_refused(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.getbasetemp() / f"any{suffix}", content)
    try:
        found = read(path)
    except DataError as error:
        assert str(error).startswith(str(path))
        return
    for condition in found:
        assert condition.prompt.strip() == condition.prompt != ""
        json.dumps([condition.prompt, dict(condition.metadata)], ensure_ascii=False, allow_nan=False).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@few
@given(
    row=st.dictionaries(
        st.sampled_from(["prompt", "negative_prompt", "image", "video", "last_image", "x"]), json_values, max_size=4
    )
)
def test_any_row_is_a_condition_or_is_refused(row: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "row.jsonl", json.dumps(row))
    try:
        read(path)
    except DataError as error:
        assert str(error).startswith(f"{path}:1: ")


@few
@given(content=st.binary(max_size=40))
def test_any_text_file_is_utf_8_or_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.txt", content)
    try:
        text = read_text(path, DataError)
    except DataError:
        return
    assert text.encode() == content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
