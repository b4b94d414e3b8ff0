"""The command ``convnext-det``: dispatch, help, errors in one line and exit statuses.

Libraries are imported by the commands that need them: Lightning and torch take seconds.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from lightning_convnext_det import __version__
from lightning_convnext_det.cli.commands import DESCRIPTION, TOOLS, TRAINER
from lightning_convnext_det.cli.messages import find_user_error, one_line
from lightning_convnext_det.cli.short_help import short_help
from lightning_convnext_det.suggestions import suggest

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a user's mistake ends in one line, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        sys.stdout.write(f"convnext-det {__version__}\n")
        return 0
    if list(arguments) in (["--help"], ["-h"]):
        sys.stdout.write(_create_parser().format_help())
        return 0
    _quieten()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # for which Lightning 2.6 ends with status 1
            return INTERRUPTED
        raise
    except Exception as error:
        found = find_user_error(error)
        if found is None:
            raise
        sys.stderr.write(f"error: {one_line(found)}\n")
        return found.exit_status


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    if command in TOOLS:
        from lightning_convnext_det.cli.tools import TOOLS as tools

        return tools[command](arguments[1:], main)
    if not command.startswith("-") and command not in TRAINER:
        reason = suggest(command, [*TRAINER, *TOOLS]) if command else f"give one of {', '.join([*TRAINER, *TOOLS])}"
        sys.stderr.write(f"error: invalid command '{command}'; {reason}\n")
        return 2
    if list(arguments[1:]) in (["--help"], ["-h"]) and command in TRAINER:
        sys.stdout.write(short_help(command))
        return 0
    if list(arguments[1:]) == ["--help", "all"]:
        arguments = arguments[:2]
    from lightning_convnext_det.cli.trainer import DetectionCLI

    DetectionCLI(arguments)
    return 0


def _create_parser() -> argparse.ArgumentParser:
    """The parser whose help lists all commands; each command parses its own arguments."""
    parser = argparse.ArgumentParser("convnext-det", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration file that names the command as its key")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", description="COMMAND --help tells more")
    for name, text in {**TRAINER, **TOOLS}.items():
        subparsers.add_parser(name, help=text)
    return parser


def _quieten() -> None:
    """Hide advertisements, and warnings about Lightning's own code."""
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    warnings.filterwarnings("ignore", "Precision bf16-mixed is not supported by the model summary")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    own = logging.getLogger("lightning_convnext_det")
    own.setLevel(logging.INFO)  # e.g. how many tensors of a file matched
    own.handlers = [logging.StreamHandler(sys.stderr)]


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()
