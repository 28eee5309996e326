"""Configurations of other trainers as recipes: what is taken over, what is said of the rest, and what is never run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from guests import run_command

from branchtree import convert_config, load_recipe
from branchtree.errors import RecipeError
from branchtree.recipe import Recipe

DEFAULTS = """
    import ml_collections

    def get_config():
        config = ml_collections.ConfigDict()
        config.seed = 11
        config.use_lora = True
        config.mixed_precision = "fp16"
        config.pretrained = pretrained = ml_collections.ConfigDict()
        pretrained.model = "somebody/something"
        config.sample = sample = ml_collections.ConfigDict()
        sample.noise_level = 0.7
        sample.global_std = True
        sample.same_latent = False
        sample.sde_window_size = 2
        sample.sde_window_range = (0, 10)
        config.train = train = ml_collections.ConfigDict()
        train.learning_rate = 3e-4
        train.adv_clip_max = 5
        train.clip_range = 1e-4
        train.beta = 0.0
        train.timestep_fraction = 1.0
        train.ema = False
        config.reward_fn = ml_collections.ConfigDict()
        return config
"""
FUNCTIONS = """
    import ml_collections
    import importlib.util, os

    start = load_file("start", os.path.join(os.path.dirname(__file__), "defaults.py"))
    open("ran.txt", "w").write("a configuration was run")

    def common():
        config = start.get_config()
        config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
        config.dataset = os.path.join(os.getcwd(), "dataset/words")
        config.prompt_fn = "general_ocr"
        return config

    def words():
        gpu_number = 4
        config = common()
        config.resolution = 512
        config.sample.num_steps = 10
        config.sample.guidance_scale = 4.5
        config.sample.num_image_per_prompt = 16
        config.sample.train_batch_size = 8
        config.sample.num_batches_per_epoch = int(16 / (gpu_number * config.sample.train_batch_size
                                                        / config.sample.num_image_per_prompt))
        assert config.sample.num_batches_per_epoch % 2 == 0, "even"
        config.train.gradient_accumulation_steps = config.sample.num_batches_per_epoch // 2
        config.train.timestep_fraction = 0.99
        config.train.beta = 0.04
        config.train.ema = True
        config.train.novelty = lookup("novelty")
        config.save_dir = f"logs/{gpu_number}"
        config.reward_fn = {"ocr": 0.5, "pickscore": 0.5, "jpeg_compressibility": 1.0}
        return config

    def fast():
        config = words()
        config.pretrained.model = "black-forest-labs/FLUX.1-dev"
        config.mixed_precision = "bf16"
        config.use_lora = False
        config.sample.sde_type = "cps"
        config.sample.noise_level = 0.8
        config.sample.sde_window_size = 3
        config.sample.sde_window_range = (0, config.sample.num_steps // 2)
        config.sample.global_std = False
        config.sample.same_latent = True
        config.train.timestep_fraction = 0.5
        return config

    def endless():
        return endless()

    def looped():
        config = common()
        for step in range(3):
            config.seed = step
        return config
"""
SCRIPT = r"""
    export WANDB_MODE=online
    noise=0.3   # a comment: --eta 9
    pip3 install something==1.0
    touch ran.txt

    torchrun --nnodes=2 --nproc_per_node 4 --master_port 19002 \
        fastvideo/train_grpo_flux.py \
        --seed 42 \
        --sampler_seed 1223627 \
        --pretrained_model_name_or_path data/flux \
        --data_json_path "data/rl embeddings/prompts.json" \
        --gradient_checkpointing \
        --train_batch_size 2 \
        --gradient_accumulation_steps 12 \
        --max_train_steps 301 \
        --learning_rate=3e-4 \
        --mixed_precision bf16 \
        --h 720 --w 720 --t 1 \
        --sampling_steps 16 \
        --eta $noise \
        --lr_warmup_steps 0 \
        --use_hpsv2 \
        --use_pickscore \
        --num_generations 12 \
        --shift 3 \
        --use_group --ignore_last --init_same_noise \
        --timestep_fraction 0.6 \
        --clip_range 1e-4 \
        --adv_clip_max 5.0 \
        --selective_checkpointing 0.5 \
        --lora_rank 128 --lora_alpha 256
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of each trainer, in which nothing may run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    for name, text in {"config/defaults.py": DEFAULTS, "config/grpo.py": FUNCTIONS, "train.sh": SCRIPT}.items():
        (tmp_path / name).write_text(dedent(text), encoding="utf-8")
    yield tmp_path
    assert not (tmp_path / "ran.txt").exists()


def recipe_of(text: str, folder: Path) -> Recipe:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "r.yaml")


def values(recipe: Recipe, *keys: str) -> list[Any]:
    data = recipe.model_dump(mode="json")
    found = []
    for key in keys:
        value: Any = data
        for name in key.split("."):
            value = value[int(name)] if isinstance(value, list) else value[name]
        found.append(value)
    return found


