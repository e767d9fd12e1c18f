"""Sound files of other kinds than a full CLIP."""

from __future__ import annotations

import torch
from clips import SMALL, random_clip
from safetensors.torch import save
from torch import Tensor

from clip_finetune.engine.clip.encoders import text_encoder_state_dict

from .corpus import ANY, ONE, REPORTED, added, bad, hugging_face, openai, text_encoder

SDXL = "conditioner.embedders.0.transformer."


def checkpoint() -> dict[str, Tensor]:
    return {SDXL + n: t for n, t in text_encoder().items()} | {"model.diffusion_model.out.2.bias": torch.zeros(4)}


bad("sdxl-checkpoint", lambda: save(checkpoint()), info=REPORTED, merge=ANY)
bad(
    "checkpoint-with-a-scalar-for-tokens",
    added({f"{SDXL}text_model.embeddings.token_embedding.weight": torch.tensor(1.0)}, checkpoint),
    info=REPORTED,
)
bad(
    "checkpoint-without-text-encoder", lambda: save({"model.diffusion_model.out.2.bias": torch.zeros(4)}), info=REPORTED
)
bad(
    "lora",
    lambda: save(
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(64, 2),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 16),
        }
    ),
    info=REPORTED,
)
bad("text-encoder", lambda: save(text_encoder()), info=REPORTED, merge=ANY)
bad("vision-encoder", lambda: save({n: t for n, t in hugging_face().items() if n.startswith("vis")}), info=REPORTED)
bad(
    "training-state",
    lambda: save({f"model.{n}": t for n, t in openai().items()} | {"optimizer.0.exp_avg": ONE}),
    info=REPORTED,
)
bad("vae", lambda: save({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}))
bad(
    "siglip",
    lambda: save(
        {n: t for n, t in hugging_face().items() if n != "logit_scale" and "class_emb" not in n}
        | {"logit_bias": ONE, "vision_model.head.probe": torch.zeros(1, 1, 16)}
    ),
    merge=ANY,
)
bad("other-text-encoder-wider", lambda: save(text_encoder_state_dict(random_clip(SMALL, text_width=32))), info=REPORTED)
bad(
    "half-hugging-face",
    lambda: save(
        {n: t for n, t in openai().items() if n.startswith("visual.")}
        | {n: t for n, t in hugging_face().items() if n.startswith("text_model.")}
    ),
    merge=ANY,
)
