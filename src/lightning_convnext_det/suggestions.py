"""Suggestions for misspelt names."""

import difflib


def suggest(word: str, known: list[str]) -> str:
    """Say which of the known words a misspelt one may mean."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(repr(c) for c in close)}?"
    return f"it has {', '.join(known)}"
