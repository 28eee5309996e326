"""The `geneval` reward: its rules against a plain reading of GenEval's, its models' use against transformers' own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from branchtree_rewards.geneval.check import COLOURS, read_check
from branchtree_rewards.geneval.colours import TEXTS, ColourNamer, cut_out
from branchtree_rewards.geneval.detector import MOST, Limits, find_objects
from branchtree_rewards.geneval.reward import Geneval, GenevalConfig
from branchtree_rewards.geneval.rules import Box, Found, judge, positions
from branchtree_rewards.small.geneval import write_small_geneval
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from branchtree import evaluate, load_recipe, score
from branchtree.data.prompts import check_for_rewards, load_conditions
from branchtree.errors import DataError
from branchtree.planning.plan import plan_recipe
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry
from branchtree.testing import noise_media
from branchtree.training.inputs import read_inputs

CPU = torch.device("cpu")
LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "two_object",
        "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}],
        "prompt": "a photo of a bench and a sports ball",
    },
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a photo of a pink car"},
    {
        "tag": "position",
        "include": [{"class": "kite", "count": 1}, {"class": "wine glass", "count": 1, "position": ["above", 0]}],
        "prompt": "a photo of a wine glass above a kite",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "bus", "count": 1, "color": "green"},
            {"class": "microwave", "count": 1, "color": "purple"},
        ],
        "prompt": "a photo of a green bus and a purple microwave",
    },
]
"""One line of each kind in GenEval's file."""


def asked(**metadata: Any) -> Condition:
    return Condition("a picture", metadata=metadata)


def loaded(path: Path | str, **settings: Any) -> Geneval:
    reward = Geneval(GenevalConfig(path=str(path), **settings))
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("geneval") / "small"
    at.mkdir()
    write_small_geneval(at)
    return at


@pytest.fixture(scope="module")
def reward(folder: Path) -> Geneval:
    return loaded(folder)


def networks(reward: Geneval) -> tuple[Any, Any]:
    """The detector and the CLIP."""
    detector, clip = reward._require_opened().network.children()
    return detector, clip


# What is asked for


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def test_genevals_own_file_is_read_as_it_is(prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    conditions = load_conditions(str(prompts), "prompt", "train")
    check_for_rewards([Geneval(GenevalConfig())], conditions)
    assert not caplog.records
    checks = [read_check(condition) for condition in conditions]
    assert [check.tag for check in checks] == [line["tag"] for line in LINES]
    assert checks[4].include[1].position == ("above", 0)
    assert checks[5].include[1].color == "purple"
    assert checks[2].exclude[0].count == 3
    assert checks[5].names == ("bus", "microwave")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, 'its metadata have no "include" and no "exclude"'),
    ({"include": []}, "there is nothing to look for"),
    ({"include": {"class": "cat", "count": 1}}, r"include: input should be a valid tuple \(it is \{"),
    ({"include": ["cat"]}, r"include\.0: input should be a valid dictionary .*\(it is 'cat'\)"),
    ({"include": [{"count": 1}]}, r"include\.0\.class: field required"),
    ({"include": [{"class": "cat"}]}, r"include\.0\.count: field required"),
    ({"include": [{"class": " ", "count": 1}]}, r"include\.0\.class: the name is empty"),
    ({"include": [{"class": 3, "count": 1}]}, r"include\.0\.class: input should be a valid string \(it is 3\)"),
    ({"include": [{"class": "cat", "count": 0}]}, r"include\.0\.count: .*greater than or equal to 1 \(it is 0\)"),
    ({"include": [{"class": "cat", "count": "2"}]}, r"include\.0\.count: input should be a valid integer"),
    ({"include": [{"class": "cat", "count": True}]}, r"include\.0\.count: input should be a valid integer"),
    ({"include": [{"class": "cat", "count": 1, "colour": "red"}]}, r"include\.0\.colour: extra inputs"),
    ({"include": [{"class": "cat", "count": 1, "color": "teal"}]}, r"include\.0\.color: .*'red', .*\(it is 'teal'\)"),
    (
        {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},
        r"include\.0\.position: the index 0 must be that of an entry before it",
    ),
    (
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}]},
        r"include\.1\.position\.0: .*'left of'",
    ),
    ({"exclude": [{"class": "cat", "count": 1, "color": "red"}]}, r"exclude\.0\.color: extra inputs"),
]


