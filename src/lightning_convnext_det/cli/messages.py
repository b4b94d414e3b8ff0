"""From an error to the line that a user sees; a defect has none and keeps its traceback."""

import dis
import re

from lightning_convnext_det.errors import ArgumentError, UserError

_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
_KEY = re.compile(r'Parser key "([\w.]+)": ')
_UNION = re.compile(r'Parser key "([\w.]+)":.* Errors: - (.*?)(?: Given value type: .*?Given value: (.*))?$')


def find_user_error(error: BaseException | None) -> UserError | None:
    """Find the user's mistake in an error or its causes, which a library may have wrapped; None in a defect."""
    while error is not None and not isinstance(error, UserError):
        if _is_refusal_of_lightning(error):
            return ArgumentError(one_line(error))
        error = error.__cause__
    return error


def _is_refusal_of_lightning(error: BaseException) -> bool:
    """Whether Lightning has raised an error about its arguments: of the trainer, a logger or a callback."""
    name = type(error).__name__
    if name == "MisconfigurationException" or isinstance(error, ValueError | TypeError | ModuleNotFoundError):
        return is_raised_in(error, "lightning.")
    # EarlyStopping raises a RuntimeError for a metric that nothing logs
    return isinstance(error, RuntimeError) and is_raised_in(error, "lightning.pytorch.callbacks.")


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    text = str(error).strip()
    if "Original Traceback" in text:  # raised in a worker of the data loader, which puts its traceback into the text
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def shorten_refusal(text: str) -> str:
    """Shorten jsonargparse's list of all types that a value is not, to the argument, the value and the reasons."""
    if found := _UNION.search(text):
        key, errors, value = found.groups()
        reasons = dict.fromkeys(e for e in errors.split(" - ") if "NoneType" not in e)
        given = f" is {value}" if value and not value.startswith("Namespace") else ""
        text = f"{key}{given}: {'; '.join(reasons)}"
    text = _KEY.sub(r"\1: ", _CLASS.sub(r"\1", text))
    return text.replace("Expected a ", "expected ").replace("typing.Literal", "one of ")


def is_raised_in(error: BaseException, package: str) -> bool:
    """Tell whether a ``raise`` of a package raised an error, not an expression such as ``int("x")``."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code, module = traceback.tb_frame.f_code.co_code, str(traceback.tb_frame.f_globals.get("__name__", ""))
    return code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"] and module.startswith(package)
