"""What is read of an image's file: whole, upright, at the right depth; or one line that says why
not."""

import io
import random
import re
import struct
import tracemalloc
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from builders.images import FOUR, GREYS, RGB, encoded, random_pixels, tiff, write_image
from PIL import Image

from anomaly_detection import Detector
from anomaly_detection.data import Sample, get_test_transforms
from anomaly_detection.data.decode import (
    MAX_PIXELS,
    decode_image,
    decode_mask,
    read_file,
)
from anomaly_detection.data.mvtec import read_sample
from anomaly_detection.errors import DataError
from anomaly_detection.inference.runtimes import Outputs

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files

COLOUR = (200, 100, 50)
SIZE = (5, 4)  # width and height
ORIENTATION = 274  # the tag


def palette_image() -> Image.Image:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, *COLOUR])
    return image


def deep(value: int, dtype: str = "uint16") -> Image.Image:
    return Image.fromarray(np.full(SIZE[::-1], value, dtype))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def with_tags(content: bytes, tags: dict[int, int]) -> bytes:
    """A little-endian TIFF in which single numbers have other values."""
    for tag, value in tags.items():
        entry = re.escape(struct.pack("<H", tag)) + b"[\x03\x04]\x00\x01\x00\x00\x00"
        at = re.search(entry, content, re.DOTALL).end()
        content = content[:at] + struct.pack("<I", value) + content[at + 4 :]
    return content


def four_channels(compression: str) -> bytes:
    """Random bytes in a compression that tifffile does not write by itself."""
    values = random_pixels(5, 7, 4)
    return with_tags(encoded(values, "TIFF", compression=compression), {338: 0})


