"""Scripts without ``if __name__ == "__main__"``: found before a worker process runs them a second time.

Workers that are not forked (macOS, Windows, Python 3.14) import the script first. Without the guard each of them begins
the same training, which ends in tracebacks of Python's start-up or never ends.
"""

import ast
import inspect
import multiprocessing
import sys
from multiprocessing.context import BaseContext
from pathlib import Path
from types import FrameType

_MESSAGE = (
    "error: worker processes import {script}, which would run again in each of them; put its code under "
    'if __name__ == "__main__": (line {line}), or set num_workers to 0'
)


def check_main_guard(context: BaseContext | None) -> None:
    """End a script that starts workers outside of ``if __name__ == "__main__"``.

    Args:
        context: of the workers' start; None for Python's own choice.

    Raises:
        SystemExit: with one line on stderr: a traceback through the trainer would hide it.
    """
    method = context.get_start_method() if context is not None else multiprocessing.get_start_method()
    if method == "fork" or (found := _unguarded_line()) is None:
        return
    raise SystemExit(_MESSAGE.format(script=Path(found[0]).name, line=found[1]))


def _unguarded_line() -> tuple[str, int] | None:
    """The script and the line at its top level that is running now, if each import of the script would run it."""
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    name = getattr(getattr(main, "__spec__", None), "name", "")
    if script is None or name.endswith("__main__"):  # multiprocessing.spawn imports neither
        return None
    frame = _frame_of(script)
    if frame is None:
        return None
    try:
        tree = ast.parse(Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):  # of another form than a source file
        return None
    for statement in tree.body:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if isinstance(statement, ast.If | ast.Match) and "__name__" in names:
            return None  # a guard of any form: the statement after it may be out of an import's reach
        if statement.lineno <= frame.f_lineno <= (statement.end_lineno or 0):
            return script, frame.f_lineno
    return None


def _frame_of(script: str) -> FrameType | None:
    """The frame of a script's top level; in a worker that imports it, its name is ``__mp_main__``."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__file__") == script:
            return frame
        frame = frame.f_back
    return None
