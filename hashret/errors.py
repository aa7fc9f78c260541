"""The exceptions of hashret, and helpers for error texts."""

from collections.abc import Mapping
from operator import index
from typing import Any, TypeVar

T = TypeVar("T")


class HashretError(Exception):
    """An error that the user can fix; its text is one line that says what to do next."""


class NotFound(HashretError):
    """An item, its image file or a derived object does not exist."""


class TooLarge(HashretError):
    """An image has more bytes or pixels than the limit."""


def one_line(error: BaseException) -> str:
    """Return the text of an error, or its class name if it has none, as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: "1 item", "1,597 items"; pass `plural` for nouns with an irregular plural."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def choose(table: Mapping[str, T], name: str, noun: str) -> T:
    """Return the entry `name` of a table; raise ValueError that lists the names for another. `noun` names an entry."""
    if name not in table:
        raise ValueError(f"there is no {noun} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def damaged(location: object, reason: str) -> HashretError:
    """Return the error for a damaged database or file."""
    return HashretError(f"{location} is damaged ({reason}): hashret doctor says what can be saved")


def check_count(value: Any, minimum: int, name: str) -> int:
    """Return `value`; raise ValueError unless it is an integer of at least `minimum`."""
    try:
        count = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        count = -1
    if count < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")
    return count
