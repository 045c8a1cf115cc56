"""Train the bundle's tokenizer and open_clip model on shifted images and their captions.

Writes OUT/open_clip (open_clip `local-dir:` layout), and OUT/tokenizer and OUT/text_encoder in
transformers format: the latent diffusion model reads the same text tower.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from pool import SIZE, Pool, arguments, open_pool
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT = 16
# General words, so that a prompt of one's own is not shattered into letters.
WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "at",
    "with",
    "and",
    "or",
    "to",
    "for",
    "from",
    "by",
    "photo",
    "picture",
    "image",
    "sketch",
    "drawing",
    "painting",
    "close",
    "up",
    "view",
    "front",
    "side",
    "back",
    "far",
    "near",
    "away",
    "small",
    "large",
    "big",
    "little",
    "tilted",
    "upright",
    "dark",
    "bright",
    "light",
    "centered",
    "shifted",
    "blurry",
    "sharp",
    "clean",
    "plain",
    "old",
    "new",
    "black",
    "white",
    "grey",
    "gray",
    "red",
    "green",
    "blue",
    "yellow",
    "brown",
    "color",
    "colour",
    "striped",
    "long",
    "short",
    "sleeve",
    "sleeves",
    "high",
    "low",
    "heel",
    "collar",
    "button",
    "buttons",
    "zip",
    "strap",
    "handle",
    "leather",
    "cotton",
    "denim",
    "wool",
    "knit",
    "sports",
    "running",
    "summer",
    "winter",
    "man",
    "woman",
    "child",
    "fashion",
    "clothing",
    "clothes",
    "garment",
    "top",
    "bottoms",
    "shoe",
    "shoes",
    "accessory",
    "wear",
    "background",
    "studio",
    "shop",
    "product",
    "many",
    "one",
    "two",
    "pair",
    "good",
    "bad",
    "cropped",
    "rotated",
    "left",
    "right",
    "object",
    "thing",
    "item",
    "dog",
    "cat",
    "car",
    "house",
    "tree",
    "flower",
    "face",
    "person",
    "digit",
    "number",
    "zero",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]


SHIPPED = Path(__file__).parents[2] / "utilgen_cli" / "tiny" / "tokenizer"


def load_tokenizer(source: Path, out: Path) -> CLIPTokenizer:
    """The tokenizer at `source`, kept in `out` as well."""
    tokenizer = CLIPTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(out)
    return tokenizer


def train_tokenizer(out: Path, pool: Pool) -> CLIPTokenizer:
    """A byte-pair tokenizer of CLIP's form; the end-of-text id is the highest, as CLIP expects."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    nouns = [w for name in (*pool.classes, *pool.coarse) for w in name.replace("-", " - ").split()]
    tokenizer.train_from_iterator([" ".join(sorted(set(WORDS + nouns)))] * 2, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) for m in bpe["merges"]]
    tokens = [*alphabet, *(f"{a}</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate(tokens)}
    clip_tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)
    clip_tokenizer.save_pretrained(out)
    return clip_tokenizer


def model_config(vocab_size: int) -> dict:
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 128, "head_width": 32,
                       "patch_size": 8, "mlp_ratio": 3.0},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 128, "heads": 4,
                     "layers": 2, "hf_tokenizer_name": "tokenizer"},
    }  # fmt: skip


