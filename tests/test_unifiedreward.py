"""The `unifiedreward` reward: its questions and how answers are read, in this process and by a real model server.

No published weights are needed. The small checkpoint has the published layout and answers in the right form; what it
says is checked against transformers used as the publisher's script uses it, one picture at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.small.unifiedreward import numbers, write_silent, write_small_unifiedreward
from branchtree_rewards.unifiedreward.reward import UnifiedReward, UnifiedRewardConfig
from branchtree_rewards.unifiedreward.templates import FILES, NoScore, Spoken, fill_template, read_axes, read_field
from patience import PATIENCE
from safetensors.torch import load_file, save_file

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media
from branchtree.plugins.protocols import ReleasesMemory
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
PROMPTS = ["a red fox in the snow", "the digit seven", "seven {} [birds]", "ein blauer Vogel über dem See", "."]
DIGESTS = {
    "semantic": "776575c9a5e4e8999b820f7459407c0722e267803eec7ff331dc73fb005f26d5",
    "score": "b691b5ff2d2a0a37f8d1e75c926b4f580fb8130069eb25ad0271600874c52904",
    "acs_v2": "26b7b69f0ac7e57191730fa7fb4130737af3dce280c3320ffaec8013d68594c2",
    "flowgrpo_llava": "3559dc09e406ed6821f78719fd3ef078cbcb99ebb2e76706350c9c7f585598b7",
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talker")
    write_small_unifiedreward(folder)
    return folder


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silent")
    write_silent(folder)
    return folder


@pytest.fixture
def copy(talker: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(talker, tmp_path / "copy"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of `transformers serve`, which loads the folder that a request names as its model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu", "--host", "127.0.0.1"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, "HF_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(PATIENCE)


def pictures(count: int = 5) -> Media:
    generator = torch.Generator().manual_seed(11)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return Media(images=torch.nn.functional.interpolate(coarse, size=(48, 64), mode="bilinear"))


def loaded(**settings: Any) -> UnifiedReward:
    reward = UnifiedReward(UnifiedRewardConfig(**settings))
    reward.load(CPU)
    return reward


def scored(reward: UnifiedReward, media: Media | None = None) -> Scores:
    return reward.score(media or pictures(), [Condition(prompt) for prompt in PROMPTS])


def as_published(folder: Path, template: str) -> list[str]:
    """Answers made as the publisher's script makes them."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    text = resources.files("branchtree_rewards").joinpath("data", FILES[template]).read_text(encoding="utf-8")
    answers = []
    for picture, prompt in zip(to_pil(pictures().images), PROMPTS, strict=True):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text.replace("{}", prompt)}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[chat], images=[picture], padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)[:, inputs.input_ids.shape[1] :]
        answers += processor.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return answers


