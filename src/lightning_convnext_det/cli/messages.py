"""From an error to the line that a user sees; a defect has none and keeps its traceback."""

import dis

from lightning_convnext_det.errors import UserError


def find_user_error(error: BaseException | None) -> UserError | None:
    """Find the user's mistake in an error or its causes, which a library may have wrapped; None in a defect."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    text = str(error).strip()
    if "Original Traceback" in text:  # raised in a worker of the data loader, which puts its traceback into the text
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def is_raised_here(error: BaseException) -> bool:
    """Tell whether a ``raise`` of this package raised an error, not a library or an expression such as ``int("x")``."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code, module = traceback.tb_frame.f_code.co_code, str(traceback.tb_frame.f_globals.get("__name__", ""))
    is_raise = code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and module.startswith("lightning_convnext_det.")
