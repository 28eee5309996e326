"""A trained LoRA under other programs' names, the card beside it, and both on the hub."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.pipeline.lora_file import LORA_FILE, LoraFile, LoraLayer
from branchtree_adapters.pipeline.lora_names import convert_names
from branchtree_adapters.small.pipelines import PIPELINES
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_runs import small

from branchtree import export, train
from branchtree.errors import CheckpointError, OutputError
from branchtree.exporting.card import write_card
from branchtree.exporting.hub import push_run
from branchtree.plugins import LoraSettings
from branchtree.run.directory import RunDirectory
from branchtree.run.manifest import require_whole

TOLERANCE = 1e-4
NAMES = {
    ("flux", "kohya"): "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    ("flux", "comfyui"): "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ("wan", "kohya"): "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    ("wan", "comfyui"): "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    ("sd3", "comfyui"): "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ("sd15", "kohya"): "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
}


def trained(name: str) -> Diffusers:
    """A small pipeline's model with a LoRA that changes what it does, on few of its layers."""
    call = PIPELINES[name].call
    sizes = {"height": call["height"], "width": call["width"], "frames": call.get("num_frames")}
    model = Diffusers(DiffusersConfig(path=f"small:{name}", negative_prompt=PIPELINES[name].negative, **sizes))
    model.load(torch.device("cpu"), torch.float32, torch.float32)
    targets: tuple[str, ...] = ("to_q", "to_v", "to_out.0")
    if name == "flux":  # diffusers takes the fused layer of a single block for one of the published size
        blocks = [key for key, layer in model.denoiser.named_modules() if isinstance(layer, nn.Linear)]
        targets = tuple(key for key in blocks if key.startswith("transformer_blocks") and "to_k" not in key)
    model.add_lora(LoraSettings(3, 5.0, targets), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def pictures(name: str, loras: Sequence[Path | None]) -> list[Tensor]:
    """What diffusers' own pipeline makes with each LoRA file or folder, one after the other."""
    family, made = PIPELINES[name], []
    pipeline = family.build()
    pipeline.set_progress_bar_config(disable=True)
    call = {**family.call, **({"negative_prompt": family.negative} if family.negative else {})}
    for lora in loras:
        if lora is not None:
            pipeline.load_lora_weights(lora)
        generator = torch.Generator().manual_seed(3)
        found = pipeline("a red three", num_inference_steps=2, generator=generator, output_type="pt", **call)
        made.append((found.images if hasattr(found, "images") else found.frames).float())
        if lora is not None:
            pipeline.unload_lora_weights()
    return made


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in NAMES))
def test_diffusers_makes_the_same_picture_of_each_format(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.export(tmp_path)
    files = []
    for form in [form for family, form in NAMES if family == name]:
        (tensors,) = model.convert_lora(tmp_path, form).values()
        assert NAMES[name, form] in tensors
        files.append(tmp_path / f"{form}.safetensors")
        save_file({key: value.contiguous() for key, value in tensors.items()}, files[-1])
    base, expected, *others = pictures(name, [None, tmp_path, *files])
    assert (expected - base).abs().max() > 100 * TOLERANCE
    assert all((other - expected).abs().max() <= TOLERANCE for other in others)


@pytest.mark.parametrize("members", [("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.to_v", "proj_mlp")])
def test_a_fused_layer_of_the_published_size_is_the_same_sum(members: tuple[str, ...]) -> None:
    """By diffusers' own converter, which knows FLUX's single blocks in one size alone."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, joint_attention_dim=32)
    draw = torch.Generator().manual_seed(0)
    layers = {
        f"single_transformer_blocks.0.{name}": LoraLayer(
            torch.randn(rank, 3072, generator=draw),
            torch.randn(4 * 3072 if "mlp" in name else 3072, rank, generator=draw),
            0.5,
        )
        for rank, name in enumerate(members, 2)
    }
    tensors = convert_names(LoraFile(Path("x"), "diffusers", layers, (0.5,)), flux, "kohya")
    name = "lora_unet_single_blocks_0_linear1"
    assert set(tensors) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert tensors[f"{name}.alpha"] == len(tensors[f"{name}.lora_down.weight"]) == sum(range(2, 2 + len(members)))
    read = FluxPipeline.lora_state_dict(tensors)
    x = torch.randn(3072, 1, generator=draw).double()
    for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        key = f"single_transformer_blocks.0.{layer}"
        a, b = (read[f"transformer.{key}.lora_{each}.weight"].double() for each in "AB")
        given = layers.get(key)
        expected = 0.5 * given.up.double() @ (given.down.double() @ x) if given else torch.zeros(len(b), 1).double()
        torch.testing.assert_close(b @ (a @ x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen_image", "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"),
        ("z_image", "lora_unet_layers_0_attention_to_q.lora_down.weight"),
    ],
)
def test_names_that_are_those_of_diffusers(name: str, key: str) -> None:
    """Read back by the converter of the model's pipeline in diffusers."""
    with torch.device("meta"):
        denoiser = PIPELINES[name].components()["transformer"]
    layers = {
        layer: LoraLayer(torch.randn(2, size.in_features), torch.randn(size.out_features, 2), 1.5)
        for layer, size in denoiser.named_modules()
        if isinstance(size, nn.Linear) and re.search(r"\d\..*(to_q|to_out\.0|net\.2|w1)$", layer)
    }
    file = LoraFile(Path("x"), "diffusers", layers, (1.5,))
    for form in ("kohya", "comfyui"):
        tensors = convert_names(file, denoiser, form)
        assert (key in tensors) == (form == "kohya")
        read = getattr(diffusers, PIPELINES[name].pipeline).lora_state_dict(tensors)
        assert read.keys() == {f"transformer.{each}" for each in file.tensors()}
        assert all(torch.equal(read[f"transformer.{each}"], value) for each, value in file.tensors().items())


def test_layers_without_a_name_are_refused() -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=0, joint_attention_dim=32)
    layers = {"x_embedder": LoraLayer(torch.ones(1, 64), torch.ones(3072, 1), 1.0)}
    with pytest.raises(CheckpointError, match="1 layers that have no name in such files, as x_embedder; give --format"):
        convert_names(LoraFile(Path("x"), "diffusers", layers, (1.0,)), flux, "kohya")