@pytest.mark.parametrize(("metadata", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_metadata_are_refused_with_file_and_line(metadata: dict[str, Any], message: str, prompts: Path) -> None:
    with prompts.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "a cat", **metadata}) + "\n")
    conditions = load_conditions(str(prompts), "prompt", "train")
    with pytest.raises(DataError, match=rf"evaluation_metadata\.jsonl:7: 'a cat': geneval: {message}") as caught:
        check_for_rewards([Geneval(GenevalConfig())], conditions)
    assert len(str(caught.value).splitlines()) == 1


def test_training_planning_and_scoring_check_before_anything_is_loaded(prompts: Path, tmp_path: Path) -> None:
    """The weights are not there, and it does not come to that."""
    rewards = [{"reward": "geneval", "path": "/nowhere"}]
    changes = {"rewards": rewards, "data.prompts": str(prompts), "evaluation": None}
    assert len(read_inputs(load_recipe("quickstart", changes)).conditions) == len(LINES)
    held_out = {"rewards": rewards, "prompts": str(tmp_path / "plain.txt")}
    (tmp_path / "plain.txt").write_text("a cat\n", encoding="utf-8")
    for overrides, where in (
        ({**changes, "data.prompts": str(tmp_path / "plain.txt")}, r"plain\.txt:1"),
        ({"evaluation": held_out}, r"plain\.txt:1"),
    ):
        for reads in (read_inputs, plan_recipe):
            with pytest.raises(DataError, match=rf"{where}: 'a cat': geneval: its metadata have no"):
                reads(load_recipe("quickstart", overrides))
    with pytest.raises(DataError, match=r"plain\.txt:1: 'a cat': geneval: its metadata have no"):
        evaluate("quickstart", rewards=["geneval path=/nowhere"], prompts=tmp_path / "plain.txt")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", **LINES[0]}, {"image": "a.png", "prompt": "a dog"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"list\.jsonl:2: 'a dog': geneval: its metadata have no .*a\.png"):
        score(tmp_path / "list.jsonl", "geneval path=/nowhere", device="cpu")


def test_listed_pictures_are_scored_by_their_rows(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", **line}) + "\n" for line in LINES), encoding="utf-8")
    found = [one.scores["geneval"] for one in score(path, "geneval path=random:small", device="cpu")]
    assert all(one.valid and one.value is not None and 0 <= one.value <= 1 for one in found)


# The rules


class Plain:
    """GenEval's evaluation of one picture, step by step, with boxes as arrays."""

    @staticmethod
    def relations(a: np.ndarray, b: np.ndarray) -> set[str]:
        centres = np.array([(a[:2] + a[2:]) / 2, (b[:2] + b[2:]) / 2])
        sizes = np.abs(np.array([a[2:] - a[:2], b[2:] - b[:2]]))
        offset = centres[0] - centres[1]
        revised = np.maximum(np.abs(offset) - 0.1 * sizes.sum(axis=0), 0) * np.sign(offset)
        if (np.abs(revised) < 1e-3).all():
            return set()
        dx, dy = revised / np.linalg.norm(offset)
        named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
        return {name for name, holds in named.items() if holds}

    @classmethod
    def correct(cls, metadata: dict[str, Any], objects: dict[str, list[tuple[np.ndarray, str]]]) -> bool:
        correct, groups = True, []
        for wanted in metadata.get("include", []):
            matched, found = True, objects.get(wanted["class"], [])[: wanted["count"]]
            if len(found) < wanted["count"]:
                matched = False
            else:
                if "color" in wanted and [colour for _, colour in found].count(wanted["color"]) < wanted["count"]:
                    matched = False
                if "position" in wanted and matched:
                    relation, target = wanted["position"]
                    if groups[target] is None:
                        matched = False
                    else:
                        for (box, _), (other, _) in itertools.product(found, groups[target]):
                            matched = matched and relation in cls.relations(box, other)
            correct = correct and matched
            groups.append(found if matched else None)
        for unwanted in metadata.get("exclude", []):
            if len(objects.get(unwanted["class"], [])) >= unwanted["count"]:
                correct = False
        return correct


corner = st.sampled_from((0, 1, 5, 12, 30, 60))
boxes = st.tuples(corner, corner, st.integers(1, 8), st.integers(1, 8)).map(
    lambda box: (float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3]))
)
SHADES = ("red", "blue")
listed = st.lists(st.tuples(boxes, st.sampled_from(SHADES)), min_size=1, max_size=3)
objects_of = st.one_of(
    st.fixed_dictionaries({"cat": listed, "dog": listed}), st.fixed_dictionaries({}, optional={"cat": listed})
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, list[tuple[Box, str]]]]:
    """Objects, and metadata that they often are as asked by: half of what is asked for is read off them."""
    objects = draw(objects_of)
    include: list[dict[str, Any]] = []
    for index, name in enumerate(("cat", "dog")[: draw(st.integers(1, 2))]):
        there = objects.get(name, [])
        wanted: dict[str, Any] = {"class": name, "count": draw(st.sampled_from((1, 1, max(len(there), 1), 2)))}
        if draw(st.booleans()):
            wanted["color"] = draw(st.sampled_from((*SHADES, *(colour for _, colour in there[:1]))))
        if index and draw(st.booleans()):
            read = {"above"}
            if there and "cat" in objects:
                read |= Plain.relations(np.array(there[0][0]), np.array(objects["cat"][0][0]))
            wanted["position"] = [draw(st.sampled_from(sorted(read))), 0]
        include.append(wanted)
    exclude = [{"class": "cat", "count": draw(st.integers(2, 4))}] if draw(st.booleans()) else []
    return {"include": include, "exclude": exclude}, objects


