"""Exact search in Hamming space compared with its peers: microseconds per query, build time, recall.

    python benchmarks/search.py --items 1000000 --bits 64 --noise 0.06 --threads 1
    python benchmarks/search.py --workload uniform --batch 1
    python benchmarks/search.py --radius 6
    python benchmarks/search.py --disk FOLDER --items 1000000000

Distances of our hits are compared with those of FAISS BinaryFlat before anything is timed. Then the engines are timed
in turns, so that changes of the machine's speed affect all of them. Queries are split into five parts and searched in
batches of --batch; a line is the mean over the parts of the best pass over each. The ratio is BinaryFlat's time over
ours or a peer's. Passes repeat the same queries, so with fewer of them (--queries) caches hold more. Approximate peers
have several settings, each with its recall. "our scan" is `BitFlipIndex` without tables; "reading the codes" is the
least time in which one thread can read them all. With --radius the search is for all items within it.
Workloads: "clustered" draws max(1000, items / 500) centres and flips each bit of a centre with probability --noise, for
items and queries alike; "uniform" is random; "duplicates" has 5,000 distinct codes with Zipf-distributed frequencies.

With --disk there are no peers. `BitFlipIndex.build` builds an index in a folder from chunks of a million codes, each
with its own seed, so more can be indexed than memory holds. The output is the time and space of the build, and the time
of queries to the mapped index. Some of their hits are compared with brute force over all codes, generated again. (This
file is long because both modes share workloads and options.)
"""

import argparse
import json
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import faiss
import numpy as np

from hashret.codes import hamming
from hashret.indexes import BitFlipIndex, set_threads, tables

Array = np.ndarray[Any, Any]
Search = Callable[[Array], Array]  # the distances found, (q, k), or all of them one after another
PARTS, ROUND_SECONDS = 5, 0.2  # parts of the queries; seconds for each engine in a round
CHUNK, CHECKED, MAX_SECONDS = 1 << 20, 10, 60.0  # codes generated at once; queries checked; seconds per batch size


class Result(NamedTuple):
    name: str
    build: float  # seconds
    micros: float  # per query
    recall: float  # share of the k true nearest distances, or of the items within the radius


