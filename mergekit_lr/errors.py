"""The one exception that the public API raises for bad input or a failed run, and its few kinds.

A message is one line: what is wrong, where (file, tensor, line of the recipe), what was found and what
was expected, and what to do about it. Names come from files, so control characters are escaped.
"""

from __future__ import annotations


class LrmergeError(Exception):
    """Base of every error that a user can cause or meet. ``exit_code`` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(printable(message))


class UsageError(LrmergeError):
    """The request itself is wrong: an option, a combination of options, a value out of range."""

    exit_code = 2


class FormatError(LrmergeError):
    """A file is not what it should be: truncated, a lying header, an unknown dialect, a NaN."""


class MismatchError(LrmergeError):
    """Inputs that do not belong together: other architecture, other shapes, other vocabulary."""


class CapacityError(LrmergeError):
    """Not enough memory, disk or device for what was asked."""


class HubError(LrmergeError):
    """The Hugging Face Hub refused or could not be reached."""


def printable(text: str) -> str:
    """``text`` on one line, with every control character escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
