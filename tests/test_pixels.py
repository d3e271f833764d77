"""Any image that people have becomes upright RGB of the model's size, as open_clip's own preprocessing would see it."""

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from benchmarks.images import write_photos
from job.data import pixels as pixels_module
from job.data.order import uniforms
from job.data.pixels import CROP_NUMBERS, BadImage, Pixels, View, _resized, crop_box, decode, random_crop_view, whole_view

RED, WHITE = (220, 20, 30), (255, 255, 255)


def photo(width: int = 120, height: int = 80, *, seed: int = 0) -> Image.Image:
    """Smooth colours with noise: close to a photograph for codecs and filters."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(
        (np.asarray(coarse, dtype=np.int16) + rng.integers(-8, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colour_at(pixels: Pixels, y: int, x: int) -> tuple[int, ...]:
    return tuple(pixels[y, x].tolist())


def test_jpeg_decodes_as_pillow_does() -> None:
    data = encoded(photo(), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode(data).astype(int) - expected).max() <= 2


def test_ppm_is_the_pixels_themselves() -> None:
    image = photo(31, 17)
    data = encoded(image, "PPM")
    expected = np.array(image)
    assert np.array_equal(decode(data), expected)
    assert np.array_equal(decode(bytearray(data)), expected)
    with_comment = data.replace(b"P6\n", b"P6\n# by hand\n", 1)
    assert np.array_equal(decode(with_comment), expected)
    assert np.array_equal(decode(data + b"\n"), expected)


def test_cmyk_jpeg_has_its_colours() -> None:
    data = encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(np.subtract(colour_at(decode(data), 8, 8), RED)).max() < 12


def test_grey_jpeg_becomes_three_equal_channels() -> None:
    pixels = decode(encoded(photo().convert("L"), "JPEG"))
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str) -> None:
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 20, 20))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    pixels = decode(encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    assert pixels.shape == (40, 20, 3)
    assert np.abs(np.subtract(colour_at(pixels, 5, 10), RED)).max() < 12
    assert np.abs(np.subtract(colour_at(pixels, 35, 10), WHITE)).max() < 12


def with_transparency(kind: str) -> bytes:
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 10, 10))
    if kind == "palette":
        return _palette_png(image)
    if kind == "grey":
        return encoded(image.convert("LA"), "PNG")
    return encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))


def _palette_png(image: Image.Image) -> bytes:
    palette = Image.new("P", image.size, 1)
    palette.putpalette([*RED, 0, 0, 0])
    palette.paste(0, (0, 0, 10, 10))
    return encoded(palette, "PNG", transparency=1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "palette", "grey", "GIF"])
def test_transparent_parts_are_white(kind: str) -> None:
    pixels = decode(with_transparency(kind))
    assert colour_at(pixels, 5, 15) == WHITE
    assert colour_at(pixels, 5, 5) != WHITE


def test_16_bit_grey_png_keeps_its_tones() -> None:
    tones = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pixels = decode(encoded(Image.fromarray(tones), "PNG"))
    assert np.abs(pixels[..., 0].astype(int) - (tones >> 8)).max() <= 1


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (10, 10), RED), Image.new("RGB", (10, 10), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(colour_at(decode(data), 5, 5), RED)).max() < 12


def _bomb() -> bytes:
    data = bytearray(encoded(photo(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # a frame header that claims 65535 x 65535 pixels
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "identify"),
        (b"\xff\xd8\xff\xe0", "without a frame header"),
        (encoded(photo(), "JPEG")[:2000], "decode_jpeg|truncated"),
        (encoded(photo(), "PNG")[:2000], "truncated"),
        (encoded(photo(), "PPM")[:2000], "cut off: 2681. bytes are missing"),
        (b"P6\n99999999 99999999\n255\n", "99999999 x 99999999"),
        (b"P6\n0 0\n255\n", "no pixels"),
        (_bomb(), "65535 x 65535"),
        (b"\xff\xd8" + b"\xff" * 5000, "without a frame header"),
    ],
    ids=["empty", "html", "no frame", "cut jpeg", "cut png", "cut ppm", "ppm bomb", "empty ppm", "bomb", "fill bytes"],
)
def test_what_is_no_image_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_a_strip_that_would_become_huge_is_refused() -> None:
    strip = decode(b"P6\n1 65535\n255\n" + bytes(3 * 65535))
    with pytest.raises(BadImage, match="so narrow that its view needs 224 x 14679840 pixels"):
        whole_view(strip, View(224, 224, "bicubic", "shortest"))
    assert whole_view(strip, View(32, 32, "bicubic", "longest")).shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_view_of_a_file_is_decoded_like_a_copy(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = [encoded(photo(31, 17), kind, exif=exif) for kind in ("JPEG", "PNG")] + [encoded(photo(31, 17), "PPM")]
    view = View(16, 16, "bicubic", "shortest")
    for data in files:
        copy, in_place = decode(bytearray(data)), decode(memoryview(data))
        assert np.array_equal(copy, in_place)
        assert np.array_equal(whole_view(np.ascontiguousarray(copy), view), whole_view(in_place, view))


def test_without_torchvisions_decoder_pillow_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(), "JPEG", quality=90)
    expected = decode(data).astype(int)
    monkeypatch.setattr(pixels_module, "_decode_jpeg_op", None)
    assert np.abs(decode(data) - expected).max() <= 2


@pytest.mark.parametrize(("width", "height"), [(120, 80), (80, 120), (64, 64), (333, 50), (20, 30)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_evaluation_sees_what_open_clip_would_show_the_model(width: int, height: int, resize_mode: str) -> None:
    image = photo(width, height)
    transform = open_clip.image_transform(
        64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode, interpolation="bicubic"
    )
    theirs = transform(image).permute(1, 2, 0).numpy() * 255
    ours = whole_view(decode(encoded(image, "PNG")), View(64, 64, "bicubic", resize_mode, 0)).astype(np.float32)
    assert np.abs(ours - theirs).mean() < 0.6
    assert np.abs(ours - theirs).max() <= 6


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """JPEGs of 500 x 375 pixels with texture at every scale, as in the benchmarks."""
    folder = tmp_path_factory.mktemp("photographs") / "made"
    write_photos(folder, count=6, seed=0)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("size", [(224, 224), (224, 298), (288, 384)])
def test_the_resize_is_pillows_to_two_levels(photographs: list[bytes], size: tuple[int, int]) -> None:
    for data in photographs:
        image = decode(data)
        expected = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
        assert np.quantile(np.abs(_resized(image, *size, "bicubic").astype(int) - expected), 0.999) <= 2


def test_features_of_photographs_are_those_of_open_clips_preprocessing(photographs: list[bytes]) -> None:
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    model.eval()
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    views = torch.from_numpy(np.stack([whole_view(decode(data), View(224, 224, "bicubic", "shortest")) for data in photographs]))
    with torch.no_grad():
        ours = model.encode_image((views.permute(0, 3, 1, 2) / 255 - shift) / scale, normalize=True)
        theirs = torch.stack([preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in photographs])
        expected = model.encode_image(theirs, normalize=True)
    assert (ours * expected).sum(dim=1).min() >= 0.9999
    assert (expected @ expected.T).min() < 0.9, "the model tells them apart"


def test_crops_follow_the_distribution_of_random_resized_crop() -> None:
    numbers = uniforms(np.arange(4000), CROP_NUMBERS, seed=0, stream=0)
    boxes = np.array([crop_box(100, 120, numbers=row, smallest=0.5) for row in numbers])
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop

    blank = torch.zeros(3, 100, 120)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    assert np.abs(boxes.mean(axis=0) - theirs.mean(axis=0)).max() < 1.0
    assert np.abs(boxes.std(axis=0) - theirs.std(axis=0)).max() < 1.0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 7), (375, 500)])
def test_crops_stay_inside_of_any_image(height: int, width: int) -> None:
    for row in uniforms(np.arange(200), CROP_NUMBERS, seed=1, stream=0):
        top, left, crop_height, crop_width = crop_box(height, width, numbers=row, smallest=0.08)
        assert 0 <= top <= top + crop_height <= height
        assert 0 <= left <= left + crop_width <= width
        assert crop_height > 0 < crop_width


def test_a_crop_is_the_same_whoever_computes_it() -> None:
    image = decode(encoded(photo(), "JPEG"))
    numbers = uniforms(np.array([7]), CROP_NUMBERS, seed=0, stream=0)[0]
    view = View(32, 32, "bicubic", "shortest")
    first = random_crop_view(image, view, numbers=numbers, smallest=0.9)
    assert first.dtype == np.uint8
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, random_crop_view(image.copy(), view, numbers=numbers, smallest=0.9))
