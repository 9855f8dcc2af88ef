import hashlib
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.images import write_category, write_image
from PIL import Image

from anomaly_detection.data import (
    MVTecDataset,
    Sample,
    available_categories,
    get_test_transforms,
    get_train_transforms,
    scan_category,
)
from anomaly_detection.data.mvtec import read_sample
from anomaly_detection.errors import DataError

COLOUR = (200, 100, 50)
SIZE = (5, 4)  # width and height


def palette_image() -> Image.Image:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, *COLOUR])
    return image


def deep(value: int, dtype: str = "uint16") -> Image.Image:
    return Image.fromarray(np.full(SIZE[::-1], value, dtype))


def read(image: Image.Image, path: Path, bit_depth: int = 16, **options) -> dict:
    image.save(path, **options)
    return read_sample(Sample(path, "test", "good"), bit_depth=bit_depth)


def read_mask(mask: Image.Image, folder: Path, size: tuple[int, int] = SIZE) -> dict:
    Image.new("L", size, 9).save(folder / "image.png")
    mask.save(folder / "mask.tif")
    return read_sample(Sample(folder / "image.png", "test", "crack", folder / "mask.tif"))


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("colour.png", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("colour.bmp", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("colour.tif", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("COLOUR.TIFF", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("colour.jpg", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("colour.JPEG", Image.new("RGB", SIZE, COLOUR), COLOUR),
        ("palette.png", palette_image(), COLOUR),
        ("palette.bmp", palette_image(), COLOUR),
        ("opaque.png", Image.new("RGBA", SIZE, (*COLOUR, 255)), COLOUR),
        ("translucent.png", Image.new("RGBA", SIZE, (*COLOUR, 128)), COLOUR),
        ("grey.png", Image.new("L", SIZE, 100), (100,) * 3),
        ("grey.bmp", Image.new("L", SIZE, 100), (100,) * 3),
        ("grey.tif", Image.new("L", SIZE, 100), (100,) * 3),
        ("grey.jpg", Image.new("L", SIZE, 100), (100,) * 3),
        ("grey_alpha.png", Image.new("LA", SIZE, (100, 128)), (100,) * 3),
        ("bit.png", Image.new("1", SIZE, 1), (255,) * 3),
        ("bit.tif", Image.new("1", SIZE, 1), (255,) * 3),
        ("deep.png", deep(0x6464), (100,) * 3),
        ("deep.tif", deep(0x6464), (100,) * 3),
        ("big_endian.tif", deep(0x6464, ">u2"), (100,) * 3),
        ("integer.tif", deep(0x6464, "int32"), (100,) * 3),
    ],
)
def test_every_format_is_read_as_three_channels_of_bytes(tmp_path, name, image, expected):
    item = read(image, tmp_path / name)
    assert item["image"].shape == (3, 4, 5)
    assert item["image"].dtype == torch.uint8
    tolerance = 2 if name.lower().endswith(("jpg", "jpeg")) else 0  # JPEG loses a little
    difference = item["image"].int() - torch.tensor(expected).view(3, 1, 1)
    assert difference.abs().max() <= tolerance


@pytest.mark.parametrize(
    ("bit_depth", "value", "expected"),
    [
        (16, 65535, 255),
        (16, 257, 1),
        (16, 128, 0),  # 0.498
        (16, 129, 1),  # 0.502
        (12, 0, 0),
        (12, 4095, 255),
        (12, 1000, 62),  # 62.27
        (12, 2048, 128),  # 127.53
        (10, 1023, 255),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_values_are_scaled_by_the_bit_depth(tmp_path, suffix, bit_depth, value, expected):
    item = read(deep(value), tmp_path / f"deep.{suffix}", bit_depth)
    assert item["image"].unique().tolist() == [expected]


def test_images_of_eight_bits_do_not_depend_on_the_bit_depth(tmp_path):
    item = read(Image.new("L", SIZE, 100), tmp_path / "grey.png", bit_depth=10)
    assert item["image"].unique().tolist() == [100]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_values_beyond_the_bit_depth_are_refused(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    with pytest.raises(
        DataError, match=r"must be at most 4095 with data.bit_depth 12, got 4096"
    ) as e:
        read(deep(4096), path, bit_depth=12)
    assert str(e.value).startswith(f"{path}: ")


def test_negative_values_are_refused(tmp_path):
    with pytest.raises(DataError, match="must not be negative, got -5"):
        read(deep(-5, "int32"), tmp_path / "integer.tif")


def test_floating_point_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"float.tif: must have 8 or 16 bits, got floating point"):
        read(deep(1, "float32"), tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [[10, 200]]),
        (3, [[200, 10]]),  # turned by half
        (6, [[10], [200]]),  # to be turned clockwise
        (8, [[200], [10]]),  # to be turned anticlockwise
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_cameras_orientation_is_honoured(tmp_path, suffix, orientation, expected):
    image = Image.fromarray(np.array([[10, 200]], np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    item = read(image, tmp_path / f"turned.{suffix}", exif=exif)
    assert item["image"][0].tolist() == expected


def test_mask_is_compared_with_the_image_as_seen(tmp_path):
    image = Image.new("L", (5, 4), 9)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (4, 5), 255).save(tmp_path / "mask.png")
    item = read_sample(Sample(tmp_path / "turned.png", "test", "crack", tmp_path / "mask.png"))
    assert item["image"].shape == (3, 5, 4)
    assert item["mask"].shape == (1, 5, 4)


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
    values = read_mask(mask, tmp_path)["mask"]
    assert values.shape == (1, 4, 5)
    assert values.dtype == torch.uint8
    assert values.unique().tolist() == [1]


def test_black_pixels_are_not_masked(tmp_path):
    half = np.zeros((4, 5), np.uint8)
    half[:2] = 7
    mask = read_mask(Image.fromarray(half), tmp_path)["mask"]
    assert mask[0].tolist() == [[1] * 5, [1] * 5, [0] * 5, [0] * 5]


def test_mask_of_another_size_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"mask.tif: a mask must be as large.* got 4 x 5 pixels"
    ) as e:
        read_mask(Image.new("L", (4, 5), 255), tmp_path)
    assert "image.png of 5 x 4" in str(e.value)


def test_items_are_dicts_of_image_label_mask_and_origin(category):
    dataset = MVTecDataset(category.parent, "widget", "test", get_test_transforms(32))
    items = {item["path"]: item for item in (dataset[i] for i in range(len(dataset)))}
    assert len(items) == len(dataset) == 12
    for path, item in items.items():
        defect_type = Path(path).parent.name
        assert set(item) == {"image", "label", "mask", "defect_type", "path", "sha256"}
        assert (item["image"].shape, item["image"].dtype) == ((3, 32, 32), torch.uint8)
        assert (item["mask"].shape, item["mask"].dtype) == ((1, 32, 32), torch.uint8)
        assert type(item["image"]) is type(item["mask"]) is torch.Tensor
        assert item["defect_type"] == defect_type
        assert item["label"] == (0 if defect_type == "good" else 1)
        assert item["mask"].unique().tolist() == ([0] if defect_type == "good" else [0, 1])
        assert item["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_training_images_are_normal(category):
    dataset = MVTecDataset(category.parent, "widget")
    assert len(dataset) == 24
    assert {dataset[i]["label"] for i in range(24)} == {0}
    assert {dataset[i]["image"].shape for i in range(24)} == {(3, 64, 64)}
    assert [Path(dataset[i]["path"]).name for i in range(24)] == [f"{i:03}.png" for i in range(24)]


@pytest.mark.parametrize("transforms", [get_test_transforms, get_train_transforms])
def test_images_of_mixed_sizes_get_one_size_and_binary_masks(tmp_path, transforms):
    write_category(tmp_path / "widget", size=64)
    for i, (height, width) in enumerate([(40, 90), (33, 33), (100, 20)]):
        mask = np.zeros((height, width), np.uint8)
        mask[::3] = 255
        write_image(tmp_path / f"widget/test/bright/odd{i}.png", mask)
        write_image(tmp_path / f"widget/ground_truth/bright/odd{i}_mask.png", mask)
    dataset = MVTecDataset(tmp_path, "widget", "test", transforms(24))
    for i in range(len(dataset)):
        assert dataset[i]["image"].shape == (3, 24, 24)
        assert dataset[i]["mask"].shape == (1, 24, 24)
        assert set(dataset[i]["mask"].unique().tolist()) <= {0, 1}


def test_shrunken_mask_takes_whole_pixels_and_mixes_none(tmp_path):
    def shrunken(columns: slice) -> torch.Tensor:
        mask = np.zeros((64, 64), np.uint8)
        mask[:, columns] = 255
        sample = Sample(
            write_image(tmp_path / "image.png", mask),
            "test",
            "crack",
            write_image(tmp_path / "mask.png", mask),
        )
        return read_sample(sample, get_test_transforms(32))["mask"]

    # Which column of each pair is taken does not matter; a mean would round both alike.
    even, odd = shrunken(slice(0, None, 2)), shrunken(slice(1, None, 2))
    assert (even + odd).unique().tolist() == [1]


def test_mask_lies_on_its_defect(category):
    dataset = MVTecDataset(category.parent, "widget", "test", get_test_transforms(32))
    for item in (dataset[i] for i in range(len(dataset))):
        if item["defect_type"] == "bright":
            grey = item["image"].float().mean(0)
            assert grey[item["mask"][0] == 1].min() > grey[item["mask"][0] == 0].mean() + 30


def test_flipped_item_is_the_item_flipped(category):
    plain = MVTecDataset(category.parent, "widget", "test", get_test_transforms(32))
    flip = get_train_transforms(32, horizontal_flip=1.0)
    flipped = MVTecDataset(category.parent, "widget", "test", flip)
    for i in range(len(plain)):
        assert torch.equal(flipped[i]["image"], plain[i]["image"].flip(2))
        assert torch.equal(flipped[i]["mask"], plain[i]["mask"].flip(2))


def test_mask_is_unknown_where_a_defect_type_has_none(category):
    for path in (category / "ground_truth/dark").iterdir():
        path.unlink()
    dataset = MVTecDataset(category.parent, "widget", "test", get_test_transforms(32))
    values = {}
    for item in (dataset[i] for i in range(len(dataset))):
        values.setdefault(item["defect_type"], set()).update(item["mask"].unique().tolist())
    assert values == {"bright": {0, 1}, "dark": {255}, "good": {0}}


def test_masks_are_found_with_and_without_their_suffix(category):
    for path in list((category / "ground_truth/dark").iterdir()):
        path.rename(path.with_name(path.name.replace("_mask", "")))
    _, samples, findings = scan_category(category.parent, "widget")
    assert not findings
    found = {s.path.stem: s.mask_path.name for s in samples if s.defect_type == "dark"}
    assert found == {f"{i:03}": f"{i:03}.png" for i in range(4)}


@pytest.mark.parametrize(
    "name", [".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", "THUMBS.DB"]
)
def test_files_of_the_operating_system_are_ignored(category, name):
    before = scan_category(category.parent, "widget")
    for folder in ("train/good", "test/good", "test/dark", "ground_truth/dark", "test", "train"):
        (category / folder / name).write_bytes(b"\0")
    shutil.copytree(category / "test/good", category / "test/.ipynb_checkpoints")
    assert scan_category(category.parent, "widget") == before
    assert not before[2]


def test_images_are_known_by_their_suffix_in_any_case(tmp_path):
    write_category(tmp_path / "widget", num_train=0, num_test=1)
    suffixes = ["png", "jpg", "jpeg", "bmp", "tif", "tiff"]
    for suffix in [*suffixes, *map(str.upper, suffixes)]:
        grey = np.full((8, 8), 9, np.uint8)
        write_image(tmp_path / f"widget/train/good/{suffix}.{suffix}", grey)
    assert len(MVTecDataset(tmp_path, "widget")) == 12


def test_all_faults_of_a_layout_are_listed(category):
    (category / "test/good/notes.txt").write_text("x")
    (category / "train/bad").mkdir()
    with pytest.raises(DataError) as error:
        MVTecDataset(category.parent, "widget")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert any("training is on normal images only; move it to test" in line for line in lines)
    assert any(f"{category / 'test/good/notes.txt'}: must be one of .png" in line for line in lines)


def test_unknown_split_is_refused(category):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'fit'"):
        MVTecDataset(category.parent, "widget", "fit")


def test_categories_are_the_folders_with_normal_training_images(tmp_path):
    for name in ("b/train/good", "a/train/good", "c/test/good", "d/train/bad"):
        (tmp_path / name).mkdir(parents=True)
    assert available_categories(tmp_path) == ["a", "b"]


def test_colours_that_would_be_cut_to_8_bits_are_refused(tmp_path):
    path = tmp_path / "deep.png"
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + b"\xff\xff" * 6 for _ in range(2)))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checksum
    path.write_bytes(content)
    sample = Sample(path, "train", "good")
    for bit_depth in (12, 16):
        with pytest.raises(DataError, match=r"deep.png: colours of 16 bits must be in a TIFF"):
            read_sample(sample, bit_depth=bit_depth)


def test_two_masks_of_one_image_are_refused(category):
    folder = category / "ground_truth" / "dark"
    (folder / "000.png").write_bytes((folder / "000_mask.png").read_bytes())
    *_, findings = scan_category(category.parent, category.name)
    assert findings == [f"{folder / '000_mask.png'}: a second mask beside 000.png; remove one."]
