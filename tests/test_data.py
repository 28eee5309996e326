"""Prompts: read from every kind of file, refused with the place of what is wrong, and taken in a reproducible order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import thorough

from branchtree.data import PromptOrder, load_conditions
from branchtree.errors import DataError
from branchtree.protocols import Condition


def read(prompts: Any, column: str = "prompt", split: str = "train") -> list[Condition]:
    return load_conditions(str(prompts) if isinstance(prompts, Path) else prompts, column, split)


def texts(conditions: list[Condition]) -> list[str]:
    return [condition.prompt for condition in conditions]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# --- what can be read ---


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a cat\n\n  a dog  \r\n   \nune île, 一座岛")
    assert read(path) == [Condition("a cat"), Condition("a dog"), Condition("une île, 一座岛")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(separator: str, tmp_path: Path) -> None:
    prompt = f"a cat{separator}a dog"
    assert texts(read(write(tmp_path / "p.txt", f"{prompt}\nb\n"))) == [prompt, "b"]
    assert texts(read(write_rows(tmp_path / "p.jsonl", [{"prompt": prompt}, {"prompt": "b"}]))) == [prompt, "b"]


@pytest.mark.parametrize(("name", "line"), [("p.txt", "a cat"), ("p.jsonl", '{"prompt": "a cat"}')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name: str, line: str, tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / name, b"\xef\xbb\xbf" + line.encode()))) == ["a cat"]


def test_json_lines_carry_media_and_metadata(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": " a cat ", "negative_prompt": "blur", "image": "pics/cat.png", "video": "/abs/cat.mp4"},
        {"prompt": "a dog", "image": None, "answer": 3, "tags": ["x"]},
    ]
    first, second = read(write_rows(tmp_path / "p.jsonl", rows))
    assert first == Condition("a cat", "blur", tmp_path / "pics" / "cat.png", Path("/abs/cat.mp4"))
    assert second == Condition("a dog", metadata={"answer": 3, "tags": ["x"]})


def test_another_column_can_hold_the_prompt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"caption": "a cat", "id": 7}])
    assert read(path, column="caption") == [Condition("a cat", metadata={"id": 7})]


def test_parquet_rows_are_prompts(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"prompt": ["a", "b"], "image": ["x.png", None], "score": [1, 2]})
    assert read(path) == [
        Condition("a", image=tmp_path / "x.png", metadata={"score": 1}),
        Condition("b", metadata={"score": 2}),
    ]


def test_a_list_is_taken_as_it_is() -> None:
    assert read(("a", " b ")) == [Condition("a"), Condition("b")]


def test_a_dataset_folder_can_be_named_like_one_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, prompts in (("train", ["a", "b"]), ("test", ["c"])):
        write_rows(folder / f"{split}.jsonl", [{"prompt": prompt, "source": split} for prompt in prompts])
    assert texts(read(f"hub:{folder}")) == ["a", "b"]
    assert read(f"hub:{folder}", split="test") == [Condition("c", metadata={"source": "test"})]
    with pytest.raises(DataError, match=r"hub:.*set: split 'validation' cannot be loaded"):
        read(f"hub:{folder}", split="validation")
    with pytest.raises(DataError, match=r"hub:.*set: row 1: needs a non-empty text under 'caption'; it has prompt"):
        read(f"hub:{folder}", column="caption")


def test_a_dataset_of_the_hub_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match="hub:branchtree/no-such-set: split 'train' cannot be loaded"):
        read("hub:branchtree/no-such-set")


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, "no prompt file {path}; set data.prompts to a .txt, .jsonl or .parquet file"),
        ("p.txt", b"", "{path}: holds no prompts"),
        ("p.txt", b" \n\n", "{path}: holds no prompts"),
        ("p.jsonl", b"\n", "{path}: holds no prompts"),
        ("p.csv", b"a", "{path}: prompts are read from .txt, .jsonl and .parquet files"),
        ("p.txt", b"caf\xe9", "{path}: cannot be read: 'utf-8' codec"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": ', "{path}:3: not valid JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]', "{path}:2: each line is one JSON object"),
        ("p.jsonl", b'{"text": "a", "id": 1}', "{path}:1: needs a non-empty text under 'prompt'; it has text, id"),
        ("p.jsonl", b"{}", "{path}:1: needs a non-empty text under 'prompt'; it has nothing"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', "{path}:2: needs a non-empty text under 'prompt'"),
        ("p.jsonl", b'{"prompt": 5}', "{path}:1: needs a non-empty text under 'prompt'"),
        ("p.parquet", b"PAR1 and then nothing", "{path}: not a readable parquet file"),
    ],
)
def test_a_file_that_is_no_list_of_prompts(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read(path)
    assert str(refused.value).startswith(message.format(path=path))


def test_parquet_is_checked_row_by_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.parquet: row 2: needs a non-empty text under 'prompt'"):
        read(write_parquet(tmp_path / "p.parquet", {"prompt": ["a", None]}))
    with pytest.raises(DataError, match=r"q\.parquet: row 1: needs a non-empty text under 'prompt'; it has text"):
        read(write_parquet(tmp_path / "q.parquet", {"text": ["a"]}))
    with pytest.raises(DataError, match=r"e\.parquet: holds no prompts"):
        read(write_parquet(tmp_path / "e.parquet", {"prompt": pyarrow.array([], pyarrow.string())}))


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(DataError, match=r"no prompt file .*p\.txt"):
        read(tmp_path / "p.txt")


def test_lists_are_checked_too() -> None:
    with pytest.raises(DataError, match="the list of prompts: holds no prompts"):
        read(())
    with pytest.raises(DataError, match=r"prompts\.1: needs a non-empty text"):
        read(("a", ""))


# --- the order ---


@thorough
@given(count=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), shuffle=st.booleans(), passes=st.integers(1, 4))
def test_each_pass_is_a_permutation_and_no_id_comes_twice(count: int, seed: int, shuffle: bool, passes: int) -> None:
    order = PromptOrder(count, seed, shuffle)
    ids = [order.at(position) for position in range(passes * count)]
    assert len(set(ids)) == len(ids)
    for number in range(passes):
        taken = ids[number * count : (number + 1) * count]
        assert sorted(taken) == list(range(number * count, (number + 1) * count))
        assert sorted(order.index(prompt_id) for prompt_id in taken) == list(range(count))


@thorough
@given(count=st.integers(1, 20), seed=st.integers(0, 99), size=st.integers(1, 15), iterations=st.integers(1, 5))
def test_the_order_does_not_depend_on_the_batch(count: int, seed: int, size: int, iterations: int) -> None:
    order = PromptOrder(count, seed, shuffle=True)
    batches = [order.batch(iteration, size) for iteration in range(iterations)]
    assert [prompt_id for batch in batches for prompt_id in batch] == [order.at(p) for p in range(size * iterations)]


def test_unshuffled_prompts_come_as_they_stand() -> None:
    order = PromptOrder(3, seed=1, shuffle=False)
    assert order.batch(0, 4) == [0, 1, 2, 3]
    assert [order.index(prompt_id) for prompt_id in order.batch(1, 4)] == [1, 2, 0, 1]


def test_passes_and_seeds_differ() -> None:
    order = PromptOrder(30, seed=1, shuffle=True)
    passes = [tuple(order.index(order.at(30 * number + place)) for place in range(30)) for number in range(4)]
    other = tuple(PromptOrder(30, seed=2, shuffle=True).batch(0, 30))
    assert len({*passes, other}) == 5
    assert passes[0] != tuple(range(30))


def test_every_prompt_can_come_first() -> None:
    first = Counter(PromptOrder(4, seed, shuffle=True).at(0) for seed in range(400))
    assert first.keys() == {0, 1, 2, 3}
    assert min(first.values()) > 70


def test_the_order_of_a_seed_stays_what_it_was() -> None:
    assert PromptOrder(8, seed=42, shuffle=True).batch(0, 10) == [0, 7, 1, 5, 4, 3, 2, 6, 10, 14]