def png(width: int, height: int, pixels: bytes, bits: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    content = header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


PNG_OF_48_BITS = png(2, 2, (b"\0" + b"\xff" * 12) * 2, bits=16, colour=2)

WHOLE = {
    "grey.png": encoded(random_pixels(40, 50), "PNG"),
    "colour.png": encoded(random_pixels(40, 50, 3), "PNG"),
    "deep.png": encoded(random_pixels(40, 50, dtype="uint16"), "PNG"),
    "colour.jpg": encoded(random_pixels(40, 50, 3), "JPEG"),
    "progressive.jpg": encoded(random_pixels(40, 50, 3), "JPEG", progressive=True),
    "colour.bmp": encoded(random_pixels(40, 50, 3), "BMP"),
    "deep.tif": encoded(random_pixels(40, 50, dtype="uint16"), "TIFF"),
    "lzw.tif": encoded(random_pixels(40, 50, 3), "TIFF", compression="tiff_lzw"),
    "deflate.tif": encoded(random_pixels(40, 50, 3), "TIFF", compression="tiff_deflate"),
}


@pytest.mark.parametrize(
    ("names", "image", "expected"),
    [
        ("a.png a.bmp a.tif A.TIFF a.jpg A.JPEG", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("palette.png palette.bmp", palette_image(), COLOUR),
        ("opaque.png", Image.new("RGBA", SIZE, (*COLOUR, 255)), COLOUR),
        ("translucent.png", Image.new("RGBA", SIZE, (*COLOUR, 128)), COLOUR),
        ("grey.png grey.bmp grey.tif grey.jpg", Image.new("L", SIZE, 100), (100,) * 3),
        ("grey_alpha.png", Image.new("LA", SIZE, (100, 128)), (100,) * 3),
        ("bit.png bit.tif", Image.new("1", SIZE, 1), (255,) * 3),
        ("deep.png deep.tif", deep(0x6464), (100,) * 3),
        ("big_endian.tif", deep(0x6464, ">u2"), (100,) * 3),
        ("integer.tif", deep(0x6464, "int32"), (100,) * 3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_is_read_as_three_channels_of_bytes(tmp_path, names, image, expected):
    for name in names.split():
        image.save(tmp_path / name)
        found = read_sample(Sample(tmp_path / name, "test", "good"))["image"]
        assert (found.shape, found.dtype) == ((3, 4, 5), torch.uint8)
        tolerance = 2 if name.lower().endswith(("jpg", "jpeg")) else 0  # JPEG loses a little
        difference = found.int() - torch.tensor(expected).view(3, 1, 1)
        assert difference.abs().max() <= tolerance


@pytest.mark.parametrize("name", WHOLE)
def test_a_wrong_suffix_does_not_matter(name, tmp_path):
    (tmp_path / "a.jpg").write_bytes(WHOLE[name])
    expected = np.asarray(Image.open(io.BytesIO(WHOLE[name])))
    found = decode_image(read_file(tmp_path / "a.jpg"), "a.jpg", dtype=expected.dtype)
    np.testing.assert_array_equal(found, expected)


def test_a_phones_jpeg_of_several_images_is_read():
    first, second = (Image.fromarray(random_pixels(40, 50, 3, seed=i)) for i in (0, 1))
    content = encoded(first, "MPO", save_all=True, append_images=[second])
    assert decode_image(content, "phone.jpg").shape == (40, 50, 3)


@pytest.mark.parametrize(
    ("bit_depth", "value", "as_8", "as_16"),
    [
        (16, 128, 0, 128),  # 0.498
        (16, 129, 1, 129),  # 0.502
        (16, 257, 1, 257),
        (16, 65535, 255, 65535),
        (12, 0, 0, 0),
        (12, 1, 0, 16),  # 16.004
        (12, 1000, 62, 16004),  # 62.27 and 16003.66
        (12, 2048, 128, 32776),  # 127.53 and 32775.503
        (12, 4095, 255, 65535),
        (10, 1, 0, 64),  # 64.06
        (10, 512, 128, 32800),  # 127.62 and 32800.03
        (10, 1023, 255, 65535),
        (9, 511, 255, 65535),
    ],
)
def test_deep_values_are_scaled_by_the_bit_depth(bit_depth, value, as_8, as_16):
    shapes = [(3, 4), (3, 4, 3), (3, 4, 4)]
    files = [tiff(np.full(shape, value, np.uint16)) for shape in shapes]
    files.append(encoded(np.full((3, 4), value, np.uint16), "PNG"))
    for content, shape in zip(files, [*shapes, (3, 4)], strict=True):
        for dtype, expected in (("uint8", as_8), ("uint16", as_16)):
            found = decode_image(content, "a", bit_depth, dtype)
            assert (found.shape, found.dtype) == (shape, dtype)
            assert set(found.ravel().tolist()) == {expected}


def test_images_of_eight_bits_do_not_depend_on_the_bit_depth():
    content = encoded(np.full((4, 5), 100, np.uint8), "PNG")
    assert set(decode_image(content, "a", bit_depth=10).ravel().tolist()) == {100}


UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),  # to be turned clockwise
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright_as_the_camera_says(orientation):
    values, exif = random_pixels(3, 5, 3), oriented(orientation)
    tag = RGB | {"extratags": [(ORIENTATION, "H", 1, orientation, True)]}
    expected = UPRIGHT[orientation](values)
    for content in (
        encoded(values, "PNG", exif=exif),
        encoded(values, "TIFF", exif=exif),
        tiff(values, **tag),
    ):
        np.testing.assert_array_equal(decode_image(content, "a"), expected)
    jpeg = Image.open(io.BytesIO(encoded(values, "JPEG")))
    found = decode_image(encoded(values, "JPEG", exif=exif), "a")
    np.testing.assert_array_equal(found, UPRIGHT[orientation](np.asarray(jpeg)))
    found = decode_image(tiff(values * np.uint16(257), **tag), "a", dtype="uint16")
    np.testing.assert_array_equal(found, expected * np.uint16(257))


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((5, 7), "uint16", {}),
        ((5, 7), "uint16", {"byteorder": ">"}),
        ((5, 7, 3), "uint16", RGB),
        ((5, 7, 3), "uint16", RGB | {"byteorder": ">"}),
        ((5, 7, 3), "uint16", RGB | {"bigtiff": True}),
        ((5, 7, 3), "uint16", RGB | {"compression": "zlib", "predictor": True}),
        ((1, 7, 3), "uint16", RGB),
        ((64, 64, 3), "uint16", RGB | {"tile": (16, 16)}),
        ((5, 7, 3), "uint16", GREYS),
        ((5, 7, 4), "uint16", FOUR),
        ((5, 7, 4), "uint16", GREYS),
        ((5, 7, 4), "uint8", FOUR),
        ((5, 7, 4), "uint8", GREYS),
    ],
    ids=str,
)
def test_tiffs_are_read_whole(shape, dtype, options):
    values = random_pixels(*shape, dtype=dtype)
    content = tiff(values, **options)
    np.testing.assert_array_equal(decode_image(content, "a", dtype="uint16"), values)
    if values.ndim == 3:
        planar = np.moveaxis(values, -1, 0)
        content = tiff(planar, **options | {"planarconfig": "separate"})
        np.testing.assert_array_equal(decode_image(content, "a", dtype="uint16"), values)


def test_compressed_tiffs_are_read():
    for compression in ("packbits", "tiff_deflate", "tiff_adobe_deflate"):
        found = decode_image(four_channels(compression), "a")
        np.testing.assert_array_equal(found, random_pixels(5, 7, 4))


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is there")
def test_a_compression_that_needs_a_package_is_named():
    with pytest.raises(DataError, match=r"^a.tif: its compression needs a package, pip install im"):
        decode_image(four_channels("tiff_lzw"), "a.tif")


def test_the_first_page_counts():
    pages = random_pixels(2, 5, 7, 3, dtype="uint16")
    np.testing.assert_array_equal(decode_image(tiff(pages, **RGB), "a", dtype="uint16"), pages[0])


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_is_dropped(kind, dtype):
    values = random_pixels(5, 7, 5, dtype=dtype)
    files = {4: tiff(values, **RGB, extrasamples=["unspecified", kind])}
    if (kind, dtype) != ("assocalpha", "uint8"):  # Pillow divides by it
        files[3] = tiff(values[..., :4], **RGB, extrasamples=[kind])
    for channels, content in files.items():
        found = decode_image(content, "a", dtype=dtype)
        np.testing.assert_array_equal(found, values[..., :channels])
    if dtype == "uint8":
        content, expected = encoded(values[..., :4], "PNG"), values[..., :3]
    else:
        content, expected = tiff(values[..., :2], **GREYS, extrasamples=[kind]), values[..., 0]
    np.testing.assert_array_equal(decode_image(content, "a", dtype=dtype), expected)


DEEP_FOUR = tiff(random_pixels(5, 7, 4, dtype="uint16"))
REFUSED = {
    "must have 1, 3 or 4 channels besides alpha, got [25]": [
        tiff(random_pixels(5, 7, 2, dtype="uint16"), **GREYS),
        tiff(random_pixels(5, 7, 5, dtype="uint16"), **GREYS),
    ],
    "colours of 16 bits must be in a TIFF as RGB": [
        tiff(random_pixels(5, 7, 4, dtype="uint16"), photometric="separated"),
        PNG_OF_48_BITS,
    ],
    "must have 8 or 16 bits, got floating point": [
        tiff(np.ones((5, 7, 3), np.float32)),
        encoded(deep(1, "float32"), "TIFF"),
    ],
    "values must not be negative, got -5": [
        tiff(np.full((5, 7, 3), -5, np.int16)),
        encoded(deep(-5, "int32"), "TIFF"),
    ],
    "values must be at most 4095 with data.bit_depth 12, got 4096": [
        tiff(np.full((5, 7, 3), 4096, np.uint16)),
        encoded(deep(4096), "TIFF"),
        encoded(deep(4096), "PNG"),
    ],
    "must be a whole image, but cannot be decoded": [
        DEEP_FOUR[:-9],
        DEEP_FOUR[:60],
        DEEP_FOUR[:6],
    ],
    "must have at most 100,000,000 pixels": [with_tags(DEEP_FOUR, {256: 65535, 257: 65535})],
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_read_whole_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / "a.tif"
    for content in REFUSED[text]:
        path.write_bytes(content)
        for read in (
            lambda: decode_image(path.read_bytes(), path, 12, "uint16"),
            lambda: read_sample(Sample(path, "test", "good"), bit_depth=12),
        ):
            with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{text}") as error:
                read()
            assert "\n" not in str(error.value)


def test_colours_of_16_bits_in_a_png_are_refused_at_full_depth_too():
    with pytest.raises(DataError, match=r"^deep.png: colours of 16 bits must be in a TIFF"):
        decode_image(PNG_OF_48_BITS, "deep.png", bit_depth=16)


def read_mask(tmp_path, mask: Image.Image, image: Image.Image | None = None, **options):
    """The item of an image and its mask."""
    mask.save(tmp_path / "mask.tif")
    (image or Image.new("L", SIZE, 9)).save(tmp_path / "image.png", **options)
    return read_sample(Sample(tmp_path / "image.png", "test", "crack", tmp_path / "mask.tif"))


@pytest.mark.parametrize(
    "mask",
    [
        Image.new("L", SIZE, 1),
        Image.new("L", SIZE, 255),
        Image.new("1", SIZE, 1),
        Image.new("RGB", SIZE, (0, 0, 3)),
        Image.new("RGBA", SIZE, (255, 0, 0, 255)),
        palette_image(),
        deep(1),
        deep(65535),
    ],
    ids=lambda mask: mask.mode,
)
def test_any_value_but_zero_is_a_masked_pixel(tmp_path, mask):
    values = read_mask(tmp_path, mask)["mask"]
    assert (values.shape, values.dtype) == ((1, 4, 5), torch.uint8)
    assert values.unique().tolist() == [1]


def test_black_pixels_are_not_masked(tmp_path):
    half = np.zeros((4, 5), np.uint8)
    half[:2] = 7
    mask = read_mask(tmp_path, Image.fromarray(half))["mask"]
    assert mask[0].tolist() == [[1] * 5, [1] * 5, [0] * 5, [0] * 5]
    assert not read_mask(tmp_path, Image.new("RGBA", SIZE, (0, 0, 0, 255)))["mask"].any()


def test_a_mask_must_be_as_large_as_its_image_is_upright(tmp_path):
    item = read_mask(tmp_path, Image.new("L", (4, 5), 255), exif=oriented(6))
    assert item["image"].shape == (3, 5, 4)
    assert item["mask"].shape == (1, 5, 4)
    text = r"mask.tif: a mask must be as large.* got 4 x 5 pixels for image.png of 5 x 4"
    with pytest.raises(DataError, match=text):
        read_mask(tmp_path, Image.new("L", (4, 5), 255))


def test_a_shrunken_mask_takes_whole_pixels_and_mixes_none(tmp_path):
    def shrunken(start: int) -> torch.Tensor:
        mask = np.zeros((64, 64), np.uint8)
        mask[:, start::2] = 255
        path = write_image(tmp_path / "mask.png", mask)
        return read_sample(Sample(path, "test", "crack", path), get_test_transforms(32))["mask"]

    # Which column of each pair is taken does not matter; a mean would round both alike.
    assert (shrunken(0) + shrunken(1)).unique().tolist() == [1]


def damaged(content: bytes, how: str, chance: random.Random) -> bytes:
    if how == "truncated":
        return content[: chance.randrange(len(content) * 9 // 10)]
    values = bytearray(content)
    if how == "bits flipped":
        for _ in range(chance.choice([1, 3, 30])):
            values[chance.randrange(len(values))] ^= 1 << chance.randrange(8)
    else:
        start, length = chance.randrange(len(values)), chance.randrange(1, 200)
        noise = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
        values[start : start + length] = noise
    return bytes(values)


def damaged_files() -> dict[str, bytes]:
    chance = random.Random(0)
    return {
        f"{how} {i} {name}": damaged(content, how, chance)
        for how in ("truncated", "bits flipped", "overwritten")
        for name, content in WHOLE.items()
        for i in range(8)
    }


DAMAGED = damaged_files()
SIDE = 60_000


def enlarged(name: str, old: tuple[int, int], form: str) -> bytes:
    """The file with another width and height where it has these in its header."""
    assert struct.pack(form, *old) in WHOLE[name]
    return WHOLE[name].replace(struct.pack(form, *old), struct.pack(form, SIDE, SIDE), 1)


BOMBS = {
    "a.png": png(SIDE, SIDE, bytes(100_000)),
    "just_above.png": png(10_001, 10_000, bytes(100_000)),
    "a.bmp": enlarged("colour.bmp", (50, 40), "<ii"),
    "a.jpg": enlarged("colour.jpg", (40, 50), ">HH"),
    "a.tif": with_tags(encoded(random_pixels(40, 50), "TIFF"), {256: SIDE, 257: SIDE}),
}
OTHERS = {
    "empty.png": b"",
    "zeros.png": bytes(1000),
    "text.jpg": b"This is no image.\n" * 10,
    "a.gif": encoded(random_pixels(40, 50), "GIF"),
    "webp.png": encoded(random_pixels(40, 50, 3), "WEBP"),
    "pdf.tif": b"%PDF-1.4\n" + bytes(100),
    "archive.bmp": b"PK\x03\x04" + bytes(100),
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("bit_depth", [12, 16])
@pytest.mark.parametrize("decode", [decode_image, lambda *x: decode_mask(*x[:2])])
def test_a_damaged_image_is_one_line_or_still_an_image(decode, bit_depth):
    refused = {}
    for name, content in DAMAGED.items():
        try:
            assert decode(content, name, bit_depth).dtype == np.uint8
        except DataError as error:
            refused[name] = str(error)
    assert {name for name in DAMAGED if name.startswith("truncated")} <= set(refused)
    for name, message in refused.items():
        assert message.startswith(f"{name}: ")
        assert "\n" not in message
    assert len(refused) > 100


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_file_is_refused_whatever_its_name(name):
    with pytest.raises(DataError, match=r"cannot be decoded \(none of PNG, JPEG, BMP, TIFF"):
        decode_image(OTHERS[name], name)


@pytest.mark.parametrize("name", BOMBS)
def test_a_size_beyond_the_limit_is_refused_before_decoding(name):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}: must have at most {MAX_PIXELS:,} pixels"):
            decode_image(BOMBS[name], name)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.png: must be readable: No such file"):
        read_file(tmp_path / "gone.png")


@pytest.fixture
def detector() -> Detector:
    """Scores images by their mean."""
    content = {"threshold": 0.5, "calibration_scores": [0.1], "parameters": {}, "provenance": {}}
    return Detector(
        content | {"preprocessing": {"image_size": 8, "bit_depth": 16}},
        lambda x: Outputs(x.mean(axis=(1, 2, 3)), np.zeros(len(x)), np.zeros(len(x))),
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_tiny_and_long_images_are_judged(detector, size, tmp_path):
    path = write_image(tmp_path / "a.png", np.full(size, 7, np.uint8))
    assert detector.predict(path).score == 7


def test_the_neighbours_of_damaged_files_in_a_stream_are_judged(detector, tmp_path):
    damaged, files = DAMAGED | BOMBS | OTHERS, []
    assert len(damaged) > 200
    (tmp_path / "whole.png").write_bytes(WHOLE["grey.png"])
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        files += [tmp_path / name, tmp_path / "whole.png"]
    found = list(detector.predict_many(files, batch_size=4))
    expected = detector.predict(tmp_path / "whole.png").score
    assert [x.score for x in found[1::2]] == [expected] * len(damaged)
    assert sum(isinstance(x, DataError) for x in found[::2]) > 100
