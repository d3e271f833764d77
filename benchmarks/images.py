"""Made images: photographs as a decoder sees them (500 × 375 pixels, JPEGs of 70 to 110 KB), and an LMDB of many small ones."""

import io
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 500, 375
SMALLEST, LARGEST = 70_000, 110_000
_OCTAVES = ((1, 11.0), (2, 12.0), (4, 12.0), (8, 12.0), (16, 12.0))
"""(size of a grain in pixels, its standard deviation): at quality 85 to 90 these give the sizes above."""


def write_photos(folder: Path, *, count: int, seed: int) -> list[int]:
    """Writes 000000.jpg and so on. Returns: their sizes in bytes, each within SMALLEST to LARGEST."""
    folder.mkdir(parents=True)
    sizes = []
    for number in range(count):
        data = photo(np.random.default_rng((seed, number)))
        assert SMALLEST <= len(data) <= LARGEST, f"image {number} has {len(data)} bytes"
        (folder / f"{number:06d}.jpg").write_bytes(data)
        sizes.append(len(data))
    return sizes


def photo(random: np.random.Generator) -> bytes:
    """One JPEG: a smooth background, shapes on it, texture over all."""
    background = random.integers(30, 226, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(background).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(6, 13))):
        left, top = int(random.integers(-50, WIDTH)), int(random.integers(-50, HEIGHT))
        box = (left, top, left + int(random.integers(30, 200)), top + int(random.integers(30, 200)))
        colour = tuple(int(part) for part in random.integers(20, 236, 3))
        (draw.ellipse if random.random() < 0.7 else draw.rectangle)(box, fill=colour)
    texture = np.zeros((HEIGHT, WIDTH), np.float32)
    for grain, deviation in _OCTAVES:
        noise = random.standard_normal((-(-HEIGHT // grain), -(-WIDTH // grain)), dtype=np.float32) * deviation
        texture += np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    pixels = np.asarray(image, np.float32) + texture[..., None] + random.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * 4
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=int(random.integers(85, 91)))
    return out.getvalue()


def write_small_images(folder: Path, keys: list[str]) -> None:
    """An LMDB with an image under each key: JPEGs of about 3 KB, every 500th the same.

    Not below 2 KB: LMDB keeps such small values among the keys, which makes a tree unlike that of real images.
    """
    random, photos = np.random.default_rng(0), []
    for _ in range(500):
        small = Image.fromarray(random.integers(0, 256, (10, 10, 3), dtype=np.uint8))
        out = io.BytesIO()
        small.resize((128, 128), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        assert 2100 < len(out.getvalue()) < 4000
        photos.append(out.getvalue())
    with lmdb.open(str(folder), map_size=len(keys) * 8192 + 2**26, sync=False) as environment:
        with environment.begin(write=True) as transaction:
            for number, key in enumerate(sorted(keys)):
                transaction.put(key.encode(), photos[number % len(photos)], append=True)
        environment.sync(True)
