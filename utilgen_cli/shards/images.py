"""Image bytes to arrays and back; PIL only, and never more pixels than are safe."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from .sample import Sample

MAX_PIXELS = 64_000_000


def decode_rgb(sample: Sample, size: int | None = None) -> np.ndarray:
    """The image of a sample as uint8 [H, W, 3]; with `size` as a centred square of that side.

    BadInput: no image, broken bytes, or more than MAX_PIXELS (looked at before decoding).
    """
    kind, data = sample.image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise sample.bad(f"its {kind} has {image.width} x {image.height} pixels")
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))
            rgb = to_rgb(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise sample.bad(f"its {kind} cannot be decoded") from None
    return np.asarray(rgb if size is None else square(rgb, size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: 16-bit grey is scaled down, transparency is laid on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        scale = 257.0 if grey.max(initial=0) > 255 else 1.0
        image = Image.fromarray((grey / scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` and cut out the centre."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def encode_image(rgb: np.ndarray, format: str = "png") -> bytes:
    """uint8 [H, W, 3] as PNG (lossless), WebP (lossless) or JPEG (quality 95) bytes."""
    out, image = io.BytesIO(), Image.fromarray(rgb)
    if format == "png":
        image.save(out, "PNG", compress_level=6)
    elif format == "webp":
        image.save(out, "WEBP", lossless=True)
    else:
        image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()
