"""Print what a node computes with, as JSON: `python -m tools.cluster.node`."""

import json

from anomaly_detection.trainer import choose_device, choose_dtype, describe_hardware


def main() -> None:
    """Print the processor and the precision that `auto` means there."""
    device = choose_device("auto")
    precision = str(choose_dtype("auto", device)).removeprefix("torch.")
    print(json.dumps({"hardware": describe_hardware(device), "precision": precision}))


if __name__ == "__main__":
    main()
