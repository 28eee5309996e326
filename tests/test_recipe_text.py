"""Recipes and overrides of every kind of text: each is read as plain data or refused in one message with its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from strategies import thorough

from branchtree.cli.arguments import parse_overrides
from branchtree.errors import BranchTreeError, RecipeError
from branchtree.recipe import Recipe, load_recipe
from branchtree.recipe.load import builtin_folder
from branchtree.recipe.plain_yaml import MOST_LEVELS, NotPlainError, read_plain
from branchtree.recipe.schema import Recipe as Schema
from branchtree.recipe.source import parse_plugin, parse_value, read_yaml

BASE = """\
model: {adapter: toy, size: 3}
rewards:
  - reward: bright
    weight: 2.0
data:
  prompts: [a, b]
"""


def write(folder: Path, content: str | bytes, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(folder: Path, text: str | bytes, **overrides: Any) -> Recipe:
    return load_recipe(write(folder, text), overrides, folders=[folder])


def refusal(folder: Path, text: str | bytes, smoke: bool = False) -> str:
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(folder, text), smoke=smoke, folders=[folder])
    assert len(str(refused.value)) < 6500
    return str(refused.value).replace(f"{folder}/", "")


# --- what is no plain data ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: !!python/object/apply:os.system ['exit 1']", "for the tag '!!python/object/apply:os.system'"),
        ("seed: !mine 3", "could not determine a constructor for the tag '!mine'"),
        ("seed: !!int abc", "'abc' cannot be read"),
        ("seed: !!int ''", "'' cannot be read"),
        ("optim: {lr: !!float ''}", "'' cannot be read"),
        ("run: {tf32: !!bool maybe}", "'maybe' cannot be read: it is no !!bool"),
        ("seed: !!null x", "'x' cannot be read: it is no !!null"),
        ("name: !!timestamp soon", "for the tag '!!timestamp'"),
        ("name: !!binary aGVsbG8=", "for the tag '!!binary'"),
        ("tree: !!set {steps}", "for the tag '!!set' on a mapping"),
        ("tree: !!omap [steps: 3]", "for the tag '!!omap'"),
        ("tree: !!pairs [steps: 3]", "for the tag '!!pairs'"),
        ("tree: !!map steps", "for the tag '!!map' on a scalar"),
        ("name: !!str [a]", "for the tag '!!str' on a sequence"),
        ("[a, b]: 3", "a key is a text, not a sequence"),
        ("? {a: b}\n: 3", "a key is a text, not a mapping"),
        ("loss: {<<: 3}", "'<<' takes a mapping or a list of mappings, not a scalar"),
        ("loss: {<<: [3]}", "'<<' takes a mapping or a list of mappings, not a scalar"),
        ("loss: &a {<<: *a}", f"is nested deeper than {MOST_LEVELS} levels, or holds itself"),
        ("callbacks: &a [*a]", "holds itself"),
        ("tree: &a {b: *a}", "holds itself"),
        (f"tree: {'[' * 3000}{']' * 3000}", f"is nested deeper than {MOST_LEVELS} levels"),
        (f"tree: {'{a: ' * 3000}{'}' * 3000}", f"is nested deeper than {MOST_LEVELS} levels"),
        (f"tree: {'[' * 20000}", f"is nested deeper than {MOST_LEVELS} levels"),
        (f"tree:\n{'- ' * 3000}a", f"is nested deeper than {MOST_LEVELS} levels"),
        (f"seed: {'9' * 5000}", "a whole number has at most 300 digits, not 5000"),
        (f"seed: 0x{'f' * 5000}", "a whole number has at most 300 digits, not 5002"),
        ('name: "\\ud800"', "\\ud800 is half a character"),
        ('name: "\\UFFFFFFFF"', "not valid YAML"),
        ('name: "\\U00110000"', "not valid YAML"),
        ("name: a\x01b", "unacceptable character #x0001"),
        ("---\nseed: 3", "but found another document"),
        ("tree:\n\tsteps: 3", "found character '\\t'"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    told = refusal(tmp_path, f"{BASE}{line}\n")
    assert told.startswith("mine.yaml:") and "not valid YAML: " in told
    assert message in told
    assert int(told.split(":")[1]) >= 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3: 4", "3: unknown key '3'"),
        ("true: 4", "true: unknown key 'true'"),
        ("on: 4", "on: unknown key 'on'"),
        ("null: 4", "null: unknown key 'null'"),
        ("2024-01-01: 4", "2024-01-01: unknown key '2024-01-01'"),
        ("tree: {3: 4}", "tree.3: unknown key '3'"),
        ("int: 4", "int: unknown key 'int'"),
        ("optim: {str: 4}", "optim.str: unknown key 'str'"),
        ("'a[b': 4", "a[b: unknown key 'a[b'"),
        ("seed: 2024-99-99", "seed: input should be a valid integer"),
        ("seed: 2024-01-01", "seed: input should be a valid integer"),
        ("seed: 1:30", "seed: input should be a valid integer"),
        ("seed: 0b11", "seed: input should be a valid integer"),
        ("seed: =", "seed: input should be a valid integer"),
        ("seed: <<", "seed: input should be a valid integer"),
        ("optim: {lr: 1e999999}", "optim.lr: input should be a finite number"),
        ("name: 3", "name: write a text (it is 3)"),
        ("name: [a]", "name: write a text (it is ['a'])"),
        ("description: {a: b}", "description: write a text (it is {'a': 'b'})"),
        ("extends: {a: b}", "extends: write a recipe's name or path, or a list of them"),
        ("extends: [[a]]", "extends: write a recipe's name or path, or a list of them"),
        ("extends: ~nosuchuser/x.yaml", "extends: no recipe file ~nosuchuser/x.yaml"),
        ('extends: "a\\0b.yaml"', "embedded null byte"),
        (f"extends: {'x' * 300}.yaml", "characters): cannot be read: File name too long"),
    ],
)
def test_plain_data_of_the_wrong_kind_is_refused_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    told = refusal(tmp_path, f"{BASE}{line}\n")
    assert told.startswith("mine.yaml:7: ")
    assert message in told


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    told = refusal(tmp_path, BASE + "tree: {" + ", ".join(f"k{index}: 1" for index in range(300)) + "}\n").splitlines()
    assert len(told) == 21 and told[-1] == "and 280 more"
    assert "k19" in told[19]


def test_a_long_value_is_shown_in_part(tmp_path: Path) -> None:
    told = refusal(tmp_path, BASE + f"seed: {'x' * 9000}\n")
    assert len(told) < 500 and "(9002 characters)" in told


# --- what a few lines could blow up ---


def bomb(kind: str, levels: int = 9) -> str:
    """A document whose aliases stand for ``9 ** levels`` values."""
    ends = {"list": ("[", "]"), "mapping": ("{a: 1, ", "}"), "merge": ("{<<: [", "]}")}[kind]
    first = "x0: &x0 {z: 1}\n"
    lines = []
    for level in range(1, levels):
        inside = [f"*x{level - 1}"] * 9
        written = [f"k{index}: {alias}" for index, alias in enumerate(inside)] if kind == "mapping" else inside
        lines.append(f"x{level}: &x{level} {ends[0]}{', '.join(written)}{ends[1]}\n")
    return first + "".join(lines)


@pytest.mark.parametrize("kind", ["list", "mapping", "merge"])
def test_aliases_of_aliases_are_refused_while_they_are_few(kind: str) -> None:
    with pytest.raises(NotPlainError, match="aliases repeat more than 50000 values"):
        read_plain(bomb(kind))  # 9 ** 8 values would take hours


def test_a_chain_of_aliases_is_as_deep_as_it_looks() -> None:
    chain = "x0: &x0 [1]\n" + "".join(f"x{index}: &x{index} [*x{index - 1}]\n" for index in range(1, 3000))
    with pytest.raises(NotPlainError, match="is nested deeper than"):
        read_plain(chain)


def test_aliases_and_merges_bring_what_they_stand_for(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 5}, *a]}\nd: *a\n"
    assert read_plain(text).data == {
        "a": {"x": 1, "y": [2]},
        "b": {"x": 1, "y": 3},
        "c": {"x": 5, "y": [2]},
        "d": {"x": 1, "y": [2]},
    }
    source = read_yaml(write(tmp_path, text))
    source.data["a"]["y"].append(3)
    assert source.data["d"]["y"] == [2]
    assert [str(source.origin(path)).rpartition(":")[2] for path in [("b", "x"), ("b", "y"), ("d", "y", 0)]] == [*"121"]


# --- what is read, and how ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("089", 89),
        ("0o17", 15),
        ("0x1F", 31),
        ("-0x1F", -31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("=", "="),
        ("yes", True),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ("!!str 3", "3"),
        ("!!int '3'", 3),
        ("{3: a, true: b, null: c, ~: d}", {"3": "a", "true": "b", "null": "c", "~": "d"}),
        ("[a, [b]]", ["a", ["b"]]),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_ends_of_lines_change_nothing(mark: bytes, end: str, tmp_path: Path) -> None:
    recipe = load(tmp_path, mark + (BASE + "seed: 3\n").replace("\n", end).encode())
    assert (recipe.seed, recipe.data.prompts) == (3, ("a", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BASE.encode("utf-16"), "mine.yaml: is UTF-16 or UTF-32 text; save it as UTF-8"),
        (BASE.encode("utf-32"), "mine.yaml: is UTF-16 or UTF-32 text; save it as UTF-8"),
        (
            BASE.encode("utf-16-le"),
            "mine.yaml:1: holds NUL characters, as UTF-16 and binary files do; save it as UTF-8",
        ),
        (f"{BASE}name: caf\xe9".encode("cp1252"), "mine.yaml:7: is not UTF-8 text: byte 0xe9 after 'name: caf', as in"),
        (b"\xef\xbb\xbf" + f"{BASE}name: \x93".encode("cp1252", "replace") + b"\x93", "mine.yaml:7: is not UTF-8 text"),
        (f"{BASE}name: a\0b".encode(), "mine.yaml:7: holds NUL characters"),
        (b"", "mine.yaml:1: a recipe is a mapping of keys to values"),
        (b"~", "mine.yaml:1: a recipe is a mapping of keys to values"),
        (b"!!set\n? a\n", "mine.yaml:1: not valid YAML: could not determine a constructor for the tag '!!set'"),
    ],
)
def test_other_encodings_are_named_with_the_remedy(content: bytes, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, content).startswith(message)


# --- files that are none ---


def test_what_is_no_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    write(tmp_path, BASE)
    for wrong, message in {
        "folder.yaml": "no recipe file ",
        "loop.yaml": "cannot be read: Too many levels of symbolic links",
        "pipe.yaml": "is no regular file but a pipe, a socket or a device",
        "mine.yaml/x.yaml": "no recipe file ",
        f"{'x' * 300}.yaml": "cannot be read: File name too long",
        "a\0b.yaml": "cannot be read: embedded null byte",
        "\ud800.yaml": "cannot be read: ",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / wrong)
    for name in ("~nosuchuser/x.yaml", "", "x" * 5000, "a\0b", "\udcff", "+", "mine+"):
        with pytest.raises(RecipeError, match=r"no (recipe|method) ") as refused:
            load_recipe(name, folders=[tmp_path])
        assert len(str(refused.value)) < 1000
    assert load_recipe("mine", folders=[tmp_path]).name == "mine"  # beside a folder with a recipe's name


# --- chains of recipes ---


def test_a_long_chain_of_recipes_is_followed(tmp_path: Path) -> None:
    write(tmp_path, BASE + "tree: {strength: 7.0}\n", "r0.yaml")
    for index in range(1, 1201):
        write(tmp_path, f"extends: r{index - 1}.yaml\nseed: {index}\n", f"r{index}.yaml")
    recipe = load_recipe(tmp_path / "r1200.yaml", folders=[])
    assert (recipe.seed, recipe.tree.strength, recipe.name) == (1200, 7.0, "r1200")


def test_a_long_circle_of_recipes_is_told_in_short(tmp_path: Path) -> None:
    for index in range(300):
        write(tmp_path, f"extends: r{(index + 1) % 300}.yaml\n", f"r{index}.yaml")
    with pytest.raises(RecipeError, match=r"r0\.yaml: extends itself through .*r1\.yaml -> ") as refused:
        load_recipe(tmp_path / "r0.yaml", folders=[])
    assert str(refused.value).count("->") <= 20


def test_bases_that_many_share_are_read_once(tmp_path: Path) -> None:
    """Each of 40 recipes extends two that extend the same two: 2 ** 40 ways lead to the first."""
    for side in "ab":
        write(tmp_path, BASE + f"lora: {{rank: 3}}\nloss: {{kl: 0.{'ab'.index(side)}}}\n", f"{side}0.yaml")
    for index in range(1, 40):
        for side in "ab":
            bases = f"[a{index - 1}.yaml, b{index - 1}.yaml]"
            write(tmp_path, f"extends: {bases}\nsmoke: {{seed: {index}}}\n", f"{side}{index}.yaml")
    recipe = load_recipe(tmp_path / "b39.yaml", folders=[])
    assert (recipe.loss.kl, recipe.lora and recipe.lora.rank) == (0.1, 3)
    assert load_recipe(tmp_path / "b39.yaml", smoke=True, folders=[]).seed == 39


# --- overrides and settings of plug-ins ---


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a..b=1", "override a..b=1: a: unknown key 'a'"),
        ("=1", "override '=1': write it as key=value"),
        ("model.=1", "model.: unknown key ''"),
        ("...=1", "override ...=1: recipe: unknown key ''"),
        ("int=1", "override int=1: int: unknown key 'int'"),
        ("optim.str=1", "override optim.str=1: optim.str: unknown key 'str'"),
        ("optim.a[b=1", "override optim.a[b=1: optim.a[b: unknown key 'a[b'"),
        ("rewards.-1.weight=1", "'rewards' is a list of 1; write an index from 0"),
        ("rewards.99999999999=1", "'rewards' is a list of 1; write an index from 0"),
        (f"rewards.{'9' * 5000}=1", "'rewards' is a list of 1; write an index from 0"),
        ("data.prompts.0.x=1", "override data.prompts.0.x: 'data.prompts' holds a plain value, not keys"),
        (f"{'.'.join('a' * 200)}=1", "a key has at most 64 levels, not 200"),
        ("tree.splits=[1", "override tree.splits: '[1' is not YAML: "),
        (f"tree.splits={'[' * 9000}", "is nested deeper than 64 levels"),
        ("tree.splits=&a [*a]", "holds itself"),
        (f"seed={'9' * 5000}", "at most 300 digits, not 5000"),
        ("tree={steps: 5, steps: 6}", "key 'steps' is written twice in one mapping"),
        ("seed=1\n---\n2", "but found another document"),
        ("name=\udcff", "override name: '\\udcff': holds bytes that are no text in this terminal's encoding"),
        ("na\udcffme=x", "holds bytes that are no text in this terminal's encoding"),
        ("name=[red]x[/red]", "quotes around a text keep it one"),
        (f"x={'y' * 100000}", "(100000 characters): x: unknown key 'x'"),
    ],
)
def test_overrides_of_every_kind(word: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("quickstart", parse_overrides([word]), folders=[builtin_folder()])
    assert message in str(refused.value)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "reward '' cannot be read: it is empty"),
        ("'", "no closing quotation"),
        ("digits x", "'x' is no setting; write it as key=value"),
        ("digits =1", "'=1' is no setting"),
        ("digits x=[", "reward 'digits': x: '[' is not YAML"),
        (f"digits x={'[' * 9000}", "is nested deeper than 64 levels"),
        ("digits x=\udcff", "holds bytes that are no text in this terminal's encoding"),
        (f"digits {'x' * 9000}", "... (9000 characters)' is no setting"),
    ],
)
def test_settings_of_plugins_of_every_kind(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_plugin("reward", text, "digits classifier=heldout")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 2000


# --- anything at all: one message, or a recipe ---

few = limits(thorough, max_examples=60)

TOKENS = [
    *("a", "b", ": ", ":\n  ", "- ", "[", "]", "{", "}", ", ", "\n", "\n  ", "\n    ", "&a ", "*a"),
    *("!!set ", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!python/name:os.system ", "!x ", "! ", "!<a> "),
    *("!%zz ", "<<: ", "? ", "| ", "> ", "=", "<<", "\r", "\ufeff"),
    *("'", '"', '"\\ud800"', '"\\U99999999"', "\\", "#", " # x", "%YAML 1.99\n", "@", "`", "\t", "~", "null", "true"),
    *("---\n", "...\n", "1", "-1", "1e400", ".inf", ".nan", "9" * 5000, "0x_", "0o9", "1:99", "2024-99-99"),
    *("\x85", "\u2028", "\x00", "\x07", "seed: ", "tree: ", "extends: ", "mine", "smoke: ", "name: ", "model: "),
]  # fmt: skip
pieces = st.sampled_from(TOKENS) | st.text(max_size=3)
scraps = st.lists(pieces, max_size=25).map("".join)


def is_recipe_or_refused(path: Path, overrides: dict[str, Any] | None = None, smoke: bool = False) -> None:
    try:
        load_recipe(path, overrides, smoke, folders=[builtin_folder()])
    except BranchTreeError as error:
        assert str(error).strip()


@few
@given(text=scraps, base=st.booleans(), smoke=st.booleans())
def test_any_text_is_a_recipe_or_is_refused(
    text: str, base: bool, smoke: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.getbasetemp(), (BASE if base else "") + text)
    is_recipe_or_refused(path, smoke=smoke)


@few
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_recipe_or_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    is_recipe_or_refused(write(tmp_path_factory.getbasetemp(), content))


@few
@given(
    name=st.sampled_from(["quickstart", "flux_t2i_mixgrpo", "wan_t2v_motion"]),
    cuts=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 30), pieces), min_size=1, max_size=3),
    smoke=st.booleans(),
)
def test_a_damaged_recipe_is_a_recipe_or_is_refused(
    name: str, cuts: Sequence[tuple[int, int, str]], smoke: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = (
        (builtin_folder() / f"{name}.yaml")
        .read_text(encoding="utf-8")
        .replace("methods/", f"{builtin_folder()}/methods/")
    )
    for place, length, piece in cuts:
        start = place % len(text)
        text = text[:start] + piece + text[start + length :]
    is_recipe_or_refused(write(tmp_path_factory.getbasetemp(), text, "damaged.yaml"), smoke=smoke)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**299)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def schema_keys() -> list[str]:
    """Every key of a recipe, dotted, and some that are none."""
    keys = [
        "",
        "x",
        "rewards.0",
        "rewards.0.weight",
        "rewards.1.label",
        "data.prompts.0",
        "smoke",
        "extends",
        "tree.draw.first",
    ]
    for name, field in Schema.model_fields.items():
        section = field.annotation
        keys += [name, *(f"{name}.{inner}" for inner in getattr(section, "model_fields", {}))]
    return sorted(keys)


@few
@given(changed=st.dictionaries(st.sampled_from(schema_keys()), values, max_size=2))
def test_any_values_make_a_recipe_or_are_refused(
    changed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = yaml.safe_load(BASE)
    data |= {key: value for key, value in changed.items() if "." not in key}
    path = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(data), "values.yaml")
    is_recipe_or_refused(path, {key: value for key, value in changed.items() if "." in key})


@limits(thorough, max_examples=100)
@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(schema_keys()) | st.text(st.characters(), max_size=6), scraps | st.text(st.characters())
        ),
        min_size=1,
        max_size=2,
    )
)
def test_any_overrides_make_a_recipe_or_are_refused(words: Sequence[tuple[str, str]]) -> None:
    try:
        load_recipe(
            "quickstart", parse_overrides([f"{key}={value}" for key, value in words]), folders=[builtin_folder()]
        )
    except BranchTreeError as error:
        assert str(error).strip()


@few
@given(text=st.text(st.characters(), max_size=12) | scraps)
def test_any_plugin_text_is_read_or_refused(text: str) -> None:
    try:
        name, settings = parse_plugin("reward", text, "digits classifier=heldout")
    except RecipeError as error:
        assert str(error).strip()
    else:
        assert isinstance(name, str) and isinstance(settings, dict)