def workload(name: str, items: int, queries: int, bits: int, noise: float, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    width = bits // 8
    if name == "uniform":
        return rng.integers(0, 256, (items, width), np.uint8), rng.integers(0, 256, (queries, width), np.uint8)
    if name == "duplicates":
        distinct = rng.integers(0, 256, (5000, width), np.uint8)
        shares = 1 / np.arange(1, 5001)
        drawn = rng.choice(5000, items + queries, p=shares / shares.sum())
        return distinct[drawn[:items]], distinct[drawn[items:]]
    centres = rng.integers(0, 256, (max(1000, items // 500), width), np.uint8)
    codes = centres[rng.integers(0, len(centres), items + queries)]
    for begin in range(0, len(codes), 1 << 17):
        part = codes[begin : begin + (1 << 17)]
        part ^= np.packbits(rng.random((len(part), bits), np.float32) < noise, axis=1)
    return codes[:items], codes[items:]


def flat(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    index = faiss.IndexBinaryFlat(options.bits)
    index.add(codes)
    if options.radius is None:
        yield "FAISS BinaryFlat", lambda q: index.search(q, options.k)[0]
    else:  # FAISS excludes the radius itself
        yield "FAISS BinaryFlat", lambda q: index.range_search(q, options.radius + 1)[1]


def bitflip(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    index = BitFlipIndex(options.bits)
    index.add(codes, np.arange(len(codes)))
    if options.radius is None:
        yield "BitFlipIndex", lambda q: index.search(q, options.k).distances
    else:
        yield "BitFlipIndex", lambda q: index.within(q, options.radius).distances


def scan(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    before, tables.MIN_CODES = tables.MIN_CODES, len(codes) + 1
    for _, search in bitflip(codes, options):
        tables.MIN_CODES = before
        yield "our scan", search


def reading(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    words = codes.reshape(-1).view(np.uint64 if options.bits % 64 == 0 else np.uint8)

    def read(queries: Array) -> Array:
        for _ in queries:
            words.max()
        return np.empty(0)

    if options.batch == 1:  # a larger batch reads them once for all its queries
        yield "reading the codes", read


def tuned(settings: Any, name: str, value: int, options: argparse.Namespace, index: Any = None) -> Search:
    """Return the search of a FAISS index with one of its settings; missing hits get a distance above all others."""
    index = index or settings

    def search(queries: Array) -> Array:
        setattr(settings, name, value)
        if options.radius is not None:
            found: Array = index.range_search(queries, options.radius + 1)[1]
            return found
        distances, ids = index.search(queries, options.k)
        return np.where(ids < 0, options.bits + 1, distances)

    return search


def multi_hash(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    width = min(20, options.bits)
    index = faiss.IndexBinaryMultiHash(options.bits, options.bits // width, width)
    index.add(codes)
    for nflip in (1, 2):
        yield f"FAISS MultiHash nflip {nflip}", tuned(index, "nflip", nflip, options)


def binary_hash(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    index = faiss.IndexBinaryHash(options.bits, min(20, options.bits))
    index.add(codes)
    for nflip in (2, 3):
        yield f"FAISS BinaryHash nflip {nflip}", tuned(index, "nflip", nflip, options)


def lists(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    quantizer = faiss.IndexBinaryFlat(options.bits)
    count = 1024 if len(codes) < 4_000_000 else 4096
    index = faiss.IndexBinaryIVF(quantizer, options.bits, count)
    index.train(codes[: 64 * count])
    index.add(codes)
    for nprobe in (4, 8, 32, 128):
        yield f"FAISS BinaryIVF nprobe {nprobe}", tuned(index, "nprobe", nprobe, options)


def graph(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    index = faiss.IndexBinaryHNSW(options.bits, 16)
    index.add(codes)
    for links in (64, 256):
        yield f"FAISS BinaryHNSW ef {links}", tuned(index.hnsw, "efSearch", links, options, index)


def usearch(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    from usearch.index import Index

    index = Index(ndim=options.bits, metric="hamming", dtype="b1")
    index.add(np.arange(len(codes)), codes, threads=options.threads)

    for expansion in (64, 256):

        def search(queries: Array, expansion: int = expansion) -> Array:
            index.expansion_search = expansion
            found = index.search(queries, options.k, threads=options.threads)
            return np.reshape(found.distances, (len(queries), -1)).astype(np.int32)

        yield f"usearch b1 expansion {expansion}", search


def pynear(codes: Array, options: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by the library as it is loaded
    from pynear import MIHBinaryIndex

    index = MIHBinaryIndex(options.bits // 16)
    index.set(codes)
    for radius in (7, 11):

        def search(queries: Array, radius: int = radius) -> Array:
            _, distances = index.searchKNN_arrays(queries, options.k, radius)
            return np.asarray(distances)

        yield f"pynear MIH radius {radius}", search


PEERS = {
    "scan": scan,
    "reading": reading,
    "multihash": multi_hash,
    "hash": binary_hash,
    "ivf": lists,
    "hnsw": graph,
    "usearch": usearch,
    "pynear": pynear,
}
RANGES = ("scan", "ivf")  # peers that search within a radius
SELECTIVE = ("multihash", "hash", "pynear")  # on other workloads their buckets are empty or hold everything


def timed(searches: list[Search], queries: Array, batch: int) -> list[float]:
    """Return the microseconds per query of each search: the mean over the parts of the best pass over each."""
    parts, best = np.array_split(queries, PARTS), np.full((len(searches), PARTS), np.inf)
    turns = [cycle(range(PARTS)) for _ in searches]
    for _ in range(PARTS):  # rounds, so that even a slow engine searches every part
        for number, search in enumerate(searches):
            start = time.perf_counter()
            for turn in turns[number]:
                start = time.perf_counter()
                for begin in range(0, len(parts[turn]), batch):
                    search(parts[turn][begin : begin + batch])
                end = time.perf_counter()
                best[number, turn] = min(best[number, turn], (end - start) / len(parts[turn]) * 1e6)
                if end - start > ROUND_SECONDS:
                    break
    return list(best.mean(axis=1))


def recall(found: Array, truth: Array, options: argparse.Namespace) -> float:
    if options.radius is not None:
        return len(found) / len(truth) if len(truth) else 1.0
    return float((found <= truth[:, -1:]).sum() / truth.size) if found.size else np.nan


def chunks(options: argparse.Namespace) -> Iterator[tuple[Array, Array, Array]]:
    """Yield the codes and ids of each chunk, and queries near its codes; the same at each call."""
    for number, begin in enumerate(range(0, options.items, CHUNK)):
        size = min(CHUNK, options.items - begin)
        codes, queries = workload(options.workload, size, 200, options.bits, options.noise, number)
        yield codes, np.arange(begin, begin + size), queries


@contextmanager
def disk_usage(folder: Path) -> Iterator[list[int]]:
    """Record the bytes that a folder takes on the disk, ten times a second."""
    sizes: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        stopped = False
        while not stopped:
            stopped = stop.wait(0.1)
            with suppress(FileNotFoundError):  # deleted meanwhile
                sizes.append(sum(path.stat().st_blocks * 512 for path in folder.rglob("*")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def brute_force(queries: Array, options: argparse.Namespace) -> Array:
    """Return the k nearest of each query as distance << 40 | id, by comparing it with every code of every chunk."""
    best: list[Array] = [np.empty(0, np.int64)] * len(queries)
    for codes, ids, _ in chunks(options):
        for q, query in enumerate(queries):
            distances = hamming(query[None], codes)[0].astype(np.int64)
            farthest = best[q][-1] >> 40 if len(best[q]) == options.k else options.bits
            near = np.flatnonzero(distances <= farthest)
            best[q] = np.sort(np.concatenate([best[q], distances[near] << 40 | ids[near]]))[: options.k]
    return np.array(best)


def latency(index: BitFlipIndex, queries: Array, batch: int, k: int) -> tuple[float, float]:
    """Return the median and the 99th percentile of the microseconds per query in batches."""
    times: list[float] = []
    start = time.perf_counter()
    for begin in range(0, len(queries), batch):
        start = time.perf_counter()
        index.search(queries[begin : begin + batch], k)
        end = time.perf_counter()
        times.append((end - start) / len(queries[begin : begin + batch]) * 1e6)
        if end - start > MAX_SECONDS:
            break
    return float(np.median(times)), float(np.percentile(times, 99))


def on_disk(options: argparse.Namespace) -> dict[str, float]:
    """Build an index in the folder, search it, check it and delete it; return the measurements by name and unit."""
    generating, sample = 0.0, []

    def batches() -> Iterator[tuple[Array, Array]]:
        nonlocal generating
        start = time.perf_counter()
        for number, (codes, ids, queries) in enumerate(chunks(options)):
            generating += time.perf_counter() - start
            if number < 10:
                sample.append(queries)
            yield codes, ids
            start = time.perf_counter()

    results: dict[str, float] = {}
    with TemporaryDirectory(dir=options.disk) as folder:
        path = Path(folder) / "index"
        with disk_usage(path.parent) as sizes:
            start = time.perf_counter()
            index = BitFlipIndex.build(path, options.bits, batches())
            seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        results |= {
            "build s": seconds - generating,
            "making the codes s": generating,
            "file GB": path.stat().st_size / 1e9,
        }
        results |= {"most on the disk GB": max(sizes) / 1e9, "most in memory GB": memory / 1e9}
        queries = np.random.default_rng(0).permutation(np.concatenate(sample))
        results["first query ms"] = latency(index, queries[:1], 1, options.k)[0] / 1e3
        main = index._state.main
        for array in (main.signatures if len(main.signatures) else main.postings, main.codes):
            array.max(initial=0)  # read from the disk before anything else is timed
        for batch in (1, options.batch):
            latency(index, queries, batch, options.k)
            median, slow = latency(index, queries, batch, options.k)
            results |= {f"batches of {batch}: median µs/query": median, f"batches of {batch}: 99th percentile": slow}
        hits = index.search(queries[:CHECKED], options.k)
    if not np.array_equal(hits.distances.astype(np.int64) << 40 | hits.ids, brute_force(queries[:CHECKED], options)):
        raise SystemExit("BitFlipIndex is not exact")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--workload", choices=["clustered", "uniform", "duplicates"], default="clustered")
    parser.add_argument("--noise", type=float, default=0.06)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--radius", type=int, help="search for all items within it, not for the k nearest")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--queries", type=int, help="number of queries: by default five batches, and 200 at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default=",".join(PEERS), help="some of these, separated by commas")
    parser.add_argument("--disk", metavar="FOLDER", help="build an index in this folder and search it, without peers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    peers = options.peers.split(",") if options.peers else []
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peer: {', '.join(sorted(unknown))}")
    if options.queries is not None and options.queries < PARTS:
        parser.error(f"--queries must be at least {PARTS}, the number of parts that are timed")
    if options.disk is not None and options.radius is not None:
        parser.error("--disk searches for the k nearest, not within a radius")
    faiss.omp_set_num_threads(options.threads)
    set_threads(options.threads)
    count = options.queries or PARTS * max(options.batch, 40)
    items = options.items if options.disk is None else min(options.items, CHUNK)
    codes, queries = workload(options.workload, items, count, options.bits, options.noise)
    for _, search in bitflip(codes[:20_000], options):
        search(queries[:2])  # compile or load the kernels before anything is timed
    if options.disk is not None:
        figures = on_disk(options)
        lines = [f"{name:36}{value:12.2f}" for name, value in figures.items()]
        print(json.dumps({**vars(options), "results": figures}) if options.json else "\n".join(lines))
        return

    truth, results, searches, notes = np.empty(0), [], [], []
    for name, engine in {"flat": flat, "bitflip": bitflip, **{name: PEERS[name] for name in peers}}.items():
        if (options.radius is not None and name in set(PEERS) - set(RANGES)) or (
            options.workload != "clustered" and name in SELECTIVE
        ):
            continue
        start = time.perf_counter()
        try:
            for name, search in engine(codes, options):
                build = time.perf_counter() - start
                found = np.concatenate(
                    [search(part) for part in np.split(queries, range(options.batch, count, options.batch))]
                )
                truth = found if engine is flat else truth
                if engine is bitflip and not np.array_equal(np.sort(found, axis=None), np.sort(truth, axis=None)):
                    raise SystemExit("BitFlipIndex is not exact: nothing was timed")
                results.append(Result(name, build, 0.0, recall(found, truth, options)))
                searches.append(search)
        except ImportError as error:
            notes.append(f"without {name}: {error}")
    times = timed(searches, queries, options.batch)
    results = [result._replace(micros=micros) for result, micros in zip(results, times, strict=True)]

    rows = [{**result._asdict(), "ratio": results[0].micros / result.micros} for result in results]
    if options.json:
        machine = platform.processor() or platform.machine()
        print(json.dumps({**vars(options), "machine": machine, "results": rows, "notes": notes}))
        return
    print(
        f"{options.items:,} x {options.bits} bits, {options.workload}"
        + (f" {options.noise}" if options.workload == "clustered" else "")
        + (f", k = {options.k}" if options.radius is None else f", within {options.radius}")
        + f", batches of {options.batch}, threads: {options.threads}"
    )
    print(f"{'':26}{'build s':>9}{'µs/query':>11}{'recall':>9}{'ratio':>9}")
    for row in rows:
        print(f"{row['name']:26}{row['build']:9.2f}{row['micros']:11.2f}{row['recall']:9.4f}{row['ratio']:8.1f}x")
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()
