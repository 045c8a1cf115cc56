"""Two small data sets that the shipped bundle was not made for, as folders of images.

`python images.py digits OUT` writes scikit-learn's handwritten digits (8 x 8 grey);
`python images.py photos OUT` cuts patches of 40 to 100 pixels a side out of ten colour photographs
that scikit-image and scikit-learn carry, a class a photograph. OUT/{pool,real,val,test}/CLASS/*
appear: a pool to train a small generator on, the few shots, validation images, and a test set.
No two parts share a digit, or a block of a photograph.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOS = {
    "astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png",
    "eye": "retina.jpg", "galaxy": "hubble_deep_field.jpg", "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg", "tissue": "ihc.png", "palace": "china.jpg", "flower": "flower.jpg",
}  # fmt: skip
BLOCKS = 4  # a side: a photograph is cut into 16, and a block belongs to one part
PARTS = {"pool": range(8), "real": range(8, 10), "val": range(10, 12), "test": range(12, 16)}
PATCHES = {"pool": 200, "test": 50}
Part = tuple[str, str, int, Image.Image, str]  # part, class, number, image, suffix


def digits(shots: int) -> Iterator[Part]:
    """A seeded order of each class: test, real, val, and the rest is the pool."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    random = np.random.default_rng(0)
    for c, name in enumerate(DIGITS):
        order = random.permutation(np.flatnonzero(labels == c))
        ends = {"test": 50, "real": 50 + shots, "val": 50 + 2 * shots, "pool": len(order)}
        start = 0
        for part, end in ends.items():
            for i in order[start:end]:
                yield part, name, int(i), Image.fromarray(pixels[i]), "png"
            start = end


def photos(shots: int) -> Iterator[Part]:
    """Random squares within the blocks of a part, saved as JPEG at the size they were cut."""
    import skimage
    import sklearn

    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets"]
    random = np.random.default_rng(0)
    for name, file in PHOTOS.items():
        path = next(p for f in folders for p in (f / file, f / "images" / file) if p.exists())
        photo = np.asarray(Image.open(path).convert("RGB"))
        height, width = (n // BLOCKS for n in photo.shape[:2])
        order = random.permutation(BLOCKS * BLOCKS)
        for part, blocks in PARTS.items():
            for number in range(PATCHES.get(part, shots)):
                row, column = divmod(int(random.choice(order[list(blocks)])), BLOCKS)
                side = int(random.integers(40, min(100, height, width) + 1))
                y = row * height + int(random.integers(height - side + 1))
                x = column * width + int(random.integers(width - side + 1))
                yield part, name, number, Image.fromarray(photo[y : y + side, x : x + side]), "jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("digits", "photos"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--shots", type=int, default=8, help="real images a class; as many val")
    args = parser.parse_args()
    images = digits(args.shots) if args.which == "digits" else photos(args.shots)
    counts: dict[str, int] = {}
    for part, name, number, image, suffix in images:
        folder = args.out / part / name
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{part}-{name}-{number:04d}.{suffix}", quality=95)
        counts[part] = counts.get(part, 0) + 1
    print(", ".join(f"{part} {count}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
