"""The command ``convnext-det``: what it is asked for, and how it ends.

Libraries are imported by the commands that need them: Lightning and torch take seconds.
"""

import logging
import sys
import warnings
from collections.abc import Sequence

from lightning_convnext_det import __version__
from lightning_convnext_det.cli.tools import TOOLS

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a user's mistake ends in one line, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        sys.stdout.write(f"convnext-det {__version__}\n")
        return 0
    _quieten()
    try:
        if arguments and arguments[0] in TOOLS:
            return TOOLS[arguments[0]][0](arguments[1:], main)
        from lightning_convnext_det.cli.trainer import run_trainer

        run_trainer(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # for which Lightning 2.6 ends with status 1
            return INTERRUPTED
        raise
    except Exception as error:
        cause = _cause(error)
        line = user_message(cause)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return int(getattr(cause, "exit_status", 2))
    return 0


def _quieten() -> None:
    """Leave out what a user can do nothing about: advertisements, and warnings that are Lightning's own affair."""
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    own = logging.getLogger("lightning_convnext_det")
    own.setLevel(logging.INFO)  # e.g. how many tensors of a file matched
    own.handlers = [logging.StreamHandler(sys.stderr)]


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


def _cause(error: BaseException) -> BaseException:
    """The error of ours that another library has wrapped into its own, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "exit_status"):
        cause = cause.__cause__
    return cause or error


def user_message(error: BaseException) -> str | None:
    """Say in one line what the user did wrong; None if the error is a defect of a program."""
    text = str(error).strip()
    if "Original Traceback" in text:  # raised in a worker of the data loader, which puts its traceback into the text
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if hasattr(error, "exit_status"):
        return text
    if isinstance(error, ValueError | TypeError | FileNotFoundError) and _raised_here(error):
        return text
    return None


def _raised_here(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    return str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("lightning_convnext_det.")
