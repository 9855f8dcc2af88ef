"""From prepared arrays, or from files, to batches: data sets, transforms, loaders."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.detectors import seen_by_the_model
from builders.images import prepare, random_pixels, write_category, write_image
from PIL import Image
from torchvision import tv_tensors

from anomaly_detection.data import (
    MVTecDataset,
    PreparedDataset,
    create_dataloader,
    get_test_transforms,
    get_train_transforms,
)
from anomaly_detection.data.decode import resize_image
from anomaly_detection.data.transforms import Resize
from anomaly_detection.errors import DataError
from anomaly_detection.features.images import as_floats

SPLITS = ("fit", "validation", "calibration", "test")


def items_of(dataset) -> list[dict]:
    return [dataset[i] for i in range(len(dataset))]


def assert_same_items(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(np.asarray(other[key]), value, key, strict=True)


@pytest.fixture(scope="module")
def widget(tmp_path_factory) -> SimpleNamespace:
    """A category's prepared folder, and its test images as a data set from there and from files."""
    root = tmp_path_factory.mktemp("data")
    write_category(root / "widget")
    write_image(root / "widget/test/good/grey.png", random_pixels(64, 64))
    prepared = prepare(root, image_size=32)
    files = MVTecDataset(root, "widget", "test", Resize(32))
    return SimpleNamespace(prepared=prepared, files=files, arrays=PreparedDataset(prepared, "test"))


def test_prepared_items_equal_those_read_from_the_files(category):
    write_image(category / "train/good/grey.png", random_pixels(64, 64))
    write_image(category / "train/good/deep.png", random_pixels(64, 64, dtype="uint16"))
    write_image(category / "test/scratch/wide.jpg", random_pixels(20, 64, 3))
    output = prepare(category.parent, image_size=32)
    prepared = {item["path"]: item for split in SPLITS for item in PreparedDataset(output, split)}
    assert len(prepared) == 24 + 2 + 12 + 1
    for split in ("train", "test"):
        files = MVTecDataset(category.parent, "widget", split, Resize(32))
        for item in items_of(files):
            item["path"] = Path(item["path"]).relative_to(category).as_posix()
            other = prepared.pop(item["path"])
            del other["position"]
            assert_same_items(item, other)
    assert not prepared


FILES = {
    "colour.png": "RGB",
    "turned.jpg": "RGB",
    "grey.bmp": "L",
    "alpha.png": "RGBA",
    "palette.png": "P",
    "bits.tif": "1",
    "deep.png": "I;16",
}


def test_pipeline_detector_and_data_set_see_the_same_pixels_of_a_file(tmp_path):
    for i in range(4):
        write_image(tmp_path / "part/train/good" / f"{i}.png", np.full((8, 8), i, np.uint8))
    colours = Image.fromarray(random_pixels(50, 70, 4))
    turn = Image.Exif()
    turn[0x0112] = 6  # by 90 degrees
    for name, mode in FILES.items():
        path = tmp_path / "part/test/bad" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            image = Image.fromarray(random_pixels(50, 70, dtype="uint16") >> 4)
        else:
            image = colours if mode == "RGBA" else colours.convert("RGB").convert(mode)
        image.save(path, **{"exif": turn} if name == "turned.jpg" else {})
    options = {"bit_depth": 12, "validation_fraction": 0.25, "calibration_fraction": 0.25}
    arrays = PreparedDataset(prepare(tmp_path, "part", image_size=32, **options), "test")
    anomalous = {Path(item["path"]).name: item["image"] for item in arrays if item["label"]}
    read = MVTecDataset(tmp_path, "part", "test", Resize(32), bit_depth=12)
    assert sorted(anomalous) == sorted(FILES)
    for item in items_of(read):
        pixels = anomalous[Path(item["path"]).name]
        assert pixels.shape == (3, 32, 32)
        assert pixels.float().std() > 5
        assert torch.equal(item["image"], pixels)
        seen = seen_by_the_model(arrays.preprocessing(bit_depth=12), Path(item["path"]))
        assert np.array_equal(seen, pixels)