def verdict(metadata: dict[str, Any], objects: dict[str, list[tuple[Box, str]]]) -> list[bool]:
    """What the rules say of boxes with known colours."""
    shades: dict[float, str] = {}  # by confidence, of which no two are equal
    known: dict[str, list[Found]] = {}
    for name, listed in objects.items():
        for box, colour in listed:
            confidence = 1 - len(shades) / 100
            known.setdefault(name, []).append(Found(box, confidence))
            shades[confidence] = colour
    return judge(read_check(asked(**metadata)), known, lambda name, found: [shades[one.confidence] for one in found])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_rules_are_genevals(case: tuple[dict[str, Any], dict[str, list[tuple[Box, str]]]]) -> None:
    metadata, objects = case
    arrays = {name: [(np.array(box), colour) for box, colour in listed] for name, listed in objects.items()}
    held = verdict(metadata, objects)
    event(f"{'all' if all(held) else 'not all'} hold{', with a position' * ('position' in str(metadata))}")
    assert all(held) == Plain.correct(metadata, arrays)
    conditions = [1 + ("color" in one) + ("position" in one) for one in metadata["include"]]
    assert len(held) == sum(conditions) + len(metadata["exclude"])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(boxes, boxes)
def test_positions_are_genevals(one: Box, other: Box) -> None:
    assert positions(one, other) == Plain.relations(np.array(one), np.array(other))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((42, 41, 62, 61), set()),  # nearer than a tenth of both sizes
        ((40, 40, 60, 60), set()),
        ((30, 40, 50, 60), {"left of"}),
    ],
)
def test_positions_by_hand(one: Box, expected: set[str]) -> None:
    assert positions(one, (40.0, 40.0, 60.0, 60.0)) == expected


def test_the_share_counts_what_holds() -> None:
    left, right = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)
    metadata = {
        "include": [
            {"class": "cat", "count": 1, "color": "red"},
            {"class": "dog", "count": 2, "color": "blue", "position": ["right of", 0]},
        ],
        "exclude": [{"class": "dog", "count": 3}],
    }
    cat, dogs = [(left, "red")], [(right, "blue"), (right, "blue")]
    assert verdict(metadata, {"cat": cat, "dog": dogs}) == [True] * 6
    # one dog too few: neither its colour nor its position can hold
    assert verdict(metadata, {"cat": cat, "dog": dogs[:1]}) == [True, True, False, False, False, True]
    # a third one, less sure: only its number is wrong
    assert verdict(metadata, {"cat": cat, "dog": [*dogs, (left, "red")]}) == [True] * 5 + [False]
    # the cat has another colour: no dog can be right of a red one
    assert verdict(metadata, {"cat": [(left, "blue")], "dog": dogs}) == [True, False, True, True, False, True]
    assert verdict(metadata, {}) == [False] * 5 + [True]


