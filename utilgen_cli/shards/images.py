"""Image bytes to arrays and back; PIL only, and never more pixels than are safe."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image

from .sample import IMAGE_TYPES, BadSample, Sample

MAX_PIXELS = 64_000_000
MAX_ASPECT = 16
MAX_THREADS = 8  # each may hold a picture of MAX_PIXELS
ORIENTATION = 0x0112  # the Exif tag: a camera that was held on its side
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP")  # no other decoder of PIL's is ever asked
STILL = ("MPO",)  # a photograph with a second picture behind it, as some cameras make them


def decode_rgb(sample: Sample, size: int | None = None) -> np.ndarray:
    """The image of a sample as uint8 [H, W, 3]; with `size` as a centred square of that side.

    CMYK, 16-bit, grey and transparent images are converted; images are turned as Exif says.
    BadSample: no image, broken bytes, an animation, or more than MAX_PIXELS (looked at before
    decoding).
    """
    return decode_member(sample, *sample.image, size)


def decode_many(samples: Sequence[Sample], size: int, threads: int = 1) -> list[np.ndarray]:
    """`decode_rgb` of each, in order, by up to `threads` (and MAX_THREADS) threads: Pillow decodes
    and scales outside the interpreter's lock. The first bad sample raises."""

    def decode(sample: Sample) -> np.ndarray:
        kind, data = sample.image
        return _decode(sample, kind, data, size)

    with _quietly(), ThreadPoolExecutor(min(threads, MAX_THREADS)) as pool:
        return list(pool.map(decode, samples) if threads > 1 else map(decode, samples))


def decode_member(sample: Sample, kind: str, data: bytes, size: int | None = None) -> np.ndarray:
    """`decode_rgb` of one image member, whose bytes are `data`."""
    with _quietly():
        return _decode(sample, kind, data, size)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings; for the main thread, since filters are the whole process's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(sample: Sample, kind: str, data: bytes, size: int | None) -> np.ndarray:
    if not data:
        raise sample.bad(f"its {kind} is empty", "empty image")
    if data.startswith(PNG) and (why := png_damage(data)):
        reason = "truncated image" if why == CUT else "corrupt image"
        raise sample.bad(f"its {kind} is damaged: {why}", reason)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_shape(sample, kind, image)
        if size is not None:
            image.draft("RGB", (2 * size, 2 * size))
        image.load()
        rgb = to_rgb(upright(image))
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise sample.bad(f"its {kind} has too many pixels", "too many pixels") from None
    except Exception as error:  # PIL raises whatever the bytes make it stumble on
        cut = "truncated" in str(error).lower()
        reason = "truncated image" if cut else "corrupt image"
        raise sample.bad(f"its {kind} is {'cut off' if cut else 'not decodable'}", reason) from None
    return np.asarray(rgb if size is None else square(rgb, size))


def shorter_side(sample: Sample) -> int:
    """In pixels, by the image's header alone. BadSample: no image, or none that PIL knows."""
    kind, data = sample.image
    try:
        with _quietly():
            return min(Image.open(io.BytesIO(data), formats=FORMATS).size)
    except Exception:  # PIL raises whatever the bytes make it stumble on
        raise sample.bad(f"its {kind} is not decodable", "corrupt image") from None


def check_images(sample: Sample) -> None:
    """BadSample unless every image member (`png`, `win.png`, `jpg_0`, ...) can be decoded."""
    for name, data in sample.members.items():
        kind = name.rpartition(".")[2].partition("_")[0]
        if kind in IMAGE_TYPES:
            decode_member(sample, name, data)


def _check_shape(sample: Sample, kind: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        why = f"its {kind} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
        raise sample.bad(why, "too many pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in STILL:
        raise sample.bad(f"its {kind} is an animation of {frames} frames", "animation")


PNG = b"\x89PNG\r\n\x1a\n"
CUT = "it is cut off"


def png_damage(data: bytes) -> str | None:
    """What is wrong with the chunks of a PNG (their CRCs, the end chunk), or None.

    PIL skips some of these sums, and a flipped bit would become a wrong picture.
    """
    view, at = memoryview(data), len(PNG)
    while at + 12 <= len(view):
        length = _int(view, at)
        end = at + 8 + length
        if end + 4 > len(view):
            break
        if view[at + 4 : at + 8] == b"IHDR" and 0 in (_int(view, at + 8), _int(view, at + 12)):
            return f"it has {_int(view, at + 8)} x {_int(view, at + 12)} pixels"
        if zlib.crc32(view[at + 4 : end]) != _int(view, end):
            return f"a chunk at its byte {at} does not match its sum"
        if view[at + 4 : at + 8] == b"IEND":
            return None
        at = end + 4
    return CUT


def _int(view: memoryview, at: int) -> int:
    return int.from_bytes(view[at : at + 4], "big")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its Exif (or XMP) says. `ImageOps.exif_transpose` writes all of the Exif anew, and
    fails where any other tag makes no sense."""
    try:
        turn = TURNED.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever the bytes of a tag make PIL stumble on: they say nothing
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: 16-bit grey is scaled down, transparency is laid on white."""
    if image.mode.startswith("I"):  # a PNG of 16 bits, dark or not
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` and cut out the centre."""
    if image.size == (size, size):
        return image
    image = _without_far_ends(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _without_far_ends(image: Image.Image) -> Image.Image:
    """At most MAX_ASPECT : 1; else a line of pixels would be scaled up into gigabytes."""
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
