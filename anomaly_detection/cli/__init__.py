"""The command `anomaly-detection`: a module for each subcommand, with its options and its run."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from anomaly_detection.errors import UserError

DESCRIPTION = "Verdicts of a fitted detector: on files, and on the line."
COMMANDS = {
    "predict": "judge images",
    "watch": "judge what arrives in a folder",
    "serve": "judge pictures sent over HTTP",
    "drift": "look for drift",
    "feedback": "take corrected verdicts into the data set",
}


class Parser(argparse.ArgumentParser):
    """Leaves the exit status 2 to `--fail-on-anomaly`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments with one line."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand, and exit with its status; a UserError is printed, with status 1."""
    parser = Parser(prog="anomaly-detection", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        module = importlib.import_module(f"anomaly_detection.cli.{name}")
        command = commands.add_parser(name, help=what, description=module.__doc__)
        module.add_options(command)
        command.set_defaults(run=module.run)
    try:
        options = parser.parse_args(arguments)
        sys.exit(options.run(options))
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the rows has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