# The detector


def naive_objects(
    folder: Path, picture: Image.Image, names: Sequence[str], threshold: float, overlap: float
) -> dict[str, list[tuple[list[float], float]]]:
    """Objects by the library's own processor, one picture at a time, with suppression written out."""
    from transformers import CLIPTokenizerFast, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    side, context = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    tokenizer = CLIPTokenizerFast.from_pretrained(folder, model_max_length=context)
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": side, "width": side}), tokenizer)
    texts = [[f"a photo of a {name}" for name in names]]
    inputs = processor(text=texts, images=picture, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    [result] = processor.post_process_grounded_object_detection(
        outputs, threshold=threshold, target_sizes=[(picture.height, picture.width)]
    )
    found: dict[str, list[tuple[list[float], float]]] = {}
    for index in torch.argsort(-result["scores"]).tolist():
        left, top, right, bottom = result["boxes"][index].tolist()
        box = [max(left, 0.0), max(top, 0.0), min(right, picture.width), min(bottom, picture.height)]
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            continue
        kept = found.setdefault(names[int(result["labels"][index])], [])
        if all(shared(box, other) <= overlap for other, _ in kept):
            kept.append((box, float(result["scores"][index])))
    return {name: kept[:MOST] for name, kept in found.items() if kept}


def shared(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    both = max(across, 0) * max(down, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


@pytest.mark.parametrize("size", [(40, 48), (150, 70)])
def test_objects_are_those_of_the_librarys_own_processor(size: tuple[int, int], folder: Path, reward: Geneval) -> None:
    media = noise_media("image", 3).pixels
    pixels = (torch.nn.functional.interpolate(media, size, mode="bilinear") * 255).round() / 255
    names = [["cat"], ["cat", "wine glass", "dog"], ["bench", "cat"]]
    limits = [Limits(0.1, 0.5), Limits(0.2, 0.3), Limits(0.05, 1.0)]
    detector, _ = networks(reward)
    with torch.no_grad():
        together = find_objects(detector, reward._tokenizer, pixels, names, limits)
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for array, classes, limit, objects in zip(arrays, names, limits, together, strict=True):
        expected = naive_objects(folder, Image.fromarray(array), classes, limit.threshold, limit.overlap)
        assert {name: len(found) for name, found in objects.items()} == {
            name: len(found) for name, found in expected.items()
        }
        for name, found in objects.items():
            for one, (box, confidence) in zip(found, expected[name], strict=True):
                assert one.box == pytest.approx(box, abs=1e-3)
                assert one.confidence == pytest.approx(confidence, abs=1e-5)
    assert sum(len(found) for objects in together for found in objects.values()) > 5


def test_a_counted_class_is_judged_by_its_own_threshold(folder: Path) -> None:
    media = noise_media("image", 4)
    plain = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]}
    lenient = loaded(folder, threshold=0.01, counting_threshold=0.99)
    assert lenient.score(media, [asked(**plain)] * 4).values.tolist() == [0.5] * 4  # too many
    assert lenient.score(media, [asked(**plain, tag="counting")] * 4).values.tolist() == [0.5] * 4  # none
    none = {"exclude": [{"class": "cat", "count": 1}]}
    assert lenient.score(media, [asked(**none)] * 4).values.tolist() == [0.0] * 4
    assert lenient.score(media, [asked(**none, tag="counting")] * 4).values.tolist() == [1.0] * 4


# Colours


def test_colours_are_clips_zero_shot_classes(folder: Path, reward: Geneval) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
    from transformers import CLIPModel, CLIPTokenizerFast

    model = CLIPModel.from_pretrained(folder / "clip").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "clip")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    transform = Compose([Resize(28, InterpolationMode.BICUBIC), CenterCrop(28), ToTensor(), Normalize(mean, std)])
    weights = []
    with torch.no_grad():
        for colour in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"):
            texts = [
                f"a photo of a {colour} car",
                f"a photo of a {colour}-colored car",
                f"a photo of a {colour} object",
            ]
            encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
            features = model.get_text_features(encoded["input_ids"]).pooler_output
            features = (features / features.norm(dim=-1, keepdim=True)).mean(dim=0)
            weights.append(features / features.norm())
    _, clip = networks(reward)
    namer = ColourNamer(reward._namer._tokenizer)
    classifier = torch.stack(weights)
    torch.testing.assert_close(namer.classifier(clip, "car"), classifier, rtol=0, atol=1e-6)
    picture = Image.fromarray((noise_media("image", 1).pixels[0] * 255).byte().permute(1, 2, 0).numpy())
    spots: list[Box] = [
        (0.0, 0.0, 48.0, 40.0),
        (3.4, 5.6, 20.2, 11.0),
        (10.0, 2.0, 14.0, 39.5),
        (30.0, 20.0, 47.0, 39.0),
    ]
    with torch.no_grad():
        named = namer.name(clip, picture, "car", [Found(box, 1.0) for box in spots])
        for box, colour in zip(spots, named, strict=True):
            features = model.get_image_features(transform(picture.crop(box))[None]).pooler_output
            assert colour == COLOURS[int((features @ classifier.T).argmax())]
    assert len(TEXTS) == 3


