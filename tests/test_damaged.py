"""Damaged and malicious files: each is one clear line, and nothing else happens."""

import io
import json
import pickle
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_detection import Detector
from anomaly_detection.data.decode import MAX_PIXELS, content_hash, decode_image, decode_mask
from anomaly_detection.errors import DataError
from anomaly_detection.inference import DetectorError
from anomaly_detection.inference.runtimes import Outputs

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's and PyTorch's, of damaged files

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 2**16, (40, 50), dtype=np.uint16)


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


WHOLE = {
    "grey.png": encoded(GREY, "PNG"),
    "colour.png": encoded(COLOUR, "PNG"),
    "deep.png": encoded(DEEP, "PNG"),
    "colour.jpg": encoded(COLOUR, "JPEG"),
    "progressive.jpg": encoded(COLOUR, "JPEG", progressive=True),
    "colour.bmp": encoded(COLOUR, "BMP"),
    "deep.tif": encoded(DEEP, "TIFF"),
    "lzw.tif": encoded(COLOUR, "TIFF", compression="tiff_lzw"),
    "deflate.tif": encoded(COLOUR, "TIFF", compression="tiff_deflate"),
}
SIDE = 60_000


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) * 9 // 10)]


def with_bits_flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice([1, 3, 30])):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def with_a_part_overwritten(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    length = chance.randrange(1, 200)
    noise = chance.choice([b"\0" * length, b"\xff" * length, chance.randbytes(length)])
    return content[:start] + noise + content[start + length :]


def cases() -> dict[str, bytes]:
    chance, found = random.Random(0), {}
    for damage in (truncated, with_bits_flipped, with_a_part_overwritten):
        for name, content in WHOLE.items():
            for i in range(8):
                found[f"{damage.__name__}_{i}_{name}"] = damage(content, chance)
    return found


DAMAGED = cases()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def patched(content: bytes, old: tuple[int, ...], new: tuple[int, ...], form: str) -> bytes:
    """The first place that has these numbers gets others."""
    assert struct.pack(form, *old) in content
    return content.replace(struct.pack(form, *old), struct.pack(form, *new), 1)


def tiff_of(width: int, height: int) -> bytes:
    sizes = {256: (50, width), 257: (40, height)}
    content = encoded(GREY, "TIFF")
    for tag, (old, new) in sizes.items():
        for kind, form in ((3, "<HHIHH"), (4, "<HHII")):
            last = (old, 0) if kind == 3 else (old,)
            if struct.pack(form, tag, kind, 1, *last) in content:
                entry = struct.pack(form, tag, kind, 1, *last)
                content = content.replace(entry, struct.pack("<HHII", tag, 4, 1, new))
    return content


BOMBS = {
    "a.png": png_header(SIDE, SIDE),
    "just_above.png": png_header(10_001, 10_000),
    "a.bmp": patched(WHOLE["colour.bmp"], (50, 40), (SIDE, SIDE), "<ii"),
    "a.jpg": patched(WHOLE["colour.jpg"], (40, 50), (SIDE, SIDE), ">HH"),
    "a.tif": tiff_of(SIDE, SIDE),
}
OTHERS = {
    "empty.png": b"",
    "zeros.png": bytes(1000),
    "text.jpg": b"This is no picture.\n" * 10,
    "a.gif": encoded(GREY, "GIF"),
    "webp.png": encoded(COLOUR, "WEBP"),
    "pdf.tif": b"%PDF-1.4\n" + bytes(100),
    "archive.bmp": b"PK\x03\x04" + bytes(100),
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def test_there_are_over_200_of_them():
    assert len(DAMAGED) + len(BOMBS) + len(OTHERS) > 200


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


@pytest.mark.parametrize("name", WHOLE)
def test_a_wrong_ending_does_not_matter(name, tmp_path):
    decode_image(WHOLE[name], "a.jpg")


@pytest.mark.parametrize("name", BOMBS)
def test_a_size_beyond_the_limit_is_refused_before_decoding(name):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}: must have at most {MAX_PIXELS:,} pixels"):
            decode_image(BOMBS[name], name)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_tiny_and_long_images_are_judged(size, tmp_path):
    Image.fromarray(np.full(size, 7, np.uint8)).save(tmp_path / "a.png")
    assert judge()(tmp_path / "a.png").score == 7


def test_a_phones_jpeg_of_several_pictures_is_read():
    file = io.BytesIO()
    first, second = (Image.fromarray(x) for x in (COLOUR, COLOUR[::-1]))
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert decode_image(file.getvalue(), "phone.jpg").shape == COLOUR.shape


def judge():
    content = {"threshold": 0.5, "calibration_scores": [0.1], "parameters": {}, "provenance": {}}
    detector = Detector(
        content | {"preprocessing": {"image_size": 8, "bit_depth": 16}},
        lambda x: Outputs(x.mean(axis=(1, 2, 3)), np.zeros(len(x)), np.zeros(len(x))),
    )
    return detector.predict


def test_their_neighbours_in_a_stream_are_judged(tmp_path):
    files = []
    for name, content in (DAMAGED | BOMBS | OTHERS).items():
        for own, bytes_ in ((name, content), (f"{name}.whole", WHOLE["grey.png"])):
            (tmp_path / own).write_bytes(bytes_)
            files.append(tmp_path / own)
    predict = judge()
    found = list(predict.__self__.predict_many(files, batch_size=4))
    expected = predict(files[1]).score
    assert [x.score for x in found[1::2]] == [expected] * (len(files) // 2)
    assert sum(isinstance(x, DataError) for x in found[::2]) > 100


# Detectors and exports.


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_detector_that_would_run_code_is_refused_and_runs_none(tmp_path, form):
    file, witness = tmp_path / "evil.pt", tmp_path / "witness"
    content = {"format": "anomaly_detection.detector", "model": Malicious(witness)}
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(DetectorError, match="must be a detector, but cannot be loaded") as error:
        Detector.load(file)
    assert "\n" not in str(error.value)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Malicious(witness)))
    assert witness.exists()  # it would have


