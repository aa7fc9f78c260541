"""The exceptions of hashret, and what it says of others."""

from collections.abc import Mapping
from operator import index
from typing import Any, TypeVar

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


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: "1 item", "1,597 items"; `plural` is for nouns that do not end in "s" then."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry `name` of a table of parts; raises ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def damaged(location: object, how: str) -> HashretError:
    """The error for a place, such as a database, that is not what hashret made it."""
    return HashretError(f"{location} is damaged ({how}): hashret doctor says what can be saved")


def check_count(value: Any, least: int, name: str) -> int:
    """`value` itself, when it is an integer of at least `least`; raises ValueError otherwise."""
    try:
        count = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        count = -1
    if count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return count