def test_a_cut_has_at_least_one_pixel() -> None:
    picture = Image.new("RGB", (10, 8))
    for box in ((1.5, 1.5, 2.5, 2.5), (9.6, 7.6, 10.0, 8.0), (0.0, 0.0, 10.0, 8.0)):
        cut = cut_out(picture, box)
        assert cut.width >= 1 and cut.height >= 1
    assert cut_out(picture, (0.0, 0.0, 10.0, 8.0)).size == (10, 8)
    assert cut_out(picture, (1.4, 2.6, 5.6, 6.4)).size == picture.crop((1.4, 2.6, 5.6, 6.4)).size == (5, 3)


# Samples


MANY = [asked(**{key: value for key, value in line.items() if key != "prompt"}) for line in LINES]


def test_a_score_does_not_depend_on_its_neighbours(folder: Path, reward: Geneval) -> None:
    media = noise_media("image", len(MANY))
    together = reward.score(media, MANY)
    alone = loaded(folder, batch=1).score(media, MANY)
    assert together.valid.all()
    assert together.values.equal(alone.values)
    assert together.values.unique().numel() > 1


def test_strict_scores_are_one_or_nothing(folder: Path, reward: Geneval) -> None:
    media = noise_media("image", len(MANY))
    soft, strict = reward.score(media, MANY), loaded(folder, strict=True).score(media, MANY)
    assert soft.values.equal(soft.details["share"])
    assert strict.values.equal((soft.values == 1).float())
    assert strict.values.equal(strict.details["correct"])
    assert soft.details["correct"].equal(strict.details["correct"])


def test_what_cannot_be_asked_is_masked(reward: Geneval) -> None:
    media = noise_media("image", 4)
    long = {"class": "cat of the north " * 8, "count": 1}
    conditions = [
        asked(include=[{"class": "cat", "count": 1}]),
        Condition("a cat"),
        asked(include=[{"class": "a <|endoftext|> cat", "count": 1}]),
        asked(include=[long]),
    ]
    scores = reward.score(media, conditions)
    assert scores.valid.tolist() == [True, False, False, False]
    assert "have no" in scores.reasons[1]
    assert "class 'a <|endoftext|> cat': the name holds the special token" in scores.reasons[2]
    assert "the name is too long" in scores.reasons[3]


def test_the_small_checkpoint_is_the_same_each_time_and_leaves_randomness_alone(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_small_geneval(tmp_path)
    assert torch.get_rng_state().equal(before)
    for name in ("model.safetensors", "clip/model.safetensors", "vocab.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_registered() -> None:
    entry = registry().reward("geneval")
    assert entry.card is not None
    assert entry.card.modalities == {"image"}
    assert entry.config().path == "google/owlv2-base-patch16-ensemble"


def test_pixels_of_one_channel_are_seen_as_grey(reward: Geneval) -> None:
    grey = Media(images=noise_media("image", 2).pixels[:, :1])
    threefold = Media(images=grey.pixels.expand(-1, 3, -1, -1))
    assert reward.score(grey, MANY[:2]).values.equal(reward.score(threefold, MANY[:2]).values)