@pytest.mark.parametrize("template", FILES)
def test_templates_are_the_published_ones_to_the_byte(template: str) -> None:
    data = resources.files("branchtree_rewards").joinpath("data", FILES[template]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == DIGESTS[template]
    assert data.count(b"{}") == 1


@pytest.mark.parametrize("template", FILES)
def test_a_caption_is_put_in_as_it_is(template: str) -> None:
    caption = "{} {0} a [cat] \\n über\n%s"
    head, _, _ = fill_template(template, "MARK").partition("MARK")
    assert fill_template(template, caption) == f"{head}{caption}]"
    assert head.endswith("Text Caption: [")


FINAL = [
    ("Final Score: 3", 3.0),
    ("Final Score:3.25", 3.25),
    ("Final Score: 0", 0.0),
    ("Final Score: 5.0000", 5.0),
    ("Final Score: 2.694700002670288\n", 2.694700002670288),
    ("**Final Score:** 3.5", 3.5),
    ("**Final Score: 3.5**", 3.5),
    ("**Final Score**: **3.5**", 3.5),
    ("Final Score: 4/5", 4.0),
    ("Final Score: 4.", 4.0),
    ("Final Score: 4, for its colours", 4.0),
    ("Final Score:\n4", 4.0),
    ("Final Score: 1\nOn reflection,\nFinal Score: 2", 2.0),
    ("Final Score: 10", "not between 0 and 5"),
    ("Final Score: 5.5", "not between 0 and 5"),
    ("Final Score: 99999999999999999999999999", "not between 0 and 5"),
    ("Final Score: 8/10", "no number follows"),
    ("Final Score: 4/50", "no number follows"),
    ("Final Score: -3", "no number follows"),
    ("Final Score: 1e3", "no number follows"),
    ("Final Score: 3-4", "no number follows"),
    ("Final Score: 3.1.4", "no number follows"),
    ("Final Score: 3,5", "no number follows"),
    ("Final Score: 80%", "no number follows"),
    ("Final Score: nan", "no number follows"),
    ("Final Score: .5", "no number follows"),
    ("Final Score: \u0663", "no number follows"),
    ("Final Score: 3\nFinal Score: nan", "no number follows"),
    ("Final Score:", "no number follows"),
    ("Final Score 3", "no 'Final Score:'"),
    ("final score: 3", "no 'Final Score:'"),
    ("", "it is empty"),
]


@pytest.mark.parametrize(("text", "wanted"), FINAL)
def test_reading_a_final_score(text: str, wanted: float | str) -> None:
    read = read_field(Spoken(text), "final")
    if isinstance(wanted, str):
        assert isinstance(read, NoScore)
        assert wanted in read.reason
    else:
        assert read == wanted


def test_a_reason_quotes_the_end_of_the_answer_and_no_more() -> None:
    read = read_field(Spoken("word " * 5000 + "the very\x00 end"), "final")
    assert isinstance(read, NoScore)
    assert read.reason.endswith("the very\ufffd end'")
    assert len(read.reason) < 200


AXES = "Alignment Score (1-5): {}\n**Coherence Score (1-5):** {}\nStyle Score (1-5): {}"


@pytest.mark.parametrize(
    ("field", "numbers", "wanted"),
    [
        ("alignment", ("2.5", "3", "4"), 2.5),
        ("coherence", ("2.5", "3", "4"), 3.0),
        ("style", ("2.5", "3", "4"), 4.0),
        ("mean", ("2.5", "3", "4"), 9.5 / 3),
        ("alignment", ("2.5", "nan", "0.5"), 2.5),
        ("style", ("2.5", "3", "0.5"), "'Style Score (1-5): 0.5' is not between 1 and 5"),
        ("mean", ("2.5", "nan", "4"), "no number follows 'Coherence Score (1-5):'"),
        ("final", ("2.5", "3", "4"), "no 'Final Score:'"),
    ],
)
def test_reading_an_axis(field: str, numbers: tuple[str, ...], wanted: float | str) -> None:
    read = read_field(Spoken(AXES.format(*numbers)), field)
    if isinstance(wanted, str):
        assert isinstance(read, NoScore)
        assert wanted in read.reason
    else:
        assert read == pytest.approx(wanted, abs=1e-12)


def test_axes_that_are_not_there_are_nan() -> None:
    spoken = Spoken(AXES.format("2", "nan", "4"))
    assert str(read_axes(spoken, "acs_v2")) == "{'alignment': 2.0, 'coherence': nan, 'style': 4.0}"
    assert str(read_axes(spoken, "score")) == "{'alignment': nan, 'coherence': nan, 'style': nan}"


def test_a_number_at_the_end_of_a_cut_off_answer_may_lack_digits() -> None:
    cut = read_field(Spoken("Final Score: 1", complete=False), "final")
    assert isinstance(cut, NoScore)
    assert "cut off within the number" in cut.reason
    assert read_field(Spoken("Final Score: 1\nSince", complete=False), "final") == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "score", "field": "alignment"}, "template 'score' has no field 'alignment'; it has final"),
        ({"field": "final"}, "'semantic' has no field 'final'; it has alignment, coherence, style, mean"),
        ({"server": "127.0.0.1:8080/v1"}, "no base URL; write it like http://127.0.0.1:8080/v1"),
        ({"server": "http://me:secret@host/v1"}, "api_key_env"),
        ({"server": "http://host/v1", "path": "some/where"}, "path belong to a model in this process"),
        ({"timeout": 3, "model": "X"}, "model, timeout belong to a server"),
        ({"scale": "x"}, "no scale"),
        ({"colour": 1}, "colour"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        UnifiedRewardConfig(**settings)


def test_the_small_model_takes_the_place_of_a_server() -> None:
    reward = loaded(path="random:small", server="http://127.0.0.1:9/v1", model="X")
    assert scored(reward).valid.all()


def test_it_is_registered() -> None:
    entry = registry().reward("unifiedreward")
    assert entry.card is not None
    assert entry.card.checkpoint == UnifiedRewardConfig().path
    assert isinstance(entry.build(entry.config()), ReleasesMemory)


def test_before_loading_and_for_other_media_it_says_so() -> None:
    reward = UnifiedReward(UnifiedRewardConfig(path="random:small"))
    with pytest.raises(RuntimeError, match="not loaded"):
        scored(reward)
    reward.load(CPU)
    with pytest.raises(ValueError, match="scores image, not video"):
        scored(reward, Media(videos=torch.zeros(5, 2, 3, 8, 8)))
    with pytest.raises(ValueError, match="5 conditions"):
        scored(reward, pictures(4))


@pytest.mark.parametrize(("template", "field"), [("semantic", "coherence"), ("flowgrpo_llava", "final")])
def test_scores_are_those_of_the_publishers_script(talker: Path, template: str, field: str) -> None:
    scores = scored(loaded(path=str(talker), template=template, field=field, scale="div5", batch=3))
    label = "Final Score" if field == "final" else r"Coherence Score \(1-5\)"
    said = [float(re.search(rf"{label}: ([0-9.]+)", text)[1]) for text in as_published(talker, template)]
    torch.testing.assert_close(scores.raw, torch.tensor(said), atol=0, rtol=0)
    torch.testing.assert_close(scores.values, torch.tensor(said) / 5)
    assert scores.valid.all()
    assert len(set(said)) > 2
    assert scores.details["style"].isnan().all() == (field == "final")


def test_a_score_does_not_depend_on_its_batch_mates(talker: Path) -> None:
    together = scored(loaded(path=str(talker), batch=5))
    alone = scored(loaded(path=str(talker), batch=1))
    assert torch.equal(together.raw, alone.raw)
    assert torch.equal(together.details["style"], alone.details["style"])


def test_a_sample_that_is_not_finite_changes_no_other(talker: Path) -> None:
    reward, media = loaded(path=str(talker), offload=True), pictures()
    whole = scored(reward, media)
    reward.release()
    assert media.images is not None
    media.images[2] = torch.inf
    scores = scored(reward, media)
    assert scores.reasons == {2: "pixels are not finite"}
    others = [0, 1, 3, 4]
    assert torch.equal(scores.raw[others], whole.raw[others])
    assert scores.raw[2].isnan()


def test_an_answer_of_limited_length(talker: Path) -> None:
    """It says a heading with its number in each token: alignment, coherence, style, final; then it ends."""
    assert "no 'Final Score:'" in scored(loaded(path=str(talker), template="score", max_tokens=3)).reasons[0]
    assert "cut off within" in scored(loaded(path=str(talker), template="score", max_tokens=4)).reasons[0]
    assert scored(loaded(path=str(talker), template="score", max_tokens=5)).valid.all()
    assert scored(loaded(path=str(talker), template="semantic", max_tokens=2)).valid.all()


def test_a_model_that_says_no_score_is_masked(silent: Path) -> None:
    scores = scored(loaded(path=str(silent), max_tokens=12))
    assert not scores.valid.any()
    assert scores.values.isnan().all()
    assert list(scores.reasons) == [0, 1, 2, 3, 4]


def test_the_small_model_is_the_same_every_time_and_its_scores_vary(talker: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    write_small_unifiedreward(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in sorted(talker.iterdir())]
    for path in talker.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    media = pictures(40)
    raw = loaded(path=str(talker)).score(media, [Condition("a bird")] * 40).raw
    assert raw is not None
    assert raw.std() > 0.3
    assert len(raw.unique()) > 15
    assert {f"{value:.2f}" for value in raw.tolist()} <= set(numbers())


def test_its_weights_have_their_published_names(talker: Path) -> None:
    names = json.loads((talker / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.split(".")[0] for name in names} == {"visual", "model", "lm_head"}
    assert {"model.embed_tokens.weight", "model.norm.weight", "visual.merger.ln_q.weight"} <= names.keys()
    assert len(set(names.values())) > 1


def test_a_checkpoint_that_is_not_right_is_refused(copy: Path, talker: Path) -> None:
    shard = copy / "model-00001-of-00003.safetensors"
    with pytest.raises(RewardError, match="not the pinned"):
        loaded(path=str(copy), sha256={shard.name: "0" * 64})
    with pytest.raises(RewardError, match="its whole folder"):
        loaded(path=str(shard))
    weights = load_file(shard)
    lost = next(iter(weights))
    save_file({name: value for name, value in weights.items() if name != lost}, shard, {"format": "pt"})
    with pytest.raises(RewardError, match=f"do not fit the model: missing: .*{lost.rpartition('.')[0][-10:]}"):
        loaded(path=str(copy))
    save_file({**weights, "value_head.weight": torch.ones(1)}, shard, {"format": "pt"})
    index = copy / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["value_head.weight"] = shard.name
    index.write_text(json.dumps(listed))
    with pytest.raises(RewardError, match=r"unexpected: value_head\.weight"):
        loaded(path=str(copy))
    shard.unlink()
    with pytest.raises(RewardError, match=f"holds no '{shard.name}'"):
        loaded(path=str(copy))
    (copy / "chat_template.json").unlink()
    shutil.copy(talker / shard.name, shard)
    with pytest.raises(RewardError, match="no chat template"):
        loaded(path=str(copy))


def test_fingerprints_follow_weights_and_settings(talker: Path, silent: Path, copy: Path) -> None:
    print_of = lambda folder, **settings: loaded(path=str(folder), **settings).fingerprint()  # noqa: E731
    one = print_of(talker)
    assert one == print_of(copy, batch=2, offload=True)
    assert len({one, print_of(silent), print_of(talker, field="mean"), print_of(talker, resize=32)}) == 4


def test_a_real_server_says_what_the_model_in_this_process_says(served: str, talker: Path, silent: Path) -> None:
    for template in ("semantic", "score"):
        remote = loaded(server=served, model=str(talker), image_format="png", template=template, wait=60)
        there, here = scored(remote), scored(loaded(path=str(talker), template=template))
        assert there.valid.all()
        assert torch.equal(there.raw, here.raw)
        for name in there.details:
            assert torch.equal(there.details[name].nan_to_num(), here.details[name].nan_to_num())
    assert "cut off" in scored(loaded(server=served, model=str(talker), template="score", max_tokens=4)).reasons[0]

    scores = scored(loaded(server=served, model=str(silent), max_tokens=12, concurrency=3))
    assert not scores.valid.any()
    assert scores.values.isnan().all()
    assert all("no 'Alignment Score (1-5):'" in scores.reasons[row] for row in range(5))

    with pytest.raises(RewardError, match="does not serve '/nowhere'"):
        loaded(server=served, model="/nowhere", retries=0)
