"""Train the bundle's U-Net on the latents of shifted images and write the whole pipeline.

OUT must hold tokenizer, text_encoder (train_clip.py) and vae (train_vae.py). A checkpoint is kept
every 250 steps, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from pool import SIZE, Pool, arguments, open_pool
from transformers import CLIPTextModel, CLIPTokenizer

SNR_GAMMA = 5.0  # min-SNR weighting, Hang et al. 2023
DROP_CAPTION = 0.1  # for classifier-free guidance


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 96),
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=32, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@torch.no_grad()
def cache_latents(out: Path, pool: Pool, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n shifted draws as latents [n, 4, 8, 8], caption ids [n], and one embedding a caption."""
    path = out / "latents.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if len(saved["latents"]) == n:
            return saved["latents"], saved["index"], saved["embeds"]
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    known: dict[str, int] = {"": 0}
    latents, index = [], []
    for i in range(0, n, 500):
        x, texts, _ = pool.batch(500, generator)
        latents.append(vae.encode(x).latent_dist.sample() * vae.config.scaling_factor)
        index += [known.setdefault(t, len(known)) for t in texts]
        if i % 10_000 == 0:
            print(f"latents {i}/{n}", flush=True)
    ids = tokenizer(
        list(known), padding="max_length", max_length=tokenizer.model_max_length,
        truncation=True, return_tensors="pt",
    ).input_ids  # fmt: skip
    embeds = torch.cat([text_encoder(chunk).last_hidden_state for chunk in ids.split(256)])
    saved = {"latents": torch.cat(latents), "index": torch.tensor(index), "embeds": embeds}
    torch.save(saved, path)
    return saved["latents"], saved["index"], saved["embeds"]


def write_pipeline(
    out: Path, unet: UNet2DConditionModel, scheduler: DDIMScheduler, classes: Sequence[str]
) -> None:
    unet.half().save_pretrained(out / "unet")
    unet.float()
    scheduler.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.38.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    ours = {
        "classes": list(classes), "clip": "open_clip", "guidance_scale": 2.0, "size": SIZE,
        "steps": 20, "template": "a photo of a {}",
    }  # fmt: skip
    (out / "utilgen.json").write_text(json.dumps(ours, indent=2) + "\n")


def main() -> None:
    parser = arguments(__doc__, steps=5000, batch=128)
    parser.add_argument("--latents", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pool = open_pool(args.pool)
    latents, index, embeds = cache_latents(args.out, pool, args.latents)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    unet = make_unet()
    print(
        f"unet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M, {len(embeds)} captions",
        flush=True,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=1e-2)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    snr = compute_snr(scheduler, torch.arange(1000))
    weight = snr.clamp(max=SNR_GAMMA) / snr
    checkpoint, first = args.out / "unet_checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        first = saved["step"]
    start = time.time()
    total = 0.0
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(10_000 + step)
        lr = 1e-3 * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        i = torch.randint(len(latents), (args.batch,), generator=generator)
        t = torch.randint(0, 1000, (args.batch,), generator=generator)
        noise = torch.randn(latents[i].shape, generator=generator)
        drop = torch.rand(args.batch, generator=generator) < DROP_CAPTION
        text = embeds[torch.where(drop, 0, index[i])]
        x = scheduler.add_noise(latents[i], noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(x, t, text).sample.float()
        error = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
        loss = (weight[t] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        total += error.mean().item()
        if (step + 1) % 100 == 0:
            print(f"unet {step + 1} mse {total / 100:.4f} {time.time() - start:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            torch.save(
                {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(),
                 "ema": ema.state_dict(), "step": step + 1}, checkpoint,
            )  # fmt: skip
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            write_pipeline(args.out, make_copy(unet), scheduler, pool.classes)
            ema.restore(unet.parameters())


def make_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    copy = make_unet()
    copy.load_state_dict(unet.state_dict())
    return copy


if __name__ == "__main__":
    main()
