"""Randomly initialised Stable Diffusion bundles, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLASSES = ["dress", "bag", "ankle boot"]
WIDTH, CONTEXT, SIZE = 16, 40, 16


def make_tokenizer() -> CLIPTokenizer:
    """One token a byte."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{a}</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CONTEXT)


def make_text_encoder(vocab_size: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1, initializer_factor=10.0,
    )  # fmt: skip
    return CLIPTextModel(config)


def make_unet(**changes: object) -> UNet2DConditionModel:
    config = {
        "sample_size": SIZE // 2, "block_out_channels": (8, 16), "layers_per_block": 1,
        "cross_attention_dim": WIDTH, "attention_head_dim": 8, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **changes,
    }  # fmt: skip
    return UNet2DConditionModel(**config)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.9, mid_block_add_attention=False,
    )  # fmt: skip


def make_scheduler(prediction_type: str = "epsilon", **changes: object) -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
        "prediction_type": prediction_type, **changes,
    }  # fmt: skip
    return DDIMScheduler(**config)


def make_pipeline(seed: int = 0, **schedule: object) -> StableDiffusionPipeline:
    """diffusers' own pipeline with random weights."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=make_vae(), text_encoder=make_text_encoder(len(tokenizer)), tokenizer=tokenizer,
        unet=make_unet(), scheduler=make_scheduler(**schedule), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_bundle(path: Path, seed: int = 0, defaults: bool = True, **schedule: object) -> Path:
    """A bundle directory with random weights and a utilgen.json."""
    make_pipeline(seed, **schedule).save_pretrained(path)
    if defaults:
        bundle = {"size": SIZE, "steps": 4, "guidance_scale": 3.0, "classes": CLASSES}
        (path / "utilgen.json").write_text(json.dumps(bundle))
    return path
