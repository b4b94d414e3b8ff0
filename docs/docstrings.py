"""Examples in docstrings as blocks of code, wherever they stand: Markdown alone takes ``>>>`` for a quotation."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(>>> .*\n(?:(?!\s*$).*\n?)*(?:\n>>> .*\n(?:(?!\s*$).*\n?)*)*)", re.MULTILINE)


class FencedExamples(griffe.Extension):
    """Puts each doctest into a fenced block."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\1```\n", obj.docstring.value + "\n").rstrip()
