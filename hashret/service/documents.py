"""Items as JSON, with the fields that a request names, counted before an answer is made of them."""

import json
from collections.abc import Iterable, Iterator

from hashret.codes import to_hex
from hashret.collection import near_duplicates
from hashret.collection.parts import no_item
from hashret.collection.snapshot import View
from hashret.errors import TooLarge
from hashret.results import MAX_K, Item
from hashret.service import memory, messages
from hashret.service.memory import RequestMemory
from hashret.service.problems import Problem

Fields = tuple[str, ...]
_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each text
HIT_FIELDS: Fields = tuple(messages.Hit.model_fields)
ITEM_FIELDS: Fields = tuple(messages.Item.model_fields)
CODED_ITEM_FIELDS: Fields = tuple(messages.CodedItem.model_fields)


def select_fields(text: str | None, fields: Fields) -> Fields:
    """Return the fields that a text names, separated by commas, in their order; None names all of them.

    Raise Problem 422 for another name.
    """
    if text is None:
        return fields
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names.difference(fields)):
        raise Problem(422, f"fields: there is no {unknown[0][:40]!r}; choose from {', '.join(fields)}", "ValueError")
    return tuple(name for name in fields if name in names)


def item_members(item: Item, fields: Fields) -> str:
    """Return some fields of an item, or of a hit that depend on its item alone, as JSON without the braces."""
    path = item.paths[0] if item.paths else None
    return _encode({name: path if name == "path" else getattr(item, name) for name in fields})[1:-1]


def read_members(view: View, ids: Iterable[int], fields: Fields) -> Iterator[tuple[int, str]]:
    """Iterate over ids and `item_members`. Raise Problem 422 for items that no answer has room for."""
    if fields == ("id",):
        yield from ((item_id, f'"id":{item_id}') for item_id in ids)
        return
    try:
        for item in view.iterate_items(ids, metadata="metadata" in fields, max_bytes=memory.MAX_ANSWER_BYTES):
            yield item.id, item_members(item, fields)
    except TooLarge:
        raise memory.answer_too_large() from None


def item_document(view: View, item_id: int, fields: Fields, request: RequestMemory) -> bytes:
    """Return an item as JSON. Raise NotFound if there is none, and Problem 422 if it is too large."""
    if not len(codes := view.snapshot.codes([item_id])[1]):
        raise no_item(item_id)
    own = tuple(name for name in fields if name != "code")
    members = [text for _, text in read_members(view, [item_id], own) if text]
    if own != fields:
        members.append(f'"code":"{to_hex(codes)[0]}"')
    return _counted(f"{{{','.join(members)}}}", request).encode()


def items_document(view: View, ids: list[int], more: bool, fields: Fields, request: RequestMemory) -> bytes:
    """Return a page of items as JSON; with `more`, its last id is the cursor of the next. Raise Problem 422 if it is
    too large."""
    items = [_counted(f"{{{text}}}", request) for _, text in read_members(view, ids, fields)]
    return f'{{"items":[{",".join(items)}],"next":{ids[-1] if more else "null"}}}'.encode()


def groups_document(
    view: View, max_distance: int, by: str, keep: str, limit: int, fields: Fields, request: RequestMemory
) -> bytes:
    """Return at most `limit` groups of near-duplicates as JSON. Raise Problem 422 if they are too large."""
    clusters = near_duplicates.find_clusters(view.snapshot, max_distance, by, keep)
    items = view.iterate_items(
        (item_id for cluster in clusters for item_id in cluster.ids[:MAX_K]),
        metadata="metadata" in fields,
        max_bytes=memory.MAX_ANSWER_BYTES,
    )
    groups: list[str] = []
    more = False
    try:
        for cluster, members in near_duplicates.read_groups(view, clusters, keep, items, MAX_K):
            if more := len(groups) == limit:
                break
            texts = [_counted(f"{{{item_members(item, fields)}}}", request) for item in members]
            distances = _counted(json.dumps(cluster.distances[:MAX_K], separators=(",", ":")), request)
            size = len(cluster.ids)
            groups.append(f'{{"size":{size},"items":[{",".join(texts)}],"distances":{distances}}}')
    except TooLarge:
        raise memory.answer_too_large() from None
    return f'{{"groups":[{",".join(groups)}],"more":{json.dumps(more)}}}'.encode()


def _counted(text: str, request: RequestMemory) -> str:
    request.answer(len(text))
    return text
