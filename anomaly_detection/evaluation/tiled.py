"""From what a model finds on tiles to what it finds on whole images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from anomaly_detection.data.loader import create_dataloader
from anomaly_detection.data.prepared import PreparedDataset
from anomaly_detection.data.tiles import Blend
from anomaly_detection.evaluation.synthetic import Case
from anomaly_detection.evaluator import Batch, Outputs, predict, predict_scores


def predict_images(
    model: nn.Module, images: PreparedDataset, batch_size: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[Batch, Outputs]]:
    """Batches of whole images, tiled or not, with the model's outputs.

    A tiled image comes alone, at the scale of its tiles, and with `tile_scores`. Its score is the
    highest of these, and its map is theirs, blended where they overlap.

    Args:
        model: As in `evaluate`.
        images: Some splits.
        batch_size: Tiles at a time.
        device: Where the model runs.
    """
    found = predict(model, create_dataloader(images, batch_size), device)
    return joined(found, images) if images.is_tiled else found


def joined(
    found: Iterable[tuple[Batch, Outputs]], images: PreparedDataset
) -> Iterator[tuple[Batch, Outputs]]:
    """Each whole image with its outputs, from those of all tiles in their order."""
    tiles = (of_tile for _, outputs in found for of_tile in _one_by_one(outputs))
    for image in range(len(images.rows)):
        numbers, scores, blend = images.numbers[images.tiles_of(image)], [], None
        for number, of_tile in zip(numbers, islice(tiles, len(numbers)), strict=True):
            scores.append(of_tile["pred_score"])
            if "anomaly_map" in of_tile:
                blend = blend or Blend(images.grid(image))
                blend.add(number, of_tile["anomaly_map"][0].numpy())
        tile_scores = torch.stack(scores)
        outputs = {"pred_score": tile_scores.amax()[None], "tile_scores": tile_scores}
        if blend:
            outputs["anomaly_map"] = torch.from_numpy(blend.whole)[None, None]
        yield images.whole(image), outputs


def scores_by_tile(
    model: nn.Module, images: PreparedDataset, batch_size: int, device: str | torch.device = "cpu"
) -> list[np.ndarray]:
    """For each image, the scores of its tiles, as in `predict_images`; the highest is its own."""
    scores = predict_scores(model, create_dataloader(images, batch_size), device)
    return [scores[images.tiles_of(image)] for image in range(len(images.rows))]


def tile_scores_of(outputs: Outputs) -> list[np.ndarray]:
    """For each image of a batch, the scores of its tiles; of one that is not tiled, its own."""
    if "tile_scores" in outputs:
        return [outputs["tile_scores"].numpy()]
    return list(outputs["pred_score"].numpy()[:, None])


class OneTile(NamedTuple):
    """A tile of each of N images, on which a defect can be put.

    Attributes:
        pixels: As in images.npy, (N, C, S, S).
        channels: As in `PreparedArrays`.
        others: The highest score of each image's other tiles; -inf where there are none.
        positions: The tile's number in each image.
    """

    pixels: np.ndarray
    channels: int
    others: list[float]
    positions: list[int]

    def cases(self, defects: Callable[[np.ndarray, int], list[Case]]) -> list[Case]:
        """Cases of `every_defect` or `one_defect_each`, which go through the images in turn."""
        of_images = cycle(zip(self.others, self.positions, strict=True))
        return [
            case._replace(others=others, position=position)
            for case, (others, position) in zip(
                defects(self.pixels, self.channels), of_images, strict=False
            )
        ]


def one_tile_each(
    images: PreparedDataset, chosen: Sequence[int], tile_scores: Sequence[np.ndarray], seed: int
) -> OneTile:
    """A tile of each chosen image, drawn with `seed`.

    Args:
        images: Some splits.
        chosen: Indices of images.
        tile_scores: The scores of the tiles of all these splits' images.
        seed: Any.
    """
    rng = np.random.default_rng(seed)
    tiles, others = [], []
    for image in chosen:
        place = int(rng.integers(len(tile_scores[image])))
        tiles.append(images.tiles_of(image).start + place)
        others.append(float(np.delete(tile_scores[image], place).max(initial=-np.inf)))
    return OneTile(images.read(tiles), images.channels, others, images.numbers[tiles].tolist())


def with_others(found: Iterable[tuple[Batch, Outputs]]) -> Iterator[tuple[Batch, Outputs]]:
    """Batches of tiles, with the scores of their images: the highest of the tile's and `others`."""
    for batch, outputs in found:
        others = torch.as_tensor(batch["others"], dtype=torch.float32)
        yield batch, outputs | {"pred_score": outputs["pred_score"].maximum(others)}


def _one_by_one(outputs: Outputs) -> Iterator[Outputs]:
    for i in range(len(outputs["pred_score"])):
        yield {name: values[i] for name, values in outputs.items()}
