"""DVC that ends with the holder of the lease, and then starts no further stage.

python -m tools.cluster.leased_dvc ARGUMENT...
"""

import sys

from dvc.cli import main

from stages import run


def dvc(*arguments: str) -> None:
    """Run DVC; exits with its status."""
    sys.exit(main(list(arguments)))


if __name__ == "__main__":
    run(dvc)
