"""How values and errors read within a message, and what no message may show."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from ssl_ray.errors import UserError

BREAKS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that break a line, steer a terminal, or cannot be encoded: control characters and half surrogates."""

# Lengths are bounded, so that a hostile text of half a million characters takes a second at most.
_USER = re.compile(r"((?<!models):/{1,3})(?:[^/\s\"<>]{0,500}|[^/:\s\"<>]{0,500}:[^\s\"<>]{0,500})@")
"""User name and password of a URI, but for `models:/name@alias`. A password with a slash in it is invalid, and is still
one."""
_SECRET = "key|secret|token|passw|pwd|credential|sig|auth|odbc_connect|dsn"
_PARAMETER = re.compile(
    rf"(?i)([?&;](?!viewStateShareKey=)[^=?&;\s]{{0,50}}(?:{_SECRET})[^=?&;\s]{{0,50}}=)[^&;\s'\"<>]+"
)
"""A parameter of a URI whose name says that its value is secret, e.g. `?access_key=`, `&X-Amz-Signature=`, `&sig=`.

Not MLflow's name of a view, which our own links to its UI have.
"""


def without_password(text: str) -> str:
    """A text whose URIs have lost user names, passwords, keys and tokens.

    Everything that people or files get to see passes through here: the terminal (`console.say`), error messages
    (`shown`, `reason`), the experiment as it is kept (`config.loading`), and what MLflow is told.
    """
    return _PARAMETER.sub(r"\1***", _USER.sub(r"\1", text))


def check_encoded(key: str, uri: str) -> None:
    """Refuse a URI with a character in its credentials or parameters at which `without_password` ends: a UserError."""
    rest = uri.partition("://")[2]
    user, query = rest.rpartition("@")[0], rest.partition("?")[2]
    if rest.startswith("/") or ("/" in user and ":" not in user):
        user = ""  # an @ in a path
    if re.search(r"[\s\"<>]", user) or re.search(r"[\s\"<>']", query):
        rule = "blanks, quotes, < and > in its user, password and parameters must be percent-encoded, as %20"
        raise UserError(f"{key}: not a valid URI: {rule}")


def shown(value: Any, length: int = 300) -> str:
    """A value as part of a message: one line, at most `length` characters before special ones are escaped."""
    text = without_password(str(value))  # first: half a URI has no @ by which to know it
    if len(text) > length:
        text = f"{text[: length - 3]}..."
    return BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reason(error: BaseException) -> str:
    """An error as part of a message: its type and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {without_password(' '.join(str(error).split()))[:300]}"


def did_you_mean(given: str, valid: Sequence[str]) -> str:
    """The question for the valid name that is nearest to what was given, or that goes on from it; empty without one."""
    near = [one for one in valid if one.startswith(f"{given}.")] or difflib.get_close_matches(given, valid, 1, 0.5)
    return f"did you mean '{near[0]}'?" if near else ""


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Like `1 volume` or `6 volumes`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