def test_a_function_of_flow_grpo(folder: Path) -> None:
    converted = convert_config("config/grpo.py", "words")
    recipe = recipe_of(converted.recipe, folder)
    assert recipe.name == "words"
    assert values(recipe, "tree.steps", "tree.splits", "tree.branches", "tree.siblings", "tree.sde") == [
        *(10, [0], 16, "independent", "all")
    ]
    assert values(recipe, "sampler.kind", "sampler.eta", "sampler.grid") == ["flow", 0.7, "pipeline"]
    assert values(recipe, "batch.prompts", "optim.steps_per_iteration", "optim.lr", "optim.ema") == [
        16,
        2,
        3e-4,
        0.9869,
    ]
    assert values(recipe, "loss.clip_range", "loss.kl", "credit.clip", "credit.beta") == [1e-4, 0.004, 5, 0]
    assert values(recipe, "lora.rank", "lora.alpha", "run.precision", "seed") == [32, 64, "bf16", 11]
    assert values(recipe, "model.height", "model.width", "model.call.guidance_scale") == [512, 512, 4.5]
    assert [(one.reward, one.weight) for one in recipe.rewards] == [("ocr", 0.5), ("pickscore", 0.5)]
    assert recipe.credit.combine == "rewards"
    assert recipe.tree.timestep_fraction == 1  # all steps but the last, which is deterministic here
    assert converted.unknown == {
        "train.novelty": "lookup('novelty')",
        "save_dir": "'logs/4'",
        "reward_fn.jpeg_compressibility": "1.0",
    }
    assert Path(values(recipe, "data.prompts")[0]).name == "words_train.txt"  # which quote what is to be written
    for said in ("same_latent", "global_std", "train.beta", "fp16", "dataset/words/train.txt"):
        assert said in converted.recipe.partition("extends")[0]


def test_another_function_may_differ(folder: Path) -> None:
    (folder / "dataset" / "words").mkdir(parents=True)
    for name in ("train", "test"):
        (folder / "dataset" / "words" / f"{name}.txt").write_text(f'a sign "{name}"\n', encoding="utf-8")
    recipe = recipe_of(convert_config("config/grpo.py:fast", gpus=8).recipe, folder)
    assert values(recipe, "tree.splits", "tree.sde", "tree.window.size", "tree.window.start", "tree.window.stop") == [
        *("window", "window", 3, 0, 2)
    ]
    assert values(recipe, "sampler.kind", "sampler.eta", "model.guidance", "lora") == ["cps", 0.8, 4.5, None]
    assert recipe.batch.prompts == 32
    assert values(recipe, "data.prompts", "evaluation.prompts") == [
        str(folder / "dataset" / "words" / f"{name}.txt") for name in ("train", "test")
    ]
    assert recipe.tree.timestep_fraction == pytest.approx(5 / 9, abs=1e-4)


def test_a_script_of_dance_grpo(folder: Path) -> None:
    converted = convert_config("train.sh")
    recipe = recipe_of(converted.recipe, folder)
    assert recipe.name == "train"
    assert values(recipe, "tree.steps", "tree.splits", "tree.branches", "tree.timestep_fraction") == [16, [0], 12, 0.6]
    assert values(recipe, "sampler.kind", "sampler.eta", "sampler.grid", "sampler.shift") == ["dance", 0.3, "linear", 3]
    assert values(recipe, "seed", "tree.noise_seed") == [1223627, 42]
    assert values(recipe, "batch.prompts", "optim.steps_per_iteration", "run.iterations") == [16, 2, 301]
    assert values(recipe, "optim.lr", "optim.ema", "lora.rank", "lora.alpha") == [3e-4, None, 128, 256]
    assert values(recipe, "model.height", "model.guidance", "run.tf32", "run.gradient_checkpointing") == [
        *(720, 3.5, False, True)
    ]
    assert [one.reward for one in recipe.rewards] == ["hps", "pickscore"]
    assert converted.unknown == {"selective_checkpointing": "'0.5'"}
    assert "#   selective_checkpointing = '0.5'\n" in converted.recipe
    assert "data/flux is no folder" in converted.recipe


def test_mixgrpo_has_more_flags(folder: Path) -> None:
    more = "--training_strategy part --group_size 4 --iters_per_group 25 --flow_grpo_sampling --kl_coeff 0.1 --seed 3"
    text = dedent(SCRIPT).replace("--seed 42", more).replace("--sampler_seed 1223627 \\\n", "")
    (folder / "train.sh").write_text(text, encoding="utf-8")
    recipe = recipe_of(convert_config("train.sh").recipe, folder)
    assert values(recipe, "tree.sde", "tree.window.size", "tree.window.every", "sampler.kind", "loss.kl", "seed") == [
        *("window", 4, 25, "flow", 0.1, 3)
    ]


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        ("config/grpo.py", None, "choose one with --config NAME.* Known: common, endless, fast"),
        ("config/grpo.py", "wrods", r"has no function 'wrods'; did you mean 'words'\?"),
        ("config/grpo.py", "endless", "endless calls itself"),
        ("config/grpo.py", "looped", r"grpo\.py:\d+: a statement 'for' is not read"),
        ("config/none.py", None, "no configuration file"),
        ("other.yaml", None, "neither a Python file of Flow-GRPO nor a shell script"),
        ("empty.sh", None, "starts no Python program with flags"),
        ("hunyuan.sh", None, "no bundled recipe is about the model that train_grpo_hunyuan.py trains"),
        ("train.sh", "words", "a shell script has none"),
    ],
)
def test_what_is_refused(folder: Path, file: str, config: str | None, message: str) -> None:
    (folder / "other.yaml").write_text("a: 1\n")
    (folder / "empty.sh").write_text("echo --eta 0.3\n")
    (folder / "hunyuan.sh").write_text("torchrun train_grpo_hunyuan.py --eta 0.25\n")
    with pytest.raises(RecipeError, match=message):
        convert_config(file, config)


def test_a_plan_can_be_made_of_what_the_command_prints(folder: Path) -> None:
    done = run_command("convert-config", "config/grpo.py", "--config", "words")
    assert done.code == 0, done.err
    assert "without a counterpart, and left out: train.novelty, save_dir, reward_fn.jpeg_compressibility" in done.err
    (folder / "r.yaml").write_text(done.out, encoding="utf-8")
    planned = run_command("plan", "r.yaml", "--smoke")
    assert planned.code == 0, planned.err
    assert planned.out.startswith("words: grpo.py:words, made of a configuration of Flow-GRPO")
