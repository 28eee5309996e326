"""A tiny random OWLv2 in the published layout, with its tokenizer and, in a folder beside, the CLIP for colours."""

from pathlib import Path

import torch

from branchtree_rewards.shared.weights import build_pretrained, quiet_libraries
from branchtree_rewards.small.checkpoint import meta_shapes, random_state
from branchtree_rewards.small.clip import CLIP, VOCABULARY, write_clip_folder, write_tokenizer

SEED, CLIP_SEED = 20231017, 20230616
DOUBT = -3.5  # so that few of its boxes are sure of anything
CONTEXT = 64  # the vocabulary is of bytes, so that texts take more tokens than with the published one


def write_small_geneval(folder: Path) -> None:
    """Write both checkpoints. The detector has 36 boxes a picture."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    config = Owlv2Config(
        projection_dim=32,
        text_config={"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **sizes, **ids},
        vision_config={"image_size": 96, "patch_size": 16, **sizes},
    )
    shapes = meta_shapes(lambda: Owlv2ForObjectDetection(config))
    state = random_state(shapes, torch.Generator().manual_seed(SEED), unscaled="embedding")
    state["owlv2.logit_scale"] = torch.tensor(4.0)
    state["class_head.logit_shift.bias"] = torch.tensor([DOUBT])
    model = build_pretrained(Owlv2ForObjectDetection, config, state, str(folder), torch.float32)
    with quiet_libraries():
        model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / CLIP).mkdir()
    write_clip_folder(folder / CLIP, CLIP_SEED)