# --- runs ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with held-out figures, whose recipe names a file."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "my prompts.txt").write_text("a handwritten three\na handwritten one\n")
    changes: dict[str, Any] = {
        "lora.rank": 2,
        "data.prompts": str(folder / "my prompts.txt"),
        "evaluation": {"prompts": ["a handwritten two"], "rewards": [{"reward": "digits", "label": "held_out"}]},
        "run.iterations": 1,
    }
    train(
        "quickstart",
        {**small(Path("small:flux")), "model.height": 32, "model.width": 32, **changes},
        output=folder / "r",
    )
    return folder / "r"


def test_the_card_is_in_the_folder_of_the_weights(run: Path) -> None:
    files = sorted(path.name for path in (run / "final").iterdir())
    assert files == ["README.md", "manifest.json", LORA_FILE, "reward_curve.png", "samples.png"]
    write_card(run)  # over the one that is there
    require_whole(run / "final")
    RunDirectory(run).ledger.require_own(run / "final")
    for name in ("reward_curve.png", "samples.png"):
        assert (run / "final" / name).read_bytes().startswith(b"\x89PNG")
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "license": "apache-2.0",
        "tags": ["branchtree", "reinforcement-learning", "lora"],
    }
    first, last = (
        json.loads(line)["figures"]["held_out"]["mean"] for line in (run / "evaluation.jsonl").read_text().splitlines()
    )
    table = next(line for line in body.splitlines() if line.startswith(r"| held\_out |"))
    assert [round(float(cell.replace("\N{MINUS SIGN}", "-")), 2) for cell in table.split(" | ")[1:3]] == [
        round(first, 2),
        round(last, 2),
    ]
    assert "| small:flux | base model | Apache-2.0 |" in body and "| digits | reward | Apache-2.0 |" in body
    assert "my prompts.txt" in body and str(run.parent) not in body
    assert yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])["lora"]["rank"] == 2


def test_a_card_without_samples_shows_none(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "samples")
    text = write_card(tmp_path / "r").read_text(encoding="utf-8")
    assert "## Trained on" in text and "## Samples" not in text


