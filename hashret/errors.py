"""The exceptions of hashret, and what it says of others."""

from typing import TypeVar

T = TypeVar("T")


class HashretError(Exception):
    """Something the user can mend; its text is one line that says what to do next."""


class NotFound(HashretError):
    """Nothing goes by that id, its image is no longer where it was, or what is asked for was never made."""


class TooLarge(HashretError):
    """An image of more bytes or pixels than are read."""


def one_line(error: BaseException) -> str:
    """The text of an error, or its name where it has none, in at most 200 characters of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def choose(table: dict[str, T], name: str, what: str) -> T:
    """The entry `name` of a table of parts; raises ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]
