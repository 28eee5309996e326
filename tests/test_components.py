"""Incomplete, damaged or mismatched components of a pipeline are refused by name, and whole ones load to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.pipeline.components import build_pipeline
from branchtree_adapters.pipeline.tokenizers import check_tokenizer, check_tokenizer_files, probe_texts
from branchtree_adapters.wan import Wan, WanConfig
from diffusers import FluxPipeline, WanImageToVideoPipeline
from safetensors.torch import load_file, save_file
from sweep_model_folders import ASSETS
from tiny_flux import tiny_flux
from tiny_wan import Kind, tiny_wan, write_frame
from torch import Tensor, nn

from branchtree.errors import ModelError
from branchtree.plugins import Condition

CPU = torch.device("cpu")
Edit = Callable[[Path], object]
TRANSFORMER, VAE = "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
T5, CLIP = "text_encoder_2/model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan"), Kind(image_encoder=True))


def flux(folder: Path) -> dict[str, Tensor]:
    adapter = Flux(FluxConfig(path=str(folder), height=16, width=16))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter.encode([Condition("a red digit"), Condition("seven")])


def wan(folder: Path, image: Path) -> dict[str, Tensor]:
    adapter = Wan(WanConfig(path=str(folder), height=32, width=32, frames=5, guidance=1.0))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter.encode([Condition("a red digit", image=image)])


def weights(file: str, edit: Callable[[dict[str, Tensor]], object]) -> Edit:
    def change(folder: Path) -> None:
        state = load_file(folder / file)
        edit(state)
        save_file({name: value.contiguous() for name, value in state.items()}, folder / file, {"format": "pt"})

    return change


def lacking(ending: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(next(name for name in state if name.endswith(ending)))


def setting(ending: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name: value(state[name]) for name in state if name.endswith(ending)})


def entries(file: str, edit: Callable[[Any], object]) -> Edit:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))

    return change


def put(**changes: Any) -> Callable[[Any], object]:
    return lambda content: content.update(changes)


def drop(*names: str) -> Callable[[Any], object]:
    return lambda content: [content.pop(name) for name in names]


def remove(name: str) -> Edit:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def only_special(content: Any) -> None:
    content["model"]["vocab"] = content["model"]["vocab"][:3]


def merges_cut_to(share: float) -> Edit:
    def change(folder: Path) -> None:
        source = ASSETS / "digits_flux/tokenizer"
        shutil.rmtree(folder / "tokenizer")
        shutil.copytree(source, folder / "tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))
        lines = (source / "merges.txt").read_text().splitlines(keepends=True)
        (folder / "tokenizer/merges.txt").write_text("".join(lines[: int(share * len(lines))]))
        entries("text_encoder/config.json", put(vocab_size=10**6))(folder)

    return change


SCHEDULER, CLIP_CONFIG = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
T5_JSON = "tokenizer_2/tokenizer.json"
FLUX_CASES: dict[str, tuple[Edit, str]] = {
    "T5 lacks a tensor": (weights(T5, lacking("wo.weight")), "text_encoder_2.*lack 1 tensor: encoder.*wo.weight"),
    "CLIP lacks a tensor": (weights(CLIP, lacking("fc1.bias")), "text_encoder.*lack 1 tensor: .*fc1.bias"),
    "transformer lacks a tensor": (weights(TRANSFORMER, lacking("to_q.weight")), "transformer.*lack 1 tensor: .*to_q"),
    "VAE lacks a tensor": (weights(VAE, lacking("conv_in.bias")), "vae.*lack 1 tensor: .*conv_in.bias"),
    "T5 has a tensor too many": (weights(T5, put(extra=torch.ones(1))), "text_encoder_2.*hold unknown 1 tensor: extra"),
    "VAE has a tensor too many": (weights(VAE, put(extra=torch.ones(1))), "vae.*hold unknown 1 tensor: extra"),
    "CLIP in another shape": (weights(CLIP, setting("fc1.bias", lambda b: b[:3])), r"fc1.bias is \(3,\), not \(32,\)"),
    "transformer in another shape": (
        weights(TRANSFORMER, setting("x_embedder.bias", lambda b: b[:3])),
        r"transformer.*x_embedder.bias is \(3,\), not \(32,\)",
    ),
    "no T5 vocabulary": (remove(T5_JSON), "tokenizer_2' lacks spiece.model"),
    "no CLIP tokenizer": (remove("tokenizer"), "has no folder 'tokenizer'"),
    "no tokenizer settings": (remove(CLIP_CONFIG), "lacks tokenizer_config.json"),
    "empty merges": (merges_cut_to(0), "merges.txt' is empty"),
    "merges cut off": (merges_cut_to(0.5), "merges of the tokenizer .* never make"),
    "vocabulary of special tokens": (entries(T5_JSON, only_special), "tokenizer_2' tells no two prompts apart"),
    "vocabulary larger than the embedding": (
        entries("text_encoder_2/config.json", put(vocab_size=30)),
        "tokenizer_2' has the token .* with the id .* embedding has 30 rows",
    ),
    "longer than the positions": (entries(CLIP_CONFIG, drop("model_max_length")), "set model_max_length to 16"),
    "CLIP reads the wrong token": (entries("text_encoder/config.json", put(eos_token_id=7)), "gives one embedding"),
    "T5 with a constant embedding": (weights(T5, setting("shared.weight", torch.ones_like)), "gives one embedding"),
    "empty scheduler": (lambda folder: (folder / SCHEDULER).write_text("{}"), "scheduler_config.json' lacks shift"),
    "scheduler without its kind of shift": (entries(SCHEDULER, drop("use_dynamic_shifting")), "lacks use_dynamic"),
    "scheduler with a damaged key": (
        lambda folder: (folder / SCHEDULER).write_text((folder / SCHEDULER).read_text().replace('"shift"', '"shigt"')),
        "lacks shift|'shigt', and no 'shift'",
    ),
    "scheduler of another class": (entries(SCHEDULER, put(_class_name="DDIMScheduler")), "is of DDIMScheduler"),
    "another transformer": (
        entries("model_index.json", put(transformer=["diffusers", "SD3Transformer2DModel"])),
        "for transformer, and FluxPipeline takes FluxTransformer2DModel",
    ),
    "another tokenizer": (
        entries("model_index.json", put(tokenizer=["transformers", "T5Tokenizer"])),
        "for tokenizer, and FluxPipeline takes CLIPTokenizer",
    ),
    "no such class": (entries("model_index.json", put(vae=["diffusers", "AutoencoderKX"])), "mean 'AutoencoderKL'"),
    "code of others": (entries("model_index.json", put(vae=["custom", "VAE"])), "only classes of diffusers and"),
    "no VAE": (entries("model_index.json", put(vae=[None, None])), "names no vae, which FluxPipeline needs"),
    "index of another form": (
        lambda folder: (folder / "model_index.json").write_text("[]"),
        "not hold a JSON object",
    ),
}


@pytest.mark.parametrize("case", FLUX_CASES)
def test_what_would_be_filled_in_is_refused_by_name(flux_folder: Path, tmp_path: Path, case: str) -> None:
    edit, message = FLUX_CASES[case]
    folder = Path(shutil.copytree(flux_folder, tmp_path / "model"))
    edit(folder)
    with pytest.raises(ModelError, match=message):
        flux(folder)


WAN_CASES: dict[str, tuple[Edit, str]] = {
    "image encoder lacks a tensor": (
        weights("image_encoder/model.safetensors", lacking("fc1.weight")),
        "image_encoder.*lack 1 tensor: .*fc1.weight",
    ),
    "UMT5 without an embedding": (
        weights(CLIP, lambda state: [state.pop(name) for name in [*state] if "shared" in name or "embed_t" in name]),
        "text_encoder.*lack",
    ),
    "image processor without means": (
        entries("image_processor/preprocessor_config.json", drop("image_mean", "size")),
        "preprocessor_config.json' lacks image_mean, size",
    ),
    "image processor of another size": (
        entries("image_processor/preprocessor_config.json", put(crop_size={"height": 8, "width": 8})),
        "makes images of 8 x 8 pixels, and the encoder takes 16 x 16",
    ),
    "no image processor": (remove("image_processor"), "has no folder 'image_processor'"),
}


@pytest.mark.parametrize("case", WAN_CASES)
def test_what_prepares_images_and_long_texts_is_complete(wan_folder: Path, tmp_path: Path, case: str) -> None:
    edit, message = WAN_CASES[case]
    folder = Path(shutil.copytree(wan_folder, tmp_path / "model"))
    edit(folder)
    with pytest.raises(ModelError, match=message):
        wan(folder, write_frame(tmp_path / "frame.png", 0))


def test_an_untied_umt5_keeps_its_embedding(wan_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wan_folder, tmp_path / "model"))
    entries("text_encoder/config.json", put(tie_word_embeddings=False))(folder)
    image = write_frame(tmp_path / "frame.png", 0)
    ours, theirs = wan(folder, image)["prompt_embeds"], wan(wan_folder, image)["prompt_embeds"]
    assert torch.equal(ours, theirs) and bool(ours.isfinite().all()) and float(ours.std()) > 0


@pytest.mark.parametrize(
    ("model", "pipeline"), [("digits_flux", FluxPipeline), ("moving_digits_wan", WanImageToVideoPipeline)]
)
def test_every_component_is_that_of_diffusers_to_the_bit(model: str, pipeline: Any) -> None:
    others = {"vae": torch.float32, "transformer": torch.float16}
    ours = build_pipeline(pipeline, ASSETS / model, {**others, "default": torch.bfloat16}, ())
    theirs = pipeline.from_pretrained(ASSETS / model, dtype={**others, "default": torch.bfloat16})
    assert ours.components.keys() == theirs.components.keys()
    hidden = {"_name_or_path"}
    assert {k: v for k, v in ours.config.items() if k not in hidden} == {
        k: v for k, v in theirs.config.items() if k not in hidden
    }
    for name, component in theirs.components.items():
        mine = ours.components[name]
        assert type(mine) is type(component)
        if isinstance(component, nn.Module):
            state = component.state_dict()
            assert mine.state_dict().keys() == state.keys() and not mine.training
            assert all(
                torch.equal(value, state[key]) and value.dtype == state[key].dtype
                for key, value in mine.state_dict().items()
            )


def test_sharded_weights_load_and_a_missing_shard_is_named(flux_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flux_folder, tmp_path / "model"))
    pipeline = FluxPipeline.from_pretrained(flux_folder)
    (folder / TRANSFORMER).unlink()
    (folder / T5).unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    pipeline.text_encoder_2.save_pretrained(folder / "text_encoder_2", max_shard_size="20KB")
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and len(list((folder / "text_encoder_2").glob("*-of-*.safetensors"))) > 1
    whole = flux(flux_folder)
    assert all(torch.equal(value, whole[name]) for name, value in flux(folder).items())
    shards[0].unlink()
    with pytest.raises(ModelError, match="cannot load transformer from"):
        flux(folder)


def test_the_published_clip_vocabulary_is_whole(vocabulary: Path) -> None:
    from transformers import CLIPTokenizer

    (vocabulary / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    check_tokenizer_files(CLIPTokenizer, vocabulary)
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
    check_tokenizer(tokenizer, vocabulary, {"vocab_size": 49408, "max_position_embeddings": 77})
    with pytest.raises(ModelError, match="embedding has 49000 rows"):
        check_tokenizer(tokenizer, vocabulary, {"vocab_size": 49000, "max_position_embeddings": 77})


def test_a_t5_tokenizer_of_sentencepiece_alone_is_complete(flux_folder: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import T5TokenizerFast

    folder = Path(shutil.copytree(flux_folder, tmp_path / "model"))
    (folder / T5_JSON).unlink()
    text = tmp_path / "text.txt"
    text.write_text("a red digit\nseven blue digits\nthree reds\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=20,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    shutil.copy(tmp_path / "spiece.model", folder / "tokenizer_2/spiece.model")
    tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    first, second = probe_texts(tokenizer, folder)
    assert tokenizer(first).input_ids != tokenizer(second).input_ids
    rows = flux(folder)["prompt_embeds"]
    assert not torch.equal(rows[0], rows[1])
    (folder / "tokenizer_2/spiece.model").write_bytes((tmp_path / "spiece.model").read_bytes()[:100])
    with pytest.raises(ModelError, match="tokenizer_2"):
        flux(folder)
