"""Errors that a user can mend, each with the exit status that the command line ends with.

Every message is one line that names the file and the remedy and begins with a stable code such as ``[LCD-D101]``.
"""


class ArgumentError(ValueError):
    """An argument has a value that it cannot have."""

    exit_status = 2


class DataError(ValueError):
    """A dataset, an annotation file or an image cannot be used as it is."""

    exit_status = 3


class DivergenceError(FloatingPointError):
    """A loss or a weight is not finite."""

    exit_status = 4


class WeightsError(RuntimeError):
    """Pretrained weights cannot be fetched, read or fitted to the network."""

    exit_status = 5


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign, or does not fit the data it is used on."""

    exit_status = 6


def first_line(error: Exception) -> str:
    """What an error of a library says, on one line of at most 160 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
