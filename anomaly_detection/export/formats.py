"""Write a detector for onnxruntime and OpenVINO: models, and a description that they share.

The models take pixels of the trained size, which Pillow has resized outside: a resize in the
graph rounds in other ways, and changes scores a thousand times as much as everything else.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomaly_detection.data.decode import content_hash
from anomaly_detection.data.frame import Frame
from anomaly_detection.errors import UserError
from anomaly_detection.inference.pytorch import VerdictModel, read_detector, verdict_model
from anomaly_detection.inference.runtimes import (
    DESCRIPTION,
    EXPORT_FORMAT,
    EXPORT_VERSION,
    openvino_core,
)

OPSET = 20
CHANNELS = {3: "RGB, grey images three times", 4: "as in the file, without alpha"}
JUDGED_PART = "; {} where preprocessing.mask is not 0 and in the picture itself, else 0"
TILES = (
    "squares of preprocessing.tile_size pixels: as few, evenly spaced from border to border, as "
    "share preprocessing.tile_overlap, numbered along the rows; a picture has the verdict of the "
    "tile with the highest score"
)
SHARED = (
    "threshold",
    "calibration_scores",
    "preprocessing",
    "fit_statistics",
    "example",
    "parameters",
    "provenance",
)
SUBSET = 300  # fit images or tiles, at most, by which the ranges of int8 are chosen


class Format(NamedTuple):
    """What a file of an export is.

    Attributes:
        file: Its name.
        runtime: What runs it, in `inference.runtimes`.
        precision: What that computes in.
        is_exact: Whether it computes what PyTorch does, up to float32's rounding.
        resizes_itself: Whether it takes pixels of any size.
        takes_16_bits: Whether it takes them, and keeps them.
    """

    file: str
    runtime: str
    precision: str = "float32"
    is_exact: bool = True
    resizes_itself: bool = False
    takes_16_bits: bool = True


FORMATS = {
    "onnx": Format("model.onnx", "onnx"),
    "openvino": Format("model.xml", "openvino"),
    "openvino_bfloat16": Format("model_bfloat16.xml", "openvino", "bfloat16", is_exact=False),
    "openvino_int8": Format("model_int8.xml", "openvino", is_exact=False, takes_16_bits=False),
    "openvino_resize": Format(
        "model_resize.xml", "openvino", is_exact=False, resizes_itself=True, takes_16_bits=False
    ),
}


def export_detector(
    detector: Path, names: Sequence[str], folder: Path, pictures: np.ndarray
) -> None:
    """Write a folder with a model in each format, and `model.json`; the same bytes every time.

    Args:
        detector: A file that `save_detector` wrote.
        names: Of `FORMATS`.
        folder: What it held before is deleted.
        pictures: (N, C, S, S), normal ones that the model was fitted to; for int8.

    Raises:
        UserError: The detector cannot be read, does not compute in float32, takes 16 bits and a
            format does not, or a package is missing.
    """
    content = read_detector(detector)
    if names and content["precision"] != "float32":
        raise UserError(
            "evaluation.precision must be float32 to export, which is what exports compute in, got "
            f"{content['precision']}; or let export.formats be []."
        )
    dtype = _input(content)[0].format.dtype
    if dtype != "uint8" and (own := [x for x in names if not FORMATS[x].takes_16_bits]):
        raise UserError(
            f"export.formats must be without {' and '.join(own)} for a detector of 16 bits, since "
            "OpenVINO has that for 8 bits alone; leave it out."
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if names:
            write_models(verdict_model(content), names, _example(content), partial, pictures)
        md5 = hashlib.md5(detector.read_bytes(), usedforsecurity=False).hexdigest()
        description = described(content, names, partial) | {"detector_md5": md5}
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
        (partial / DESCRIPTION).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except ImportError as error:
        raise UserError(
            f"export.formats {list(names)} needs {error.name}: pip install {error.name}."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def described(content: dict[str, Any], names: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `model.json` says: all but the weights of a detector, and the models' contract."""
    frame, size = _input(content)
    channels, dtype = frame.format
    judged_part = "" if frame.judges_all else JUDGED_PART.format(frame.format.full_scale)
    files = {}
    for own in (FORMATS[name] for name in names):
        parts = [own.file] if own.runtime == "onnx" else [own.file, own.file[:-3] + "bin"]
        files[own.file] = {
            "runtime": own.runtime,
            "precision": own.precision,
            "resizes_itself": own.resizes_itself,
            "is_exact": own.is_exact,
            "bytes": sum((folder / part).stat().st_size for part in parts),
            "sha256": {part: content_hash((folder / part).read_bytes()) for part in parts},
        }
    return {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "model": content["model"]["name"],
        "input": {
            "name": "image",
            "dtype": dtype,
            "shape": ["batch", frame.num_channels, size, size],
            "channels": CHANNELS[channels] + judged_part,
            "resize": "Pillow, bilinear, to a square; first of all, cut as preprocessing says",
            "tiles": TILES if frame.tile_size else None,
        },
        "further_inputs": {"position": "int64 (batch,): a tile's number"} if frame.size else {},
        "outputs": {
            "score": "float32 (batch,)",
            "rank": "int64 (batch,): calibration scores that are at least as high",
            "is_anomalous": "bool (batch,): whether the score is above the threshold",
            "anomaly_map": f"float32 (batch, 1, {size}, {size}), of models that have maps",
        },
        "p_value": "(1 + rank) / (1 + number of calibration scores)",
        **{key: content[key] for key in SHARED if key in content},
        "files": files,
    }


