"""Encoded image -> uint8 pixels of the model's size: decode, orient, crop, resize. No global state, no normalisation.

Normalisation waits for the device, so a quarter of the bytes of float32 cross the bus. Images are NumPy's, cut and moved without a
call into torch: each of those lets go of the interpreter and waits for it again, which is what many threads would spend their time
on. See docs/decisions/0004-decoders.md.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

_decode_jpeg_op: Any = None
try:
    # Twice as fast as Pillow, and open_clip brings it. torchvision 0.29 deprecates its decoders in favour of torchcodec; once they
    # are gone Pillow takes over, until torchcodec has been measured.
    import torchvision.io as torchvision_io

    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")
    # Around it, torchvision.io.decode_jpeg notes each use and waits for the interpreter after that.
    _decode_jpeg_op, _RGB = torch.ops.image.decode_jpeg, torchvision_io.ImageReadMode.RGB
except (ImportError, AttributeError, RuntimeError):
    torchvision_io = None
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")  # images are only read

MAX_IMAGE_PIXELS = 178_956_970
"""Larger images are refused before memory is taken for them; the limit Pillow uses against decompression bombs."""

CROP_TRIES = 10
CROP_NUMBERS = 2 * CROP_TRIES + 2
"""Random numbers that a crop uses: area and ratio for each try, then top and left."""

Encoded = bytes | bytearray | memoryview
"""A file's content."""
Pixels = NDArray[np.uint8]
"""(H, W, 3), RGB."""
Decoded = Pixels | Tensor
"""The same; on a GPU, where that has decoded it."""

_PPM = re.compile(rb"P6\n(\d{1,9}) (\d{1,9})\n255\n")
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))


class BadImage(ValueError):
    """These bytes are no image that can be decoded."""


@dataclass(frozen=True)
class View:
    """What the model looks at, from its own preprocessing config."""

    height: int
    width: int
    interpolation: str
    """bicubic or bilinear, always antialiased."""
    resize_mode: str
    """shortest: centre crop; squash: ignore the aspect ratio; longest: pad with fill_color."""
    fill_color: int = 0


def decode(data: Encoded) -> Pixels:
    """Pixels upright by EXIF, transparent parts over white; the first frame of an animation.

    They may lie in `data`, then not to be written to: copy what is to outlive it.

    Raises: BadImage, saying why.
    """
    if not data:
        raise BadImage("it is empty")
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, at = _jpeg_frame(data)
            _refuse_bomb(height, width)
            return _decode_jpeg(data, has_exif=b"Exif" in bytes(data[:at]))
        if (header := _PPM.match(data)) and len(data) - header.end() <= 3 * int(header[1]) * int(header[2]):
            return _decode_ppm(data, at=header.end(), width=int(header[1]), height=int(header[2]))
        return _decode_with_pillow(data)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  decoders raise whatever they like on hostile bytes
        raise BadImage(str(error).splitlines()[0][:200] if str(error) else type(error).__name__) from None


def _decode_jpeg(data: Encoded, *, has_exif: bool) -> Pixels:
    if _decode_jpeg_op is None:
        return _decode_with_pillow(data)
    pixels: Pixels = _decode_jpeg_op(torch.frombuffer(data, dtype=torch.uint8), _RGB.value, has_exif).numpy().transpose(1, 2, 0)
    return pixels


def _decode_ppm(data: Encoded, *, at: int, width: int, height: int) -> Pixels:
    """Of what `clipjob pack --format ppm` writes; the pixels begin at `at`."""
    _refuse_bomb(height, width)
    if not height * width:
        raise BadImage("it has no pixels")
    if missing := at + 3 * height * width - len(data):
        raise BadImage(f"it is cut off: {missing} bytes are missing")
    return np.frombuffer(data, np.uint8, count=3 * height * width, offset=at).reshape(height, width, 3)


def _jpeg_frame(data: Encoded) -> tuple[int, int, int]:
    """(height, width, offset) of the first frame header, without decoding. Metadata comes before it."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big"), at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise BadImage("it is a JPEG without a frame header")


def pixels_of_common_jpeg(data: Encoded) -> int:
    """How many it says that it has; 0 for what not every decoder takes alike: other than baseline, YCbCr and upright."""
    if data[:3] != b"\xff\xd8\xff":
        return 0
    try:
        height, width, at = _jpeg_frame(data)
    except BadImage:
        return 0
    baseline, eight_bits, colours = data[at + 1] == 0xC0, data[at + 4] == 8, data[at + 9 : at + 10] == b"\x03"
    head = bytes(data[:at])
    special = b"Exif" in head or b"Adobe" in head  # turned; perhaps in other colours
    return height * width if baseline and eight_bits and colours and not special else 0


def decode_common_jpegs(data: Sequence[Encoded], *, device: torch.device) -> list[Tensor]:
    """uint8 (H, W, 3) each, on the device. Raises: RuntimeError, for all if one of them can't be decoded."""
    if torchvision_io is None:
        raise RuntimeError("torchvision has no decoders any more")
    raw = [torch.frombuffer(image, dtype=torch.uint8) for image in data]
    decoded: list[Tensor] = torchvision_io.decode_jpeg(raw, mode=_RGB, device=device)
    return [image.permute(1, 2, 0) for image in decoded]


