"""Write the built-in images: packages -> data/elpv, and data/photographs, of anything else.

If data.root is another folder, data/elpv holds a note that says so.
"""

from pathlib import Path

from anomaly_detection.config import load_config
from anomaly_detection.data import elpv
from anomaly_detection.data.auxiliary import write_photographs
from anomaly_detection.files import write_text
from stages import run


def main() -> None:
    """Write the photographs, and the data set if data.root asks for it."""
    write_photographs(Path(elpv.PHOTOGRAPHS))
    if Path(load_config().data.root) == Path(elpv.ROOT):
        elpv.write_elpv(Path(elpv.ROOT))
    else:
        write_text(Path(elpv.ROOT) / "note.txt", "data.root is another folder.\n")


if __name__ == "__main__":
    run(main, note_cost=True)