def test_batches_are_made_on_the_device(widget):
    there = PreparedDataset(widget.prepared, "test", "meta").__getitems__([0, 1, 2])
    here = widget.arrays.__getitems__([0, 1, 2])
    for key, shape in {"image": (3, 3, 32, 32), "label": (3,), "mask": (3, 1, 32, 32)}.items():
        assert (tuple(there[key].shape), there[key].device.type) == (shape, "meta")
        assert there[key].dtype == here[key].dtype
    assert there["path"] == here["path"]


def test_batches_can_be_written_to_without_changing_the_arrays(widget):
    files = sorted(widget.prepared.rglob("*.*"))
    before = [path.read_bytes() for path in files]
    item = widget.arrays[0]
    item["image"].zero_()
    item["mask"].fill_(9)
    assert widget.arrays[0]["image"].any()
    assert [path.read_bytes() for path in files] == before


def test_pictures_are_the_images_of_the_split_in_order(widget):
    for split in SPLITS:
        dataset = PreparedDataset(widget.prepared, split)
        assert dataset.image_size == 32
        expected = np.stack([item["image"].numpy() for item in dataset])
        assert np.array_equal(dataset.pictures(), expected)
        assert np.array_equal(dataset.tiles(), expected)


# Transforms.

IMAGE = tv_tensors.Image(torch.tensor([[[10, 20], [30, 40]]], dtype=torch.uint8))
MASK = tv_tensors.Mask(torch.tensor([[[0, 1], [0, 0]]], dtype=torch.uint8))
FLIPPED = {
    (0, 0): ([[10, 20], [30, 40]], [[0, 1], [0, 0]]),
    (1, 0): ([[20, 10], [40, 30]], [[1, 0], [0, 0]]),
    (0, 1): ([[30, 40], [10, 20]], [[0, 0], [0, 1]]),
    (1, 1): ([[40, 30], [20, 10]], [[0, 0], [1, 0]]),
}


def in_bytes(image, mask):
    """The image before it was normalised, and the mask."""
    return (255 * as_floats(image[None], len(image))[0]).round().byte(), mask


@pytest.mark.parametrize(("horizontal", "vertical"), FLIPPED)
def test_flips_turn_image_and_mask_together(horizontal, vertical):
    flipped = in_bytes(*get_train_transforms(2, horizontal, vertical)(IMAGE, MASK))
    assert tuple(planes[0].tolist() for planes in flipped) == FLIPPED[horizontal, vertical]


def test_flips_of_half_probability_never_part_image_and_mask():
    torch.manual_seed(0)
    flip = get_train_transforms(2, horizontal_flip=0.5, vertical_flip=0.5)
    brightest = set()
    for _ in range(40):
        image, mask = in_bytes(*flip(tv_tensors.Image(MASK * 200), MASK))
        assert torch.equal(image[:1], mask * 200)
        brightest.add(int(mask.flatten().argmax()))
    assert brightest == {0, 1, 2, 3}


@pytest.mark.parametrize(("height", "width"), [(50, 70), (20, 20), (32, 48)])
def test_training_resizes_and_normalises_as_testing_does(height, width):
    image = tv_tensors.Image(torch.from_numpy(random_pixels(3, height, width)))
    mask = tv_tensors.Mask(torch.from_numpy(random_pixels(1, height, width) % 2))
    tested, trained = (get(32)(image, mask) for get in (get_test_transforms, get_train_transforms))
    assert [x.shape for x in tested] == [(3, 32, 32), (1, 32, 32)]
    assert [x.dtype for x in tested] == [torch.float32, torch.uint8]
    assert torch.equal(in_bytes(*tested)[0], Resize(32)(image))
    assert tested[1].unique().tolist() == [0, 1]
    assert all(torch.equal(one, other) for one, other in zip(tested, trained, strict=True))