def _input(content: dict[str, Any]) -> tuple[Frame, int]:
    """How pictures become what a detector's model takes."""
    preprocessing = content["preprocessing"]
    return Frame.from_options(preprocessing), preprocessing["image_size"]


def _example(content: dict[str, Any]) -> tuple[Tensor, ...]:
    """A detector's inputs of two pictures: of one, the exporter would fix the number."""
    frame, size = _input(content)
    dtype = getattr(torch, frame.format.dtype)
    pictures = torch.zeros(2, frame.num_channels, size, size, dtype=dtype)
    return (pictures, torch.tensor([0, 1])) if frame.size else (pictures,)


def write_models(
    model: VerdictModel,
    names: Sequence[str],
    example: tuple[Tensor, ...],
    folder: Path,
    pictures: np.ndarray,
) -> None:
    """Write each format's files; OpenVINO's are made of ONNX's."""
    path = folder / FORMATS["onnx"].file
    write_onnx(model, example, path)
    write: dict[str, Callable[[Any], Any]] = {
        "openvino": lambda graph: graph,
        "openvino_bfloat16": lambda graph: graph,
        "openvino_int8": lambda graph: quantised(graph, pictures),
        "openvino_resize": with_resize,
    }
    for name in names:
        if name in write:
            import openvino

            graph = write[name](openvino_core().read_model(path))
            for i, node in enumerate(graph.get_ordered_ops()):  # by default, a process counts them
                node.set_friendly_name(f"{node.get_type_name()}_{i}")
            openvino.save_model(graph, folder / FORMATS[name].file, compress_to_fp16=False)
    if "onnx" not in names:
        path.unlink()


def write_onnx(model: VerdictModel, example: tuple[Tensor, ...], path: Path) -> None:
    """Write one file, for any number of images at a time like the example's two or more."""
    import onnx
    import onnxscript  # noqa: F401  # PyTorch's exporter needs it, and says so less clearly

    batch = {0: torch.export.Dim("batch")}
    with torch.inference_mode(), quiet():
        outputs = list(model(*example))
        program: Any = torch.onnx.export(
            model,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(model.inputs),
            output_names=outputs,
            dynamic_shapes=(batch, (batch,))[: len(example)],
            external_data=False,
            verbose=False,
        )
    onnx.save(without_notes(program.model_proto), path)


def without_notes(content: Any) -> Any:
    """The model without the exporter's notes, which name local files and differ each time."""
    for part in (content, content.graph, *content.graph.node, *content.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for value in (*content.graph.value_info, *content.graph.input, *content.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    return content


def quantised(graph: Any, pictures: np.ndarray) -> Any:
    """The OpenVINO model with convolutions in int8; distances stay in float32."""
    os.environ.setdefault("NNCF_CI", "1")  # otherwise it reports its use to its makers
    import nncf

    # Any position will do: what differs between them is not quantised.
    further = {} if len(graph.inputs) == 1 else {"position": np.zeros(1, np.int64)}
    with quiet():
        return nncf.quantize(
            graph,
            nncf.Dataset([{"image": picture[None], **further} for picture in pictures[:SUBSET]]),
            subset_size=min(SUBSET, len(pictures)),
            ignored_scope=nncf.IgnoredScope(types=["MatMul"], validate=False),
        )


def with_resize(graph: Any) -> Any:
    """The OpenVINO model with OpenVINO's version of Pillow's resize, for one image of any size."""
    from openvino import Layout, Type
    from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

    graph.reshape({x.any_name: [1, *x.partial_shape[1:]] for x in graph.inputs})
    steps = PrePostProcessor(graph)
    own = steps.input("image")
    own.tensor().set_element_type(Type.u8).set_layout(Layout("NCHW")).set_spatial_dynamic_shape()
    own.model().set_layout(Layout("NCHW"))
    own.preprocess().resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)  # of uint8: the same integers
    return steps.build()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print and warn of, which is no concern of the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
