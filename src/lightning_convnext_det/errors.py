"""Errors that a user can mend, each with the exit status that the command line ends with.

Every message is one line that names the file and the remedy; most begin with a stable code such as ``[LCD-D101]``. The
command line shows the message alone for these, and the traceback for all others, which are defects.
"""


class UserError(Exception):
    """A mistake in what a user has given; its message says how to mend it."""

    exit_status = 2


class ArgumentError(UserError, ValueError):
    """An argument or a combination of arguments cannot be used."""


class DataError(UserError, ValueError):
    """A dataset, an annotation file or an image cannot be used as it is."""

    exit_status = 3


class DivergenceError(UserError, FloatingPointError):
    """A loss or a weight is not finite."""

    exit_status = 4


class WeightsError(UserError, RuntimeError):
    """Pretrained weights cannot be fetched, read or fitted to the network."""

    exit_status = 5


class CheckpointError(UserError, ValueError):
    """A checkpoint is damaged, foreign, or does not fit the data it is used on."""

    exit_status = 6


def first_line(error: Exception) -> str:
    """The message of an error, on one line of at most 160 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
