"""Which of the requests that are answered together is at fault, so that the others are answered all the same."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from hashret.collection import Collection
from hashret.errors import HashretError, NotFound, TooLarge
from hashret.service.problems import Problem

T = TypeVar("T")
R = TypeVar("R")


def result_of_each(
    work: Callable[[list[T]], Sequence[R]], items: list[T], fault: Callable[[T], Exception | None]
) -> list[R | Exception]:
    """What `work` gives for all items, or an exception for those that it cannot be done for.

    Where it fails, each item that `fault` gives an exception for gets that, and the others are tried again, so that a
    slow item is not tried over and over; if the fault is of none, each half is tried.
    """
    try:
        return list(work(items))
    except (HashretError, Problem) as error:
        faults = [fault(item) for item in items]
        if any(faults):
            sound = [item for item, found in zip(items, faults, strict=True) if found is None]
            rest = iter(result_of_each(work, sound, fault) if sound else [])
            return [next(rest) if found is None else found for found in faults]
        half = len(items) // 2
        return [*_halved(work, items[:half]), *_halved(work, items[half:])] if half else [error]


def _halved(work: Callable[[list[T]], Sequence[R]], items: list[T]) -> list[R | Exception]:
    return result_of_each(work, items, lambda item: None)


def fault_of_images(collection: Collection, images: Iterable[bytes]) -> Exception | None:
    """How the first of these images that cannot be decoded is refused; None if all can be."""
    preprocessing = collection.hasher.preprocessing
    for image in images:
        try:
            preprocessing(image)
        except HashretError as error:
            return fault_of_image(error)
    return None


def fault_of_image(error: HashretError) -> Exception:
    """The same as an error of the request, which gave the image."""
    return error if isinstance(error, NotFound | TooLarge) else Problem(422, str(error))


def check_filter(collection: Collection, where: str | None) -> None:
    """Raises Problem 422 if this filter is none."""
    if where is not None:
        try:
            collection.matching(where)
        except HashretError as error:
            raise Problem(422, str(error)) from None
