"""Record what transformers 4.45 makes of the small HPSv3, as test data for the `hpsv3` reward.

HPSv3's publisher runs its model with transformers 4.45.2, under the names of which the weights are published. First
write the small checkpoint and the inputs, in this project's environment:

    python scripts/record_hpsv3.py inputs small

Then, in an environment with transformers 4.45.2, tokenizers 0.20.3 and huggingface-hub 0.26.5, load the checkpoint into
that version's own model, and record its scores (here with torch 2.14.1 on a CPU):

    python scripts/record_hpsv3.py scores small tests/data/rewards/hpsv3_scores.json

The weights must fit all names of the old model. The whole model is cast to bfloat16, as by the publisher, and then back
to float32: the frequencies of rotary embeddings stay rounded, and nothing else is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = "inputs.pt"
PROMPTS = ("a red cat", "two blue dogs, running over {braces} and a very long road to the hills", "a hen")


def pictures() -> Tensor:
    """Return three smooth 8-bit pictures (3, 3, 64, 96) in [0, 1]."""
    coarse = torch.rand(3, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    fine = nn.functional.interpolate(coarse, (64, 96), mode="bilinear")
    return (fine * 255).round() / 255


def write_inputs(folder: Path) -> None:
    """Write the small checkpoint, and what the reward gives its model."""
    from branchtree_rewards.hpsv3.network import QUESTION
    from branchtree_rewards.hpsv3.reward import look
    from branchtree_rewards.qwen2vl.backbone import read_architecture
    from branchtree_rewards.qwen2vl.questions import Questions, open_tokenizer
    from branchtree_rewards.shared.pixels import to_pil
    from branchtree_rewards.shared.source import WeightsSource
    from branchtree_rewards.small.hpsv3 import write_small_hpsv3

    folder.mkdir(parents=True, exist_ok=True)
    write_small_hpsv3(folder)
    source, cpu = WeightsSource(str(folder), folder), torch.device("cpu")
    tokenizer = open_tokenizer(source, "", source, QUESTION)
    questions = Questions(QUESTION, tokenizer, read_architecture(source, source, len(tokenizer)))
    looks = [look(picture, cpu) for picture in to_pil(pictures())]
    rows = [questions.encode(prompt, seen.tokens) for prompt, seen in zip(PROMPTS, looks, strict=True)]
    ids, mask = questions.batch(rows, cpu)
    pixels, grid = torch.cat([seen.pixels for seen in looks]), torch.tensor([seen.grid for seen in looks])
    torch.save(
        {"ids": ids, "mask": mask, "pixels": pixels, "grid": grid, "reward": questions.reward_ids[0]}, folder / INPUTS
    )


@torch.no_grad()
def record(folder: Path, output: Path) -> None:
    """Score the inputs by the old version's own model, and write the head's outputs."""
    import transformers
    from safetensors.torch import load_file

    inputs, state = torch.load(folder / INPUTS), load_file(folder / "HPSv3.safetensors")
    config = transformers.Qwen2VLConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    layers: list[nn.Module] = [nn.Linear(config.hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16)]
    head = nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 2)).eval()
    own = [name for name in state if name.startswith("rm_head.")]
    head.load_state_dict({name.removeprefix("rm_head."): state.pop(name) for name in own})
    model: Any = transformers.Qwen2VLForConditionalGeneration(config).eval()
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    model.to(torch.bfloat16).to(torch.float32)
    embedded = model.model.embed_tokens(inputs["ids"])
    seen = model.visual(inputs["pixels"], grid_thw=inputs["grid"])
    pictured = (inputs["ids"] == config.image_token_id).unsqueeze(-1).expand_as(embedded)
    embedded = embedded.masked_scatter(pictured, seen)
    hidden = model.model(input_ids=None, inputs_embeds=embedded, attention_mask=inputs["mask"])[0]
    outputs = head(hidden)[inputs["ids"] == inputs["reward"]]
    content = {
        "transformers": transformers.__version__,
        "tokens": inputs["ids"].shape[1],
        "outputs": [[round(number, 7) for number in row] for row in outputs.tolist()],
    }
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the inputs, or record the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("inputs", "scores"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("hpsv3_scores.json"))
    arguments = parser.parse_args()
    if arguments.step == "inputs":
        write_inputs(arguments.folder)
    else:
        record(arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