@pytest.fixture
def folder(tmp_path) -> Path:
    """An export of a model that is cut in two, with a right hash."""
    from onnx import TensorProto, helper

    values = [
        helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n"]) for x in ("image", "score")
    ]
    node = helper.make_node("Relu", ["image"], ["score"])
    whole = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    content = whole.SerializeToString()
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    describe(folder)
    return folder


def describe(folder: Path, **changes) -> None:
    file = {
        "runtime": "onnx",
        "precision": "float32",
        "sha256": {"model.onnx": content_hash((folder / "model.onnx").read_bytes())},
    }
    content = {
        "format": "anomaly_detection.export",
        "version": 1,
        "threshold": 0.5,
        "calibration_scores": [0.1],
        "preprocessing": {"image_size": 8, "bit_depth": 16},
        "parameters": {},
        "provenance": {},
        "files": {"model.onnx": file},
    }
    (folder / "model.json").write_text(json.dumps(content | changes))


def cut(folder: Path) -> None:
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text[:100])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: None, "must be a whole model, but cannot be loaded"),
        (cut, "must describe an exported detector, but cannot be read"),
        (lambda folder: (folder / "model.json").unlink(), "must exist: .* copy the whole folder"),
        (lambda folder: (folder / "model.json").write_text("[]"), "but is another file"),
        (lambda folder: describe(folder, format="other"), "but is another file"),
        (lambda folder: describe(folder, version=99), "must be of version 3 or older, got 99"),
        (lambda folder: describe(folder, files={}), "must be one of the models .* none"),
        (lambda folder: describe(folder, files=None), "must be whole, but is not"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "is missing or another one"),
        (lambda folder: (folder / "model.onnx").unlink(), "is missing or another one"),
    ],
)
def test_a_damaged_export_is_one_clear_line(folder, damage, text):
    damage(folder)
    for path in (folder, folder / "model.onnx"):
        with pytest.raises(DetectorError, match=text) as error:
            Detector.load(path)
        assert "\n" not in str(error.value)