def test_a_run_is_exported(run: Path, tmp_path: Path) -> None:
    (written,) = export(run, "kohya", output=tmp_path / "mine.safetensors").files
    assert written == tmp_path / "mine.safetensors" and all(key.startswith("lora_unet_") for key in load_file(written))
    with pytest.raises(OutputError, match="is there already"):
        export(run, "kohya", output=written)
    for _ in range(2):  # an earlier export gives way to it
        (written,) = export(run).files
        assert written == run / "export" / "quickstart-diffusers.safetensors"
    assert written.read_bytes() == (run / "final" / LORA_FILE).read_bytes()
    with pytest.raises(CheckpointError, match=r"holds no final/ yet|is no run's directory"):
        export(tmp_path)


def test_a_whole_model_is_copied(run: Path, tmp_path: Path) -> None:
    recipe = (
        (run / "recipe.yaml").read_text().replace("lora:\n  rank: 2\n  alpha: null\n  targets: null\n", "lora: null\n")
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "final" / "transformer").mkdir(parents=True)
    (tmp_path / "final" / "model_index.json").write_text("{}")
    (tmp_path / "final" / "transformer" / "w.safetensors").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="trained all weights, and comfyui is a format of LoRA files"):
        export(tmp_path, "comfyui")
    (written,) = export(tmp_path).files
    assert written == tmp_path / "export" / "quickstart-diffusers"
    assert (written / "transformer" / "w.safetensors").read_bytes() == b"weights"
    (written / "mine.txt").write_text("mine")
    for output in (None, written.with_name(f"{written.name}.safetensors")):  # the folder lies in the way of both
        with pytest.raises(OutputError, match=f"{written}: is there already"):
            export(tmp_path, output=output)
    assert (written / "mine.txt").read_text() == "mine"
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_format_that_nothing_reads_back_is_refused() -> None:
    with torch.device("meta"):
        sd3 = PIPELINES["sd3"].components()["transformer"]
    file = LoraFile(Path("x"), "diffusers", {}, (1.0,))
    with pytest.raises(CheckpointError, match=r"SD3.* as kohya.* give --format diffusers or --format comfyui"):
        convert_names(file, sd3, "kohya")


# --- the hub ---


@contextmanager
def hub(public: bool = False) -> Iterator[tuple[str, dict[str, bytes], list[Any]]]:
    """A hub that takes files: its address, what was uploaded, and the repositories that were asked for."""
    uploaded: dict[str, bytes] = {}
    made: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"id": "me/mine", "private": not public, "siblings": [], "tags": [], "sha": "0" * 40})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                made.append(json.loads(content))
                self._answer({"url": f"http://{self.headers['Host']}/me/mine"})
            elif "/preupload/" in self.path:
                files = json.loads(content)["files"]
                modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
                self._answer({"files": modes})
            elif "/commit/" in self.path:
                for line in map(json.loads, content.splitlines()):
                    if line["key"] == "file":
                        uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                address = f"http://{self.headers['Host']}/me/mine/commit/{'0' * 40}"
                self._answer({"commitUrl": address, "commitOid": "0" * 40})
            else:
                self._answer({"errors": [], "warnings": []})

        def _answer(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", uploaded, made
    finally:
        server.shutdown()
        server.server_close()


def test_the_folder_is_uploaded_when_asked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub() as (address, uploaded, made):
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_pretend")
        export(run, "kohya", output=tmp_path / "one.safetensors")
        assert not uploaded and not made
        done = export(run, "kohya", output=tmp_path / "two.safetensors", push="me/mine", private=True)
    assert done.address is not None and done.address.endswith("/me/mine")
    assert made[0]["name"] == "mine" and made[0]["organization"] == "me"
    final = run / "final"
    names = {"README.md", LORA_FILE, "reward_curve.png", "samples.png"}
    assert uploaded.keys() == {*names, "two.safetensors"}
    assert all(uploaded[name] == (final / name).read_bytes() for name in names)
    assert uploaded["two.safetensors"] == (tmp_path / "two.safetensors").read_bytes()


def test_what_is_public_is_not_taken_for_private(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub(public=True) as (address, uploaded, _):
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_pretend")
        with pytest.raises(OutputError, match="me/mine: is public on the hub already"):
            push_run(run, "me/mine", (), private=True)
        assert not uploaded
    with pytest.raises(OutputError, match="the hub does not take the model"):
        push_run(run, "not a name", (), private=False)
