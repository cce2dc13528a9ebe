"""How values and errors read within a message."""

import re
from typing import Any

BREAKS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that break a line, steer a terminal, or cannot be encoded: control characters and half surrogates."""


def shown(value: Any, length: int = 300) -> str:
    """A value as part of a message: one line, at most `length` characters before special ones are escaped."""
    text = str(value)
    if len(text) > length:
        text = f"{text[: length - 3]}..."
    return BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reason(error: BaseException) -> str:
    """An error as part of a message: its type and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