def to_transformers(text: open_clip.CLIP, eos: int, bos: int) -> CLIPTextModel:
    """The open_clip text tower as a transformers CLIPTextModel (the same function)."""
    width = text.token_embedding.embedding_dim
    config = CLIPTextConfig(
        vocab_size=text.vocab_size, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=len(text.transformer.resblocks), num_attention_heads=4,
        max_position_embeddings=CONTEXT, hidden_act="gelu", projection_dim=128,
        eos_token_id=eos, bos_token_id=bos, pad_token_id=eos,
    )  # fmt: skip
    model = CLIPTextModel(config)
    sd = {
        "embeddings.token_embedding.weight": text.token_embedding.weight,
        "embeddings.position_embedding.weight": text.positional_embedding,
        "final_layer_norm.weight": text.ln_final.weight,
        "final_layer_norm.bias": text.ln_final.bias,
    }
    for i, block in enumerate(text.transformer.resblocks):
        to = f"encoder.layers.{i}"
        for name, part in (
            ("weight", block.attn.in_proj_weight),
            ("bias", block.attn.in_proj_bias),
        ):
            for p, chunk in zip("qkv", part.chunk(3), strict=True):
                sd[f"{to}.self_attn.{p}_proj.{name}"] = chunk
            for a, b in (
                ("self_attn.out_proj", block.attn.out_proj), ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2), ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):  # fmt: skip
                sd[f"{to}.{a}.{name}"] = getattr(b, name)
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    sd = {prefix + k: v.detach().clone() for k, v in sd.items()}
    missing, unexpected = model.load_state_dict(sd, strict=False)
    if unexpected or [k for k in missing if "position_ids" not in k]:
        raise RuntimeError(f"text tower does not map: {missing} {unexpected}")
    return model


def main() -> None:
    parser = arguments(__doc__, steps=2000, batch=128)
    parser.add_argument(
        "--new-tokenizer",
        action="store_true",
        help="train one: the library breaks ties between merges at random, so no two are alike",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    pool = open_pool(args.pool)
    if args.new_tokenizer:
        tokenizer = train_tokenizer(args.out / "tokenizer", pool)
    else:
        tokenizer = load_tokenizer(SHIPPED, args.out / "tokenizer")
    config = model_config(len(tokenizer))
    model = open_clip.CLIP(**config)
    generator = torch.Generator().manual_seed(1)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 1e-3
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.1)
    start = time.time()
    for step in range(args.steps):
        x, texts, _ = pool.batch(args.batch, generator)
        unique, inverse = sorted(set(texts)), None
        inverse = torch.tensor([unique.index(t) for t in texts])
        ids = tokenizer(
            unique, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
        ).input_ids
        image = model.encode_image(x, normalize=True)
        text = model.encode_text(ids, normalize=True)[inverse]
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (inverse[:, None] == inverse[None]).float()  # an equal caption is no negative
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"clip {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)

    (args.out / "open_clip").mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    (args.out / "open_clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    )
    half = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(half, args.out / "open_clip/open_clip_model.safetensors")
    tokenizer.save_pretrained(args.out / "open_clip")
    model.load_state_dict({k: v.float() for k, v in half.items()})
    model.eval()
    text_model = to_transformers(model, tokenizer.eos_token_id, tokenizer.bos_token_id).eval()
    ids = tokenizer(
        ["a photo of a bag"], padding="max_length", max_length=CONTEXT, return_tensors="pt"
    ).input_ids
    ours = text_model(ids).pooler_output @ model.text_projection
    torch.testing.assert_close(ours, model.encode_text(ids), atol=1e-4, rtol=1e-3)
    text_model.half().save_pretrained(args.out / "text_encoder")
    images, labels = plain(args.pool, pool)
    with torch.no_grad():
        ids = tokenizer(
            [f"a photo of a {c}" for c in pool.classes],
            padding="max_length",
            max_length=CONTEXT,
            return_tensors="pt",
        ).input_ids
        text = model.encode_text(ids, normalize=True)
        x = images.float().expand(-1, 3, -1, -1) / 127.5 - 1
        hit = (model.encode_image(x, normalize=True) @ text.T).argmax(1) == labels
    print(f"zero-shot accuracy on unshifted images: {hit.float().mean():.3f}")


def plain(shards: Path | None, pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Unshifted images to look at: of Fashion-MNIST's task, else of the pool itself."""
    if shards is not None:
        return pool.images[:2000], pool.labels[:2000]
    import fashion

    images, labels = fashion.load("train")
    _, task = fashion.split(labels)
    return images[task[::5]][:, None], labels[task[::5]]


if __name__ == "__main__":
    main()