def _refuse_bomb(height: int, width: int, *, what: str = "claims") -> None:
    if height * width > MAX_IMAGE_PIXELS:
        raise BadImage(f"it {what} {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}")


def _decode_with_pillow(data: Encoded) -> Pixels:
    with Image.open(io.BytesIO(data)) as opened:
        _refuse_bomb(opened.height, opened.width)
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            # 16-bit grey: Pillow's own conversion would clip at 255 and turn the image white.
            image = Image.fromarray((np.asarray(image, dtype=np.int32) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"))


def random_crop_view(image: Decoded, view: View, *, numbers: NDArray[np.float64], smallest: float) -> Decoded:
    """A random part of the image, resized to the view.

    Args:
        numbers: (CROP_NUMBERS,) in [0, 1), the only source of randomness.
        smallest: smallest share of the area that is kept.
    Returns: (view.height, view.width, 3), where the image is; part of it, if no resizing is needed.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], numbers=numbers, smallest=smallest)
    return _resized(image[top : top + height, left : left + width], view.height, view.width, view.interpolation)


def crop_box(height: int, width: int, *, numbers: NDArray[np.float64], smallest: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop "Inception style": area in [smallest, 1], aspect ratio in [3/4, 4/3].

    The same distribution as torchvision's RandomResizedCrop, whose fallback it shares: the largest centre crop within the ratios.
    """
    *tries, top_number, left_number = numbers.tolist()
    for area_number, ratio_number in zip(tries[0::2], tries[1::2], strict=True):
        area = height * width * (smallest + (1 - smallest) * area_number)
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio_number)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_number * (height - crop_height + 1))
            left = int(left_number * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def whole_view(image: Decoded, view: View) -> Decoded:
    """The view that evaluation and the exported model use: open_clip's own preprocessing, in uint8.

    Args and Returns: as of random_crop_view.
    Raises: BadImage, for a strip so narrow that it would have to become huge.
    """
    height, width = image.shape[:2]
    if view.resize_mode == "squash":
        return _resized(image, view.height, view.width, view.interpolation)
    scales = view.height / height, view.width / width
    shortest = view.resize_mode == "shortest"
    scale = max(scales) if shortest else min(scales)
    to_whole = math.floor if shortest and view.height == view.width else round  # as open_clip's transforms round
    new_height, new_width = (max(1, to_whole(side * scale + 1e-6)) for side in (height, width))
    _refuse_bomb(new_height, new_width, what="is so narrow that its view needs")
    return _centred(_resized(image, new_height, new_width, view.interpolation), view)


def _centred(image: Decoded, view: View) -> Decoded:
    """Cuts what is too large and pads what is too small, around the centre."""
    missing_rows, missing_columns = max(0, view.height - image.shape[0]), max(0, view.width - image.shape[1])
    if missing_rows or missing_columns:
        top, left = missing_rows // 2, missing_columns // 2
        bottom, right = missing_rows - top, missing_columns - left
        if isinstance(image, Tensor):
            image = torch.nn.functional.pad(image, (0, 0, left, right, top, bottom), value=view.fill_color)
        else:
            image = np.pad(image, ((top, bottom), (left, right), (0, 0)), constant_values=view.fill_color)
    top, left = round((image.shape[0] - view.height) / 2), round((image.shape[1] - view.width) / 2)
    return image[top : top + view.height, left : left + view.width]


def _resized(image: Decoded, height: int, width: int, interpolation: str) -> Decoded:
    if tuple(image.shape[:2]) == (height, width):
        return image
    if isinstance(image, Tensor):
        if image.device.type != "cpu":
            return _resized_in_float(image, height, width, interpolation)
        image = image.numpy()
    # Torch's resize takes one layout as it is: whole, and a pixel's colours side by side.
    planes = torch.from_numpy(np.ascontiguousarray(image).reshape(1, *image.shape).transpose(0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(planes, size=(height, width), mode=interpolation, antialias=True)
    pixels: Pixels = resized.numpy()[0].transpose(1, 2, 0)
    return pixels


def _resized_in_float(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """On a GPU, whose resize knows no uint8. Like the other it is Pillow's to two levels, on photographs."""
    planes = image.permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(planes, size=(height, width), mode=interpolation, antialias=True)
    resized = resized.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.channels_last)  # as a batch has it
    return resized[0].permute(1, 2, 0)
