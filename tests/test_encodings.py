"""Encoded prompts on disk, and encoders that are read only when they are needed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from tiny_flux import tiny_flux
from torch import Tensor
from training_runs import metrics, small, weights

from branchtree import train
from branchtree.errors import ModelError
from branchtree.plugins import Condition
from branchtree.testing.probe import require_equal
from branchtree.training.conditioning import IDLE_REQUESTS, ConditioningCache
from branchtree.training.encodings import EncodingStore, open_store, user_folder

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Encoder:
    """A model that encodes a prompt as its length, in bfloat16, and counts what it is asked."""

    def __init__(self, fingerprint: str | None = "a") -> None:
        self.fingerprint = fingerprint
        self.asked: list[str] = []
        self.dropped = 0

    def encoding_fingerprint(self) -> str | None:
        return self.fingerprint

    def encode(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        self.asked += [condition.prompt for condition in conditions]
        lengths = torch.tensor([[len(condition.prompt)] * 4 for condition in conditions])
        return {"text": (lengths / 7).to(torch.bfloat16), "mask": lengths > 1}

    def release_frozen(self) -> None:
        """Nothing is on a device."""

    def drop_encoders(self) -> None:
        self.dropped += 1


def cache(root: Path, model: Encoder, gibibytes: float = 1.0) -> ConditioningCache:
    return ConditioningCache(model, store=open_store(str(root), gibibytes, model, CPU))  # type: ignore[arg-type]


def store(root: Path, limit: int = 10**9) -> EncodingStore:
    return EncodingStore(root, ["context"], limit)


def row(seed: int) -> dict[str, Tensor]:
    return {"text": torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)}


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_an_encoding_is_made_once_for_all_runs_and_keeps_every_bit(tmp_path: Path) -> None:
    conditions = [Condition("a"), Condition("bbb")]
    first, second = Encoder(), Encoder()
    made = cache(tmp_path, first).get(conditions, CPU)
    found = cache(tmp_path, second).get([*conditions, Condition("cc")], CPU)
    assert (first.asked, second.asked) == (["a", "bbb"], ["cc"])
    require_equal({name: value[:2] for name, value in found.items()}, dict(made))
    assert found["text"].dtype == torch.bfloat16 and found["mask"].dtype == torch.bool


def test_what_an_encoding_depends_on_is_in_its_key(tmp_path: Path) -> None:
    frame, other = tmp_path / "a.png", tmp_path / "b.png"
    frame.write_bytes(b"one")
    other.write_bytes(b"one")
    paths = {
        store(tmp_path).path(condition)
        for condition in (
            Condition("a"),
            Condition("b"),
            Condition("a", negative_prompt="b"),
            Condition("a", image=frame),
            Condition("a", last_image=frame),
            Condition("a", video=frame),
            Condition("a", image=frame, further_images=(frame,)),
            Condition("a", image=frame, further_images=(frame, frame)),
            Condition("a", metadata={"goal": [0, 1]}),
            Condition("a", metadata={"goal": [1, 0]}),
        )
    }
    paths.add(EncodingStore(tmp_path, ["another model"], 1).path(Condition("a")))
    assert len(paths) == 11
    before = store(tmp_path).path(Condition("a", image=frame))
    assert before == store(tmp_path).path(Condition("a", image=other))  # a file's name is not its content
    frame.write_bytes(b"two")
    assert before != store(tmp_path).path(Condition("a", image=frame))


def test_the_key_of_a_condition_with_one_image_stays_what_it_was(tmp_path: Path) -> None:
    frame = tmp_path / "a.png"
    frame.write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    described = json.dumps([["context"], "a", "b", [digest, None, None]])
    expected = hashlib.sha256(described.encode()).hexdigest()
    assert store(tmp_path).path(Condition("a", "b", image=frame)).stem == expected


class Scene(Encoder):
    """A model that encodes what the metadata says."""

    def encode(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        self.asked += [condition.prompt for condition in conditions]
        return {"goal": torch.tensor([condition.metadata["goal"] for condition in conditions])}


def test_one_prompt_with_other_metadata_is_encoded_by_itself(tmp_path: Path) -> None:
    """In memory and on the disk."""
    conditions = [Condition("reach", metadata={"goal": [i, 1.5]}) for i in range(3)]
    for asked in (3, 0):  # the second model finds them on the disk
        model = Scene()
        found = cache(tmp_path, model).get(conditions, CPU)["goal"]
        assert found.tolist() == [[0, 1.5], [1, 1.5], [2, 1.5]] and len(model.asked) == asked


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "misplaced"])
def test_a_damaged_entry_is_said_and_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = store(tmp_path)
    kept.write(Condition("a"), row(1))
    kept.write(Condition("b"), row(2))
    path = kept.path(Condition("a"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    damaged = {"flipped": content, "truncated": content[:-8], "empty": b""}
    path.write_bytes(damaged.get(damage, kept.path(Condition("b")).read_bytes()))
    with caplog.at_level(logging.WARNING, "branchtree"):
        assert kept.read(Condition("a")) is None
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert not path.exists()
    kept.write(Condition("a"), row(1))
    found = kept.read(Condition("a"))
    assert found is not None
    require_equal(dict(found), row(1))


def test_the_least_recently_used_give_way(tmp_path: Path) -> None:
    size = len(packed(tmp_path / "one"))
    kept = store(tmp_path / "many", limit=4 * size)
    for place, name in enumerate("abcd"):
        kept.write(Condition(name), row(place))
        os.utime(kept.path(Condition(name)), (place, place))
    assert kept.read(Condition("a")) is not None  # used now
    kept.write(Condition("e"), row(5))
    assert {name for name in "abcde" if kept.path(Condition(name)).exists()} == {"a", "d", "e"}


def packed(root: Path) -> bytes:
    """The file of an encoding."""
    store(root).write(Condition("a"), row(0))
    return store(root).path(Condition("a")).read_bytes()


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "branchtree"):
        held = cache(tmp_path / "file", Encoder())
        held.get([Condition("a")], CPU)
        held.get([Condition("b")], CPU)
    assert caplog.text.count("cannot be kept here") == 1


def test_nothing_is_kept_of_a_model_without_a_fingerprint(tmp_path: Path) -> None:
    for model in (Encoder(None), object()):
        assert open_store(str(tmp_path), 1.0, model, CPU) is None  # type: ignore[arg-type]
    assert open_store(None, 1.0, Encoder(), CPU) is None  # type: ignore[arg-type]


def test_the_users_folder_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_folder() == tmp_path / "cache/branchtree/embeddings"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder() == tmp_path / "home/.cache/branchtree/embeddings"


def test_encoders_without_work_are_dropped(tmp_path: Path) -> None:
    model = Encoder()
    held = cache(tmp_path, model)
    for _ in range(IDLE_REQUESTS):
        held.get([Condition("a")], CPU)
    assert model.dropped == 0
    held.get([Condition("a")], CPU)
    assert model.dropped == 1
    held.get([Condition("b")], CPU)
    assert model.asked == ["a", "b"] and model.dropped == 1


def flux(path: Path | str, **options: Any) -> Flux:
    adapter = Flux(FluxConfig(path=str(path), height=16, width=16, **options))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_encoders_come_when_they_are_needed_and_go_again(model: Path, tmp_path: Path) -> None:
    adapter = flux(model)
    pipeline = adapter.pipeline
    assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    first = adapter.encode([Condition("a three")])
    assert pipeline.text_encoder is not None and not any(p.requires_grad for p in pipeline.text_encoder_2.parameters())
    adapter.drop_encoders()
    assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    require_equal(dict(adapter.encode([Condition("a three")])), dict(first))
    adapter.drop_encoders()
    adapter.export(tmp_path / "exported")
    assert pipeline.text_encoder is None
    require_equal(dict(flux(tmp_path / "exported").encode([Condition("a three")])), dict(first))


def test_a_fingerprint_tells_weights_and_settings_apart(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    same = {flux(path).encoding_fingerprint() for path in (model, tmp_path / "copy")}
    assert len(same) == 1  # wherever it lies
    shorter = flux(model, max_sequence_length=4).encoding_fingerprint()
    half = Flux(FluxConfig(path=str(model), height=16, width=16))
    half.load(CPU, torch.bfloat16, torch.bfloat16)
    weights = tmp_path / "copy/text_encoder_2/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = flux(tmp_path / "copy").encoding_fingerprint()
    assert len({*same, shorter, half.encoding_fingerprint(), other}) == 4
    with pytest.raises(ModelError, match="not loaded"):
        Flux(FluxConfig(path=str(model))).encoding_fingerprint()


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub cache that holds the model as ``org/small``; returns the folder of its files."""
    repository = tmp_path / "hub/models--org--small"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / COMMIT


