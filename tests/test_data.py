"""Prompts: read from every kind of file, refused with the place of what is wrong, and taken in a reproducible order."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import thorough

from branchtree.data.prompts import (
    PromptOrder,
    check_conditions,
    held_out_conditions,
    load_conditions,
    training_conditions,
)
from branchtree.errors import DataError
from branchtree.plugins import Condition
from branchtree.recipe.schema import DataSection, EvaluationSection
from branchtree.training.conditioning import ConditioningCache


def read(
    prompts: Any, column: str = "prompt", split: str = "train", folder: Path | None = None, section: str = "data"
) -> list[Condition]:
    prompts = str(prompts) if isinstance(prompts, Path) else prompts
    return load_conditions(prompts, column, split, None if folder is None else str(folder), section)


def places(conditions: list[Condition]) -> list[str]:
    return [condition.location for condition in conditions]


def refusal(prompts: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(prompts, **settings)
    return str(refused.value)


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
        {"prompt": " a cat ", "negative_prompt": "blur", "image": "pics/cat.png", "last_image": "pics/../end.png"},
        {"prompt": "a dog", "image": None, "negative_prompt": None, "answer": 3, "tags": ["x"]},
        {"prompt": "a cow", "video": str(tmp_path / "cow.mp4")},
    ]
    first, second, third = read(write_rows(tmp_path / "p.jsonl", rows))
    assert first == Condition("a cat", "blur", tmp_path / "pics" / "cat.png", tmp_path / "pics" / ".." / "end.png")
    assert second == Condition("a dog", metadata={"answer": 3, "tags": ["x"]})
    assert third == Condition("a cow", video=tmp_path / "cow.mp4")


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
        ("p.txt", b"caf\xe9", "{path}:1: is not UTF-8 text: byte 0xe9 after 'caf', as in"),
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
    assert refusal(("a", "")).startswith("data.prompts.1: needs a non-empty text")
    assert refusal(("a", ""), section="evaluation").startswith("evaluation.prompts.1: needs a non-empty text")


# --- where it was written ---


def test_every_condition_says_where_it_was_written(tmp_path: Path) -> None:
    text = write(tmp_path / "p.txt", "a cat\n\na dog\n")
    lines = write(tmp_path / "p.jsonl", '\n{"prompt": "a"}\n{"prompt": "b"}\n')
    table = write_parquet(tmp_path / "p.parquet", {"prompt": ["a", "b"]})
    assert places(read(text)) == [f"{text}:1", f"{text}:3"]
    assert places(read(lines)) == [f"{lines}:2", f"{lines}:3"]
    assert places(read(table)) == [f"{table}: row 1", f"{table}: row 2"]
    assert places(read(("a", "b"))) == ["data.prompts.0", "data.prompts.1"]
    assert places(read(("a",), section="evaluation")) == ["evaluation.prompts.0"]
    assert str(read(text)[1]) == f"{text}:3: 'a dog'"


# --- images and videos ---


@pytest.mark.parametrize("key", ["image", "last_image", "video"])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "it is a number"),
        (True, "it is a truth value"),
        ({"bytes": None, "path": "x.png"}, "it is an object"),
        ("  ", "it is an empty text"),
    ],
)
def test_a_path_is_a_text(key: str, value: object, what: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", key: value}])
    expected = f"{path}:2: {key}: write the path of a file as a text, or leave it out; {what}"
    assert refusal(path) == expected


@pytest.mark.parametrize("key", ["last_image", "video"])
def test_there_is_one_last_image_and_one_video(key: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "b", key: ["x.png"]}])
    assert refusal(path).endswith(f"{key}: write the path of a file as a text, or leave it out; it is a list")


def test_an_image_may_be_a_list(tmp_path: Path) -> None:
    """From either kind of file; one in a list is the one itself."""
    rows = [{"prompt": "a", "image": names} for names in ("x.png", ["x.png"], ["x.png", "y.png", "x.png"])]
    x, y = tmp_path / "x.png", tmp_path / "y.png"
    expected = [Condition("a", image=x), Condition("a", image=x), Condition("a", image=x, further_images=(y, x))]
    found = read(write_rows(tmp_path / "p.jsonl", rows))
    assert found == expected
    assert [condition.images for condition in found] == [(x,), (x,), (x, y, x)]
    table = {"prompt": ["a"] * 2, "image": [["x.png"], ["x.png", "y.png", "x.png"]]}
    assert read(write_parquet(tmp_path / "p.parquet", table)) == expected[1:]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "image: write the paths of files into the list, or leave it out; it is empty"),
        (["x.png", None], "image: write the paths of files into the list, or leave it out; entry 2 is null"),
        (["x.png", 3], "image 2: write the path of a file as a text, or leave it out; it is a number"),
        (["x.png", ["y.png"]], "image 2: write the path of a file as a text, or leave it out; it is a list"),
    ],
)
def test_a_list_holds_paths(value: object, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "image": value}])
    assert refusal(path) == f"{path}:2: {message}"


def test_every_image_of_a_list_is_inside_the_data_folder(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "b", "image": ["x.png", "../y.png"]}])
    assert refusal(path).startswith(f"{path}:1: image 2 '../y.png' lies outside the data folder '{tmp_path}'; ")


def test_a_negative_prompt_is_a_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "negative_prompt": ["blur"]}])
    assert refusal(path) == f"{path}:1: negative_prompt: write a text or null, not a list"


def test_pictures_inside_a_table_are_no_paths(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"prompt": ["a"], "image": [{"bytes": b"PNG", "path": "a.png"}]})
    assert refusal(path).startswith(f"{path}: row 1: image: write the path of a file as a text")
    assert refusal(write_parquet(path, {"prompt": ["a"], "image": [b"PNG"]})).endswith("it is bytes")


@pytest.mark.parametrize("key", ["image", "last_image", "video"])
@pytest.mark.parametrize("value", ["../x.png", "/etc/passwd", "pics/../../x.png", "linked/x.png", "far.png"])
def test_a_path_that_leaves_the_data_folder_is_refused(key: str, value: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for made in (tmp_path / "elsewhere", folder, folder / "pics"):
        made.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "far.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    path = write_rows(folder / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", key: value}])
    message = refusal(path)
    assert message.startswith(f"{path}:2: {key} '{value}' lies outside the data folder '{folder}'; ")
    assert "data.folder" in message


def test_what_only_looks_as_if_it_left_the_folder_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "pics").mkdir(parents=True)
    (folder / "near.png").symlink_to(folder / "pics" / "x.png")
    (tmp_path / "way_in").symlink_to(folder)
    values = ["pics/../x.png", "near.png", str(folder / "x.png"), "..x.png", "../set/x.png"]
    path = write_rows(folder / "p.jsonl", [{"prompt": "a", "image": value} for value in values])
    assert [condition.image for condition in read(path)] == [folder / value for value in values]
    assert len(read(tmp_path / "way_in" / "p.jsonl")) == len(values)
    sibling = write_rows(folder / "q.jsonl", [{"prompt": "a", "image": "../set2/x.png"}])
    assert "lies outside the data folder" in refusal(sibling)


@pytest.mark.parametrize("value", ["a\0b.png", "loop/x.png"])
def test_what_cannot_be_a_path_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "image": value}])
    try:
        (condition,) = read(path)  # Python 3.13 follows a loop of links as far as it goes
    except DataError as error:
        assert str(error).startswith(f"{path}:1: image ")
    else:
        assert condition.image == tmp_path / value


def test_the_data_folder_can_lie_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "lists").mkdir()
    path = write_rows(tmp_path / "lists" / "p.jsonl", [{"prompt": "a", "image": "x.png"}])
    assert read(path, folder=folder) == [Condition("a", image=folder / "x.png")]
    assert read(path) == [Condition("a", image=tmp_path / "lists" / "x.png")]
    out = write_rows(path, [{"prompt": "a", "image": "../lists/x.png"}])
    assert f"{out}:1: image '../lists/x.png' lies outside the data folder '{folder}'" in refusal(out, folder=folder)
    message = refusal(path, folder=tmp_path / "nowhere", section="evaluation")
    assert message == f"evaluation.folder: no folder {tmp_path / 'nowhere'}"


def test_a_dataset_has_no_folder_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [{"prompt": "a", "image": "x.png"}])
    name = f"hub:{tmp_path / 'set'}"
    assert refusal(name).startswith(f"{name}: row 1: image 'x.png': in which folder? Set data.folder")
    assert read(name, folder=tmp_path) == [Condition("a", image=tmp_path / "x.png")]


def test_sections_are_read_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = write_rows(tmp_path / "p.jsonl", [{"text": word, "image": f"{word}.png"} for word in "abc"])
    keys = {"prompts": str(path), "column": "text", "folder": str(tmp_path / "pictures")}
    expected = [Condition(word, image=tmp_path / "pictures" / f"{word}.png") for word in "abc"]
    assert training_conditions(DataSection.model_validate(keys)) == expected
    evaluation = {**keys, "rewards": [{"reward": "x"}]}
    assert held_out_conditions(EvaluationSection.model_validate(evaluation)) == expected
    assert held_out_conditions(EvaluationSection.model_validate({**evaluation, "limit": 2})) == expected[:2]
    assert held_out_conditions(None) == []


# --- looked at before the model is loaded ---


class Looker:
    """A model that takes no picture whose name begins with "bad", and keeps what it saw."""

    def __init__(self, *media: str) -> None:
        self.media = frozenset(media)
        self.seen: list[Condition] = []

    def check(self, condition: Condition) -> None:
        self.seen.append(condition)
        if condition.image is not None and condition.image.name.startswith("bad"):
            raise DataError(f"{condition}: is bad")


def looked_at(conditions: list[Condition]) -> list[Condition]:
    model = Looker()
    check_conditions(model, conditions)  # type: ignore[arg-type]
    return model.seen


def test_what_several_prompts_share_is_looked_at_once() -> None:
    one, two = Path("1.png"), Path("2.png")
    different = [
        Condition("a", image=one),
        Condition("a", image=two),
        Condition("a", last_image=one),
        Condition("a", video=one),
        Condition("a", image=one, further_images=(two,)),
        Condition("a", image=one, further_images=(one,)),
        Condition("a", "blur", one),
        Condition("a", "None", one),
        Condition("a"),
        Condition("a", metadata={"goal": [1, 2]}),
    ]
    same = [replace(condition, prompt=f"other {index}") for index, condition in enumerate(different)]
    assert looked_at([*different, *same]) == different


def test_several_images_are_refused_for_a_model_that_takes_one() -> None:
    several = Condition("x", image=Path("1.png"), further_images=(Path("2.png"),), location="p.jsonl:3")
    with pytest.raises(DataError, match=r"^p.jsonl:3: 'x' has 2 images, and the model takes one; give one\.$"):
        check_conditions(Looker("image"), [Condition("a", image=Path("1.png")), several])  # type: ignore[arg-type]
    for media in (["image", "images"], []):  # one that takes several judges itself; to others images are nothing
        check_conditions(Looker(*media), [several])  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "listed", "more"), [(1, 1, 0), (5, 5, 0), (6, 5, 1), (12, 5, 7)])
def test_the_first_few_bad_ones_are_told_together(count: int, listed: int, more: int) -> None:
    bad = [Condition("x", image=Path(f"bad{n}.png"), location=f"p.jsonl:{n}") for n in range(count)]
    with pytest.raises(DataError) as refused:
        looked_at([Condition("fine", image=Path("fine.png")), *bad, *bad])
    lines = [f"p.jsonl:{n}: 'x': is bad" for n in range(listed)] + ([f"and {more} more"] if more else [])
    assert str(refused.value).splitlines() == lines


class Numberer:
    """Encodes each condition that it is given as the number of those before it."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, conditions: list[Condition]) -> dict[str, torch.Tensor]:
        self.encoded += len(conditions)
        return {"number": torch.arange(self.encoded - len(conditions), self.encoded)}

    def release_frozen(self) -> None:
        pass


def test_conditions_that_differ_in_any_input_are_encoded_apart() -> None:
    one, two = Path("1.png"), Path("2.png")
    different = [
        Condition("a"),
        Condition("a", "None"),
        Condition("a", image=one),
        Condition("a", image=one, last_image=one),
        Condition("a", image=one, last_image=two),
        Condition("a", last_image=one),
        Condition("a", video=one),
        Condition("a", metadata={"id": 1}),
    ]
    cache = ConditioningCache(Numberer())  # type: ignore[arg-type]
    same = [replace(condition, location="elsewhere") for condition in different]
    numbers = cache.get([*different, *same], torch.device("cpu"))["number"].tolist()
    assert numbers == [*range(8), *range(8)]


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
