"""Find the faulty requests of a batch, so that the others are still answered."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from hashret.collection import Collection
from hashret.errors import HashretError, NotFound, TooLarge
from hashret.service.batcher import as_exception
from hashret.service.problems import Problem

T = TypeVar("T")
R = TypeVar("R")


def isolate_faults(
    process: Callable[[list[T]], Sequence[R]], items: list[T], find_fault: Callable[[T], Exception | None]
) -> list[R | Exception]:
    """Return the results of `process(items)`, with an exception in place of the result of each faulty item.

    If `process` raises anything, the items for which `find_fault` returns an exception get that exception, and the
    others are processed again. If it finds no fault, each half is processed by itself. So a slow item is not processed
    repeatedly.
    """
    try:
        return list(process(items))
    except BaseException as error:  # also an unexpected one: it must not fall on the others
        faults = [find_fault(item) for item in items]
        if any(faults):
            valid = [item for item, fault in zip(items, faults, strict=True) if fault is None]
            results = iter(isolate_faults(process, valid, find_fault) if valid else [])
            return [next(results) if fault is None else fault for fault in faults]
        half = len(items) // 2
        return [*_bisect(process, items[:half]), *_bisect(process, items[half:])] if half else [as_exception(error)]


def _bisect(process: Callable[[list[T]], Sequence[R]], items: list[T]) -> list[R | Exception]:
    return isolate_faults(process, items, lambda item: None)


def find_image_fault(collection: Collection, images: Iterable[bytes]) -> Exception | None:
    """Return the error of the first image that cannot be decoded; None if all can be."""
    preprocessing = collection.hasher.preprocessing
    for image in images:
        try:
            preprocessing(image)
        except HashretError as error:
            return to_request_fault(error)
        except BaseException as error:
            return as_exception(error)
    return None


def to_request_fault(error: HashretError) -> Exception:
    """Return the error of an uploaded image as an error of its request."""
    return error if isinstance(error, NotFound | TooLarge) else Problem(422, str(error))


def check_filter(collection: Collection, where: str | None) -> None:
    """Raise Problem 422 for an invalid filter."""
    if where is not None:
        try:
            collection.matching(where)
        except HashretError as error:
            raise Problem(422, str(error)) from None
