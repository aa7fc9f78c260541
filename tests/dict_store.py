"""`DictStore`: an `ItemStore` of dictionaries, without filters, to test the protocol."""

import copy
import json
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hashret.codes import Codes
from hashret.errors import HashretError, TooLarge
from hashret.results import Failure, Item, Root, State
from hashret.stores.protocol import (
    Changes,
    FailedPath,
    Ids,
    ItemRow,
    KnownPath,
    Metadata,
    ModelKey,
    PathRef,
    Ranking,
    Settings,
)


@dataclass
class Tables:
    settings: dict[str, str]
    items: dict[int, ItemRow] = field(default_factory=dict)
    # Id, label, size and modification time, by root and name.
    paths: dict[tuple[str, str], tuple[int, str | None, int, int]] = field(default_factory=dict)
    codes: dict[tuple[str, int], bytes] = field(default_factory=dict)
    failures: dict[tuple[str, str], FailedPath] = field(default_factory=dict)
    verdicts: dict[tuple[int, int], str] = field(default_factory=dict)
    changes: list[tuple[int, str, int]] = field(default_factory=list)
    states: list[State] = field(default_factory=lambda: [State(0, secrets.token_hex(8))])
    highest: int = 0


class DictSnapshot:
    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    @property
    def state(self) -> State:
        return self._tables.states[-1]

    @property
    def settings(self) -> Settings:
        return Settings(self._tables.settings, "a dictionary")

    def count(self, table: Literal["items", "paths", "failures", "changes"], after: int = 0) -> int:
        if table == "changes":
            return sum(generation > after for generation, _, _ in self._tables.changes)
        return len(getattr(self._tables, table))

    def ids(self, after: int = 0, limit: int | None = None, where: str | None = None) -> Ids:
        if where is not None:
            raise HashretError("a dictionary has no filters: ask without where")
        return np.array(sorted(i for i in self._tables.items if i > after)[:limit], np.int64)

    def items(self, ids: Iterable[int], *, metadata: bool = True, max_bytes: int | None = None) -> dict[int, Item]:
        found, size = {}, 0
        for i in ids:
            if i in self._tables.items:
                row = self._tables.items[i]
                own = sorted(
                    (root + name, path[1]) for (root, name), path in self._tables.paths.items() if path[0] == i
                )
                label = next((label for _, label in own if label is not None), None)
                paths = list(dict.fromkeys(path for path, _ in own))
                added = row.added or ""
                values = row.metadata if metadata else None
                size += len("".join(paths)) + (len(json.dumps(values)) if values is not None else 0)
                if max_bytes is not None and size > max_bytes:
                    raise TooLarge(f"the items have more than {max_bytes} bytes: read fewer")
                found[i] = Item(i, row.sha256, row.width, row.height, row.length, added, values, paths, label)
        return found

    def codes(
        self, ids: Sequence[int] | None = None, *, model: ModelKey | None = None, max_items: int | None = None
    ) -> tuple[Ids, Codes]:
        fingerprint, bits = model or self.settings.model
        found = sorted(i for f, i in self._tables.codes if f == fingerprint and (ids is None or i in ids))
        found = found if max_items is None else found[:: -(-max(1, len(found)) // max_items)]
        rows = [self._tables.codes[fingerprint, i] for i in found]
        if any(len(row) != bits // 8 for row in rows):
            raise HashretError(f"a dictionary is damaged (codes are not of {bits} bits): make it anew")
        return np.array(found, np.int64), np.frombuffer(b"".join(rows), np.uint8).reshape(len(found), bits // 8)

    def find(self, sha256s: Sequence[str]) -> dict[str, int]:
        return {row.sha256: i for i, row in self._tables.items.items() if row.sha256 in sha256s}

    def paths(self, ids: Iterable[int]) -> list[PathRef]:
        selected = set(ids)
        return [
            PathRef(Root(root), name, path[0], path[3])
            for (root, name), path in self._tables.paths.items()
            if path[0] in selected
        ]

    def paths_at(self, path: str) -> list[PathRef]:
        refs = self.paths(self._tables.items)
        refs += [PathRef(Root(f.root), f.name, None, f.mtime_ns) for f in self._tables.failures.values()]
        folder = path.rstrip("/") + "/"
        return [ref for ref in refs if ref.root.within(path) or f"{ref.root}{ref.name}/".startswith(folder)]

    def roots(self) -> list[Root]:
        return sorted({Root(root) for root, _ in [*self._tables.paths, *self._tables.failures]})

    def known_paths(self, root: str, names: Sequence[str]) -> dict[str, KnownPath]:
        paths_by_name = {}
        for name in names:
            path, failure = self._tables.paths.get((root, name)), self._tables.failures.get((root, name))
            if failure is not None:
                paths_by_name[name] = KnownPath(path and path[0], failure.size, failure.mtime_ns, True)
            elif path is not None:
                paths_by_name[name] = KnownPath(path[0], path[2], path[3], False)
        return paths_by_name

    def names(self, root: str) -> Iterator[str]:
        return iter({name for r, name in [*self._tables.paths, *self._tables.failures] if r == root})

    def failures(self) -> Iterator[tuple[Root, Failure]]:
        for (root, name), failure in sorted(self._tables.failures.items()):
            yield Root(root), Failure(root + name, failure.reason, "")

    def changes(self, since: State) -> Changes | None:
        if since.generation < int(self.settings["changes_after"]) or since not in self._tables.states:
            return None
        later = [(op, i) for generation, op, i in self._tables.changes if generation > since.generation]
        added = {i for op, i in later if op == "add"}
        ids, codes = self.codes(sorted(added))
        return Changes(np.array(sorted({i for op, i in later if op == "remove"} - added), np.int64), ids, codes)

    def item_rows(self) -> Iterator[ItemRow]:
        for (root, name), (i, label, size, mtime_ns) in sorted(
            self._tables.paths.items(), key=lambda entry: (entry[1][0], entry[0])
        ):
            code = self._tables.codes[self.settings.model.fingerprint, i]
            row = self._tables.items[i]._replace(root=root, name=name, label=label, size=size, mtime_ns=mtime_ns)
            yield row._replace(code=code, id=i)

    def verdicts(self, verdict: str) -> Ids:
        pairs = sorted(pair for pair, said in self._tables.verdicts.items() if said == verdict)
        return np.array(pairs, np.int64).reshape(-1, 2)

    def ranking(self, keep: str) -> Ranking:
        paths: dict[int, list[tuple[str, int]]] = {i: [] for i in self._tables.items}
        for (root, name), (i, _, _, mtime_ns) in self._tables.paths.items():
            paths[i].append((root + name, mtime_ns))
        under = {i for i, own in paths.items() for path, _ in own if path.startswith(keep.rstrip("/") + "/")}
        if keep not in ("largest", "oldest") and not under:
            raise HashretError(f"nothing is indexed under {keep}: keep the largest, the oldest, or another folder")

        def order(i: int) -> tuple[object, ...]:
            row = self._tables.items[i]
            if keep == "oldest":
                return min((mtime_ns for _, mtime_ns in paths[i] if mtime_ns), default=2**62), i
            return i not in under, -row.width * row.height, -row.length, i

        ids = sorted(self._tables.items, key=order)
        return Ranking(np.array(ids, np.int64), np.array([len(paths[i]) for i in ids], np.int64))

    def without_code(self, fingerprint: str) -> Ids:
        return np.array(sorted(i for i in self._tables.items if (fingerprint, i) not in self._tables.codes), np.int64)


class DictTransaction(DictSnapshot):
    def __init__(self, tables: Tables, advance: bool) -> None:
        super().__init__(tables)
        if advance:
            tables.states.append(State(self.state.generation + 1, secrets.token_hex(8)))
            self.put_setting("generation", str(self.state.generation))

    def put(self, rows: Sequence[ItemRow]) -> list[int | None]:
        tables, fingerprint = self._tables, self.settings.model.fingerprint
        ids = self.find([row.sha256 for row in rows])
        for row in rows:
            if row.sha256 not in ids and row.code is not None:
                ids[row.sha256] = tables.highest = max(tables.highest + 1, row.id or 0)
                tables.items[tables.highest] = row._replace(added=row.added or "2026-01-01T00:00:00Z")
                tables.codes[fingerprint, tables.highest] = row.code
                tables.changes.append((self.state.generation, "add", tables.highest))
        for row in rows:
            if row.sha256 in ids:
                tables.paths[str(row.root), row.name] = (ids[row.sha256], row.label, row.size, row.mtime_ns)
                tables.failures.pop((str(row.root), row.name), None)
        self._drop_orphans()
        return [ids.get(row.sha256) for row in rows]

    def _drop_orphans(self) -> list[str]:
        tables = self._tables
        left = {path[0] for path in tables.paths.values()}
        gone = [i for i in tables.items if i not in left]
        tables.changes += [(self.state.generation, "remove", i) for i in gone]
        digests = [tables.items.pop(i).sha256 for i in gone]
        tables.codes = {(f, i): code for (f, i), code in tables.codes.items() if i in left}
        tables.verdicts = {pair: said for pair, said in tables.verdicts.items() if {*pair} <= left}
        return digests

    def put_failures(self, failures: Iterable[FailedPath]) -> None:
        self._tables.failures |= {(str(failure.root), failure.name): failure for failure in failures}

    def remove(self, ids: Iterable[int] = (), paths: Iterable[tuple[str, str]] = ()) -> list[str]:
        selected = set(ids)
        for key in [key for key, path in self._tables.paths.items() if path[0] in selected]:
            del self._tables.paths[key]
        for root, name in list(paths):
            self._tables.paths.pop((root, name), None)
            self._tables.failures.pop((root, name), None)
        return self._drop_orphans()

    def put_metadata(self, metadata: Mapping[int, Metadata]) -> None:
        for i, row in metadata.items():
            self._tables.items[i] = self._tables.items[i]._replace(metadata=row)

    def put_codes(self, fingerprint: str, codes: Iterable[tuple[int, bytes]]) -> None:
        self._tables.codes |= {(fingerprint, i): code for i, code in codes}

    def switch_model(self, model: ModelKey) -> None:
        self._tables.codes = {(f, i): code for (f, i), code in self._tables.codes.items() if f == model.fingerprint}
        self._tables.settings |= {"fingerprint": model.fingerprint, "bits": str(model.bits)}
        self._tables.settings.pop("calibration", None)
        self.forget_changes(self.state.generation)

    def put_verdict(self, a: int, b: int, verdict: str) -> None:
        self._tables.verdicts[min(a, b), max(a, b)] = verdict

    def put_setting(self, key: str, value: str) -> None:
        self._tables.settings[key] = value

    def forget_changes(self, up_to: int) -> None:
        self._tables.changes = [change for change in self._tables.changes if change[0] > up_to]
        self.put_setting("changes_after", str(up_to))


class DictStore:
    """Every state is an immutable set of tables: a transaction changes a copy, and replaces the tables by it."""

    location = "a dictionary"
    read_only = False

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._tables = Tables({"generation": "0", "changes_after": "0"} | dict(settings))
        self._lock = threading.RLock()

    @contextmanager
    def snapshot(self) -> Iterator[DictSnapshot]:
        yield DictSnapshot(self._tables)

    @contextmanager
    def transaction(self, *, advance: bool = True, rollback: bool = False) -> Iterator[DictTransaction]:
        with self._lock:
            transaction = DictTransaction(copy.deepcopy(self._tables), advance)
            yield transaction
            if not rollback:
                self._tables = transaction._tables

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._lock:
            yield

    def close(self) -> None:
        """Do nothing: no file is open."""