def test_shrinking_averages_images_and_picks_from_masks():
    stripes = torch.tensor([0, 200], dtype=torch.uint8).repeat(24).expand(1, 48, 48)
    image, mask = Resize(16)(tv_tensors.Image(stripes), tv_tensors.Mask(stripes))
    # A triangle over 3 pixels each way weighs one colour 5 / 9; without it, stripes remain.
    assert (image[:, :, 1:-1].float() - 100).abs().max() <= 12
    assert set(mask.unique().tolist()) <= {0, 200}


@pytest.mark.parametrize("shape", [(50, 70, 3), (20, 20, 3), (61, 32), (32, 32), (1, 5)])
def test_resized_pixels_are_pillows_bilinear_ones(shape):
    pixels = random_pixels(*shape)
    expected = Image.fromarray(pixels).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    resized = resize_image(pixels, 32)
    assert (resized.dtype, resized.shape) == (np.uint8, (3, 32, 32))
    np.testing.assert_array_equal(np.moveaxis(resized, 0, -1), np.asarray(expected))


# Loaders.


def order(epoch: int = 0, **options) -> list[int]:
    """Ten numbers as a shuffling loader gives them."""
    loader = create_dataloader(range(10), batch_size=4, shuffle=True, **options)
    loader.sampler.set_epoch(epoch)
    return torch.cat(list(loader)).tolist()


def shares(monkeypatch, num_processes: int, **options) -> list[list[list[int]]]:
    """The batches of ten numbers that each process gets."""
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    found = []
    for rank in range(num_processes):
        monkeypatch.setenv("RANK", str(rank))
        loader = create_dataloader(range(10), batch_size=4, **options)
        found.append([batch.tolist() for batch in loader])
    return found


def test_shuffled_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(0)
    first = order()
    assert sorted(first) == list(range(10)) != first
    torch.manual_seed(1)  # the global state must not matter
    assert order() == first
    assert len(set(map(tuple, (first, order(epoch=1), order(seed=1))))) == 3
    through = create_dataloader(range(10), batch_size=4, shuffle=True)
    for epoch in range(4):
        through.sampler.set_epoch(epoch)
        numbers = torch.cat(list(through)).tolist()
    assert order(epoch=3) == numbers  # also where a loader starts late


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_each_batch_of_one_process(monkeypatch, shuffle):
    (whole,) = shares(monkeypatch, 1, shuffle=shuffle)
    if not shuffle:
        assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    one, other = shares(monkeypatch, 2, shuffle=shuffle)
    assert [len(batch) for batch in one] == [2, 2, 1]
    joined = [sorted(left + right) for left, right in zip(one, other, strict=True)]
    assert joined == [sorted(batch) for batch in whole]


def test_in_order_every_image_comes_once_among_processes_that_can_share_a_batch(monkeypatch):
    numbers = [x for batches in shares(monkeypatch, 4) for batch in batches for x in batch]
    assert sorted(numbers) == list(range(10))
    with pytest.raises(DataError, match="must be a multiple of the 3 processes, got 4"):
        shares(monkeypatch, 3)


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_batches_hold_their_items_stacked(widget, kind):
    dataset = getattr(widget, kind)
    items = {item["path"]: item for item in items_of(dataset)}
    for batch in create_dataloader(dataset, 4, shuffle=True):
        assert batch["image"].shape == (len(batch["path"]), 3, 32, 32)
        assert batch["mask"].shape == (len(batch["path"]), 1, 32, 32)
        for i, path in enumerate(batch["path"]):
            assert_same_items(items.pop(path), {key: batch[key][i] for key in batch})
    assert not items


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_batches_do_not_depend_on_workers(widget, kind):
    alone, helped = (
        create_dataloader(getattr(widget, kind), 4, shuffle=True, seed=1, num_workers=number)
        for number in (0, 2)
    )
    for epoch in (0, 1):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        for one, other in zip(alone, helped, strict=True):
            assert_same_items(one, other)
