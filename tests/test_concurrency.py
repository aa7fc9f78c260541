"""Many readers, in threads and other processes, beside one writer: every result is of a committed state."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import Collection
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ
SECONDS = 60 if SOAK else 2
CLOSES = 300 if SOAK else 60
READERS = 4  # processes, and as many threads

READ = """
import json, os, sys, time
from hashret.collection import Collection
from hashret.codes import from_hex
from hashret.indexes import set_threads

set_threads(1)
queries = [(code, from_hex(code, 16), k, r) for code, k, r in json.loads(sys.argv[2])]
with Collection.open(sys.argv[1], read_only=True) as collection:
    collection.query_codes(queries[0][1])
    print("ready", flush=True)
    n = int(sys.argv[3])
    while not os.path.exists(sys.argv[4]):
        code, query, k, r = queries[n % len(queries)]
        start = time.monotonic()
        (hits,) = collection.query_codes(query, k, r)
        row = [start, time.monotonic(), n % len(queries), [[h.distance, h.id] for h in hits], all(h.path for h in hits)]
        print(json.dumps(row))
        n += 1
        time.sleep(0.005)
"""


class State(NamedTuple):
    """The codes of a generation, and the times between which it can have been read."""

    begins: float
    ends: float
    ids: NDArray[np.int64]
    codes: Codes


@cache
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (4000, 5, 5), np.uint8)


@contextmanager
def readers(folder: Path, queries: list[tuple[str, int | None, int | None]], stop: Path) -> Iterator[list[str]]:
    """Start processes that query until the file `stop` exists; the list has their results when they have ended."""
    command = [sys.executable, "-c", READ, str(folder), json.dumps(queries)]
    started = [
        subprocess.Popen([*command, str(i), str(stop)], stdout=subprocess.PIPE, text=True) for i in range(READERS)
    ]
    answers: list[str] = []

    def collect(process: subprocess.Popen[str]) -> None:
        answers.extend(process.communicate()[0].splitlines())

    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    collectors = [threading.Thread(target=collect, args=(process,)) for process in started]
    for collector in collectors:
        collector.start()
    try:
        yield answers
    finally:
        stop.touch()
        for collector in collectors:
            collector.join()
    assert all(process.returncode == 0 for process in started)


def test_every_result_is_of_a_committed_state(tmp_path: Path) -> None:
    rng, model = random.Random(0), Hasher("lsh", 16).fit(images()[:100])
    coded = model.encode_pixels(model.preprocessing.batch(images()[..., None]))
    queries = [(coded[i].tobytes().hex(), k, r) for i in range(5) for k, r in ((5, None), (None, 2), (30, 4))]
    folder = tmp_path / "c"
    with Collection.create(folder, model) as collection:
        collection.add(images()[:300])
        ids, codes = np.arange(1, 301), coded[:300]
        states = [State(0, 0, ids, codes)]
        answers: list[Any] = []
        errors: list[BaseException] = []

        def read(n: int) -> None:
            try:
                while not (tmp_path / "stop").exists():
                    code, k, r = queries[n % len(queries)]
                    start = time.monotonic()
                    (hits,) = collection.query_codes(np.frombuffer(bytes.fromhex(code), np.uint8)[None], k, r)
                    found = [[hit.distance, hit.id] for hit in hits]
                    answers.append([start, time.monotonic(), n % len(queries), found, all(hit.path for hit in hits)])
                    n += 1
                    time.sleep(0.005)  # leaves the interpreter to the writer
            except BaseException as error:
                errors.append(error)

        with readers(folder, queries, tmp_path / "stop") as of_others:
            end = time.monotonic() + SECONDS
            threads = [threading.Thread(target=read, args=(i,)) for i in range(READERS)]
            for thread in threads:
                thread.start()
            while time.monotonic() < end or len(states) < 10:
                begins = time.monotonic()
                if rng.random() < 0.4 and len(ids) > 200:
                    removed = rng.sample(ids.tolist(), 40)
                    assert collection.remove(removed) == 40
                    kept = ~np.isin(ids, removed)
                    ids, codes = ids[kept], codes[kept]
                else:
                    rows = [rng.randrange(len(images())) for _ in range(25)]
                    added = collection.add(images()[rows])
                    new = {i: row for i, row in zip(added, rows, strict=True) if i not in set(ids.tolist())}
                    ids = np.concatenate([ids, np.array(list(new), np.int64)])
                    codes = np.concatenate([codes, coded[list(new.values())]])
                states[-1] = states[-1]._replace(ends=time.monotonic())
                states.append(State(begins, float("inf"), ids, codes))
        for thread in threads:
            thread.join()
    assert errors == []
    answers += map(json.loads, of_others)
    assert len(answers) > 15 * SECONDS

    @cache
    def expected(number: int, n: int) -> list[list[int]]:
        return right(states[number], *queries[n])

    seen = set()
    for start, ended, n, found, complete in answers:
        assert complete
        for number, state in enumerate(states):
            if state.begins <= ended and state.ends >= start and expected(number, n) == found:
                seen.add(number)
                break
        else:
            raise AssertionError(f"{found} for {queries[n]} is of no state between {start} and {ended}")
    assert len(seen) > 3


def right(state: State, code: str, k: int | None, r: int | None) -> list[list[int]]:
    distances = hamming(np.frombuffer(bytes.fromhex(code), np.uint8)[None], state.codes)[0]
    order = np.lexsort((state.ids, distances))
    pairs = np.stack([distances[order], state.ids[order]], axis=1)
    return [[int(d), int(i)] for d, i in pairs.tolist() if r is None or d <= r][:k]


CLOSE = """
import sys, threading
from hashret.collection import Collection

collection, over = Collection.open(sys.argv[1]), threading.Event()

def ask():
    while not over.is_set():
        assert len(collection.items(0, 200)) == 200 and len(collection) == 4000

readers = [threading.Thread(target=ask) for _ in range(4)]
for reader in readers:
    reader.start()
for _ in range(int(sys.argv[2])):
    over.wait(0.002)
    collection.close()
over.set()
for reader in readers:
    reader.join()
collection.close()
"""


def test_a_collection_may_be_closed_while_other_threads_read(tmp_path: Path) -> None:
    """A connection that is closed in the middle of a statement crashes the process."""
    with Collection.create(tmp_path / "c", Hasher("lsh", 16).fit(images())) as collection:
        np.save(tmp_path / "images.npy", images())
        collection.index(tmp_path / "images.npy")
    done = subprocess.run([sys.executable, "-c", CLOSE, tmp_path / "c", str(CLOSES)], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
