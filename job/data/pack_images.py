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


def encode_image(file: Path, *, resize: int, quality: int, form: str = "jpeg") -> bytes:
    """The bytes to store.

    An image whose short side is larger than resize (0: none is) is shrunk to it. As jpeg, what is shrunk is encoded anew and all
    else stays the file's own bytes; as ppm, which is plain pixels, every image is encoded. What is encoded is upright by EXIF, in
    RGB, transparent parts over white; the first frame of an animation.

    Args: form: jpeg or ppm. quality: of a JPEG, 1 to 100.
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
        if not shrinks and form == "jpeg":
            return data
        upright = _in_rgb(ImageOps.exif_transpose(image))
        if shrinks:
            scale = resize / min(upright.size)
            size = max(resize, round(upright.width * scale)), max(resize, round(upright.height * scale))
            upright = upright.resize(size, Image.Resampling.BICUBIC)
        out = io.BytesIO()
        upright.save(out, form, quality=quality, optimize=True)  # written once, read often
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
