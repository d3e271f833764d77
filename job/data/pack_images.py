"""What `clipjob pack` does to one image: read, make sure that it decodes, shrink. Pillow only: packing needs no torch."""

import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from job.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
"""Files that count as images in a folder, whatever the case."""

BAD_IMAGE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
    *(ArithmeticError, AttributeError, LookupError, TypeError, NotImplementedError, MemoryError, RuntimeError),
)
"""What Pillow raises on damaged files, some of it by accident."""


def encode_image(file: Path, *, resize: int, quality: int) -> bytes:
    """The bytes to store: the file's own if its short side is at most resize (or resize is 0), else a smaller JPEG of it.

    The JPEG is upright by EXIF, in RGB, transparent parts over white; the first frame of an animation.

    Raises: one of BAD_IMAGE_ERRORS, for a file that can't be read or decoded to its end.
    """
    data = file.read_bytes()
    if not data:
        raise ValueError("it is empty")
    with _identified(data) as image:
        shrinks = 0 < resize < min(image.size)
        if shrinks:
            # A JPEG decodes straight to half or a quarter of its size; at least twice the target is kept for the filter to work on.
            scale = 2 * resize / min(image.size)
            image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        image.load()
        if not shrinks:
            return data
        upright = _in_rgb(ImageOps.exif_transpose(image))
        scale = resize / min(upright.size)
        size = max(resize, round(upright.width * scale)), max(resize, round(upright.height * scale))
        out = io.BytesIO()
        upright.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality, optimize=True)  # written once, read often
        return out.getvalue()


def _identified(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("it is in no image format that Pillow knows") from None


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: some versions of Pillow would clip it at 255, to white
        image = Image.fromarray((np.asarray(image, dtype=np.int32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def caption_of(file: Path, key: str) -> str:
    """The text beside the image (cat.txt for cat.jpg), its lines joined by ", "; without one, the names of its folders.

    Raises: DataError, if the text is not UTF-8; OSError.
    """
    sidecar = file.with_suffix(".txt")
    if sidecar.is_file():
        try:
            lines = sidecar.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{sidecar} is not UTF-8 text. Convert it (iconv -t UTF-8), or remove it.") from None
        return ", ".join(line.strip() for line in lines if line.strip())
    return ", ".join(os.path.dirname(key).split("/"))
