"""What computes a detector's outputs; each runtime is imported only where its files are used.

All take the same pixels and give the same outputs, which `pytorch.VerdictModel` defines: threshold
and calibration scores are inside the graph.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomaly_detection.data.decode import content_hash
from anomaly_detection.errors import UserError, one_line

EXPORT_FORMAT, EXPORT_VERSION = "anomaly_detection.export", 3
DESCRIPTION = "model.json"  # beside the exported models


class DetectorError(UserError):
    """The file is not a detector, or not one that can be used here."""


class Outputs(NamedTuple):
    """What a detector finds on N images.

    Attributes:
        score: float32 (N,), higher for more anomalous images.
        rank: int64 (N,), how many calibration scores are at least as high.
        is_anomalous: bool (N,), whether the score is above the threshold.
        anomaly_map: float32 (N, 1, S, S), or None.
    """

    score: np.ndarray
    rank: np.ndarray
    is_anomalous: np.ndarray
    anomaly_map: np.ndarray | None = None


def split(outputs: Outputs) -> Iterator[Outputs]:
    """The outputs of each image, without their first dimension."""
    maps = repeat(None) if outputs.anomaly_map is None else outputs.anomaly_map
    return map(Outputs, outputs.score, outputs.rank, outputs.is_anomalous, maps)


Runtime = Callable[..., Outputs]  # of the model's inputs, first pixels as preprocessing says


def read_export(path: Path, num_streams: int = 1) -> tuple[dict[str, Any], Runtime]:
    """An exported model's description, and what runs it.

    Args:
        path: An exported model, or its folder, of which the first one is taken.
        num_streams: How many threads will call it at once; the cores are divided among them.

    Raises:
        DetectorError: It is missing, damaged, from a newer version, or its runtime is missing.
    """
    folder = path if path.is_dir() else path.parent
    description = _describe(folder / DESCRIPTION)
    try:
        files = description["files"]
        name = next(iter(files), "") if path.is_dir() else path.name
        if name not in files:
            raise DetectorError(
                f"{path} must be one of the models that {DESCRIPTION} lists, "
                f"{', '.join(files) or 'none'}; export it with `dvc repro` and its name in "
                "export.formats."
            )
        _compare(folder, files[name]["sha256"])
        start = {"onnx": run_onnx, "openvino": run_openvino}[files[name]["runtime"]]
        precision = files[name]["precision"]
    except (AttributeError, KeyError, TypeError) as error:
        raise DetectorError(
            f"{folder / DESCRIPTION} must be whole, but is not ({one_line(error)}); copy the whole "
            "folder again."
        ) from None
    try:
        return description | files[name], start(folder / name, precision, num_streams)
    except ImportError as error:
        raise DetectorError(
            f"{folder / name} needs {error.name}: pip install {error.name}."
        ) from None
    except DetectorError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise DetectorError(
            f"{folder / name} must be a whole model, but cannot be loaded ({one_line(error)})."
        ) from None


def _compare(folder: Path, hashes: dict[str, str]) -> None:
    """Raise unless each file has the content that it had when it was described."""
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file() or content_hash(file.read_bytes()) != expected:
            raise DetectorError(
                f"{file} must be the file that {DESCRIPTION} describes, but is missing or another "
                "one; copy the whole folder again."
            )


def _describe(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DetectorError(
            f"{path} must exist: an exported model is used with the description beside it; copy "
            "the whole folder."
        ) from None
    except (OSError, ValueError) as error:
        raise DetectorError(
            f"{path} must describe an exported detector, but cannot be read ({one_line(error)}); "
            "copy the whole folder again."
        ) from None
    if not isinstance(content, dict) or content.get("format") != EXPORT_FORMAT:
        raise DetectorError(f"{path} must describe an exported detector, but is another file.")
    version = content.get("version")
    if isinstance(version, int) and version > EXPORT_VERSION:
        raise DetectorError(
            f"{path} must be of version {EXPORT_VERSION} or older, got {version}; update "
            "anomaly_detection."
        )
    return content


def run_onnx(path: Path, precision: str = "float32", num_streams: int = 1) -> Runtime:
    """An ONNX model in onnxruntime, on the CPU; several threads may call it at once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if num_streams > 1:
        options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // num_streams)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(*values: np.ndarray) -> Outputs:
        found = session.run(None, dict(zip(inputs, values, strict=True)))
        return Outputs(**dict(zip(outputs, found, strict=True)))

    return run


@cache
def openvino_core() -> Any:
    """OpenVINO's `Core`, one for the whole process.

    Its CPU plugin gives the thread another stack for signal handlers, and frees it with the last
    model. With two of them, the later one can bring back the earlier one's stack after that was
    freed, and the next signal ends the process.
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, before anybody else's
    return core


def run_openvino(path: Path, precision: str = "float32", num_streams: int = 1) -> Runtime:
    """An OpenVINO model on the CPU, in this precision and no other; several threads may call it.

    OpenVINO computes in bfloat16 where the processor has it, unless it is told not to, and then
    gives other verdicts.

    Raises:
        DetectorError: This processor cannot compute in the precision.
    """
    import openvino

    wanted = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[precision]
    hint = {"PERFORMANCE_HINT": "LATENCY"} if num_streams == 1 else {"NUM_STREAMS": num_streams}
    options = {"INFERENCE_PRECISION_HINT": wanted, **hint}
    compiled = openvino_core().compile_model(path, "CPU", options)
    got = compiled.get_property("INFERENCE_PRECISION_HINT")
    if got != wanted:
        raise DetectorError(
            f"{path} must be computed in {precision}, but this processor would use "
            f"{got.get_type_name()}; use another format."
        )
    names = [output.any_name for output in compiled.outputs]
    own = threading.local()

    def run(*values: np.ndarray) -> Outputs:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer(list(values))
        return Outputs(**{name: np.array(found[name]) for name in names})

    return run
