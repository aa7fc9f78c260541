"""Exact search in Hamming space beside its peers: microseconds per query, build time, recall.

    python benchmarks/search.py --items 1000000 --bits 64 --noise 0.06 --threads 1

Every answer of an exact index is compared with FAISS BinaryFlat by distance before anything is timed. Each line is the
best of several passes over different queries, in batches of --batch; the ratio is BinaryFlat's time over ours or a
peer's in the same run. Workloads: "clustered" draws max(1000, items / 500) centres and flips each bit of a centre with
probability --noise, for items and queries alike; "uniform" is random; "duplicates" has 5,000 distinct codes whose
sizes follow Zipf's law.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import faiss
import numpy as np

from hashret.indexes import BitFlipIndex, set_threads

Array = np.ndarray[Any, Any]
PASSES = 5


class Result(NamedTuple):
    name: str
    build: float  # seconds
    micros: float  # per query
    recall: float  # share of the k true nearest distances


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


def timed(search: Callable[[Array], Array], queries: Array, batch: int, truth: Array) -> tuple[float, float]:
    """Microseconds per query, the best of several passes, and recall by distance."""
    found = np.concatenate([search(queries[begin : begin + batch]) for begin in range(0, len(queries), batch)])
    recall = float((found <= truth[:, -1:]).mean())
    best = np.inf
    for part in np.array_split(queries, PASSES):
        start = time.perf_counter()
        for begin in range(0, len(part), batch):
            search(part[begin : begin + batch])
        best = min(best, (time.perf_counter() - start) / len(part))
    return best * 1e6, recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--workload", choices=["clustered", "uniform", "duplicates"], default="clustered")
    parser.add_argument("--noise", type=float, default=0.06)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    set_threads(options.threads)
    count = PASSES * max(options.batch, 40)
    codes, queries = workload(options.workload, options.items, count, options.bits, options.noise)
    k, results = options.k, []

    flat = faiss.IndexBinaryFlat(options.bits)
    start = time.perf_counter()
    flat.add(codes)
    build = time.perf_counter() - start
    truth = flat.search(queries, k)[0]
    results.append(
        Result("FAISS BinaryFlat", build, *timed(lambda q: flat.search(q, k)[0], queries, options.batch, truth))
    )

    table_bits = min(20, options.bits)
    multi = faiss.IndexBinaryMultiHash(options.bits, options.bits // table_bits, table_bits)
    multi.nflip = 1
    start = time.perf_counter()
    multi.add(codes)
    build = time.perf_counter() - start

    def search_multi(q: Array) -> Array:
        distances, ids = multi.search(q, k)
        return np.where(ids < 0, options.bits + 1, distances)

    if options.workload == "clustered":  # elsewhere its buckets are empty or hold everything
        results.append(Result("FAISS MultiHash", build, *timed(search_multi, queries, options.batch, truth)))

    warm = BitFlipIndex(options.bits)  # kernels compiled or loaded before anything is timed
    warm.add(codes[:20_000], np.arange(len(codes[:20_000])))
    warm.search(queries[:2], k)
    ours = BitFlipIndex(options.bits)
    start = time.perf_counter()
    ours.add(codes, np.arange(len(codes)))
    build = time.perf_counter() - start
    if not np.array_equal(ours.search(queries, k).distances, truth):
        raise SystemExit("BitFlipIndex is not exact: nothing was timed")
    results.append(
        Result("BitFlipIndex", build, *timed(lambda q: ours.search(q, k).distances, queries, options.batch, truth))
    )

    rows = [{**result._asdict(), "ratio": results[0].micros / result.micros} for result in results]
    if options.json:
        print(json.dumps({**vars(options), "machine": platform.processor() or platform.machine(), "results": rows}))
        return
    print(
        f"{options.items:,} x {options.bits} bits, {options.workload}"
        + (f" {options.noise}" if options.workload == "clustered" else "")
        + f", k = {k}, batches of {options.batch}, threads: {options.threads}"
    )
    print(f"{'':18}{'build s':>9}{'µs/query':>11}{'recall':>9}{'ratio':>9}")
    for row in rows:
        print(f"{row['name']:18}{row['build']:9.2f}{row['micros']:11.2f}{row['recall']:9.4f}{row['ratio']:8.1f}x")


if __name__ == "__main__":
    main()