def test_a_run_whose_prompts_are_cached_needs_no_encoders(hub: Path, tmp_path: Path) -> None:
    changes = {**small(Path("org/small")), "lora.rank": 2}
    cached = {**changes, "run.embeddings": str(tmp_path / "embeddings")}
    for name, keys in (("plain", changes), ("filling", cached)):
        train("quickstart", keys, output=tmp_path / name)
    assert len(entries(tmp_path / "embeddings")) == len(changes["data.prompts"])
    for encoder in ("text_encoder", "text_encoder_2"):
        (hub / encoder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        train("quickstart", changes, output=tmp_path / "impossible")
    train("quickstart", cached, output=tmp_path / "cached")
    for name in ("filling", "cached"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "plain")
        require_equal(weights(tmp_path / name), weights(tmp_path / "plain"))


def test_a_cache_without_the_encoders_gives_the_sizes_of_what_is_loaded(hub: Path, model: Path) -> None:
    """And not those that are assumed of a model that is not in the cache."""
    (hub / "text_encoder_2" / "config.json").unlink()
    adapter, whole = flux("org/small"), flux(model)
    assert adapter.latent_shape == whole.latent_shape == tuple(adapter.initial_noise(torch.Generator()).shape)
    with pytest.raises(ModelError, match="text_encoder_2"):
        adapter.encode([Condition("a three")])


def test_encoders_come_once_in_an_evaluation(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches it has; the prompts of the training are kept."""
    calls: list[str] = []
    encode, release = Flux.encode, Flux.release_frozen

    def encoding(self: Flux, conditions: Sequence[Condition]) -> Any:
        calls.append(f"encode {len(conditions)}")
        return encode(self, conditions)

    def releasing(self: Flux) -> None:
        calls.append("release")
        release(self)

    monkeypatch.setattr(Flux, "encode", encoding)
    monkeypatch.setattr(Flux, "release_frozen", releasing)
    evaluated = {"prompts": ["a two", "a six", "a nine"], "rows": 1, "noises": 2, "rewards": [{"reward": "digits"}]}
    train("quickstart", small(model, evaluation=evaluated, run__iterations=1), output=tmp_path / "run")
    assert [call for call in calls if call != "release"] == ["encode 2", "encode 3"]
    assert calls[:5] == ["encode 2", "release", "encode 3", "release", "release"]  # at last the decoder's
