"""All near-duplicates among many codes: seconds with the index, compared with comparing all pairs of codes.

    python benchmarks/dupes.py --items 1000000 --bits 64 --radius 3 --threads 2
    python benchmarks/dupes.py --workload duplicates

The workloads are those of `search.py`. "naive" is the time of comparing a sample of the codes with all codes, in one
thread by 64-bit words, scaled to all codes and halved, because each pair is compared once. Before anything is timed,
the groups of a smaller workload are compared with those of brute force. Afterwards the neighbours of the sample, found
by brute force, must be in its groups.
"""

import argparse
import json
import resource
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from hashret.codes import hamming
from hashret.collection.grouping import cluster_members, single_linkage, star_clustering
from hashret.indexes import set_threads

Array = np.ndarray[Any, Any]
SMALL = 3000  # codes whose groups are compared with brute force


def check_small(codes: Array, radius: int) -> None:
    """Raise SystemExit unless the groups of these codes are those of brute force."""
    near = hamming(codes, codes) <= radius
    chains = connected_components(near, directed=False)[1]
    centres, free = np.full(len(codes), -1), np.ones(len(codes), np.bool_)
    for i in range(len(codes)):  # the order of preference
        if free[i]:
            centres[near[i] & free] = i
            free &= ~near[i]
    for found, truth in (
        (single_linkage(codes, radius), chains),
        (star_clustering(codes, radius, np.arange(len(codes))), centres),
    ):
        pairs = len(np.unique(np.stack([found, truth]), axis=1).T)
        if not pairs == len(np.unique(found)) == len(np.unique(truth)):
            raise SystemExit("the groups are not those of brute force: nothing was timed")


def naive(codes: Array, sample: Array, radius: int) -> tuple[float, list[Array]]:
    """Return the seconds of comparing a sample of the codes with all codes, and the rows within the radius of each."""
    words = np.ascontiguousarray(codes).view(np.uint64 if codes.shape[1] % 8 == 0 else np.uint8)
    start = time.perf_counter()
    found = [np.flatnonzero(np.bitwise_count(words ^ word).sum(1, dtype=np.int32) <= radius) for word in words[sample]]
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="clustered", choices=["clustered", "uniform", "duplicates"])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.06)
    parser.add_argument("--radius", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    set_threads(options.threads)
    workload = runpy.run_path(str(Path(__file__).with_name("search.py")))["workload"]
    check_small(workload(options.workload, SMALL, 0, options.bits, options.noise)[0], options.radius)
    codes, _ = workload(options.workload, options.items, 0, options.bits, options.noise)

    single_linkage(codes[:20_000], options.radius)  # compile or load the kernels before anything is timed

    sample = np.random.default_rng(1).choice(options.items, min(options.sample, options.items), replace=False)
    seconds, neighbours = naive(codes, sample, options.radius)
    whole = seconds * options.items / len(sample) / 2
    pairs = sum(len(rows) - 1 for rows in neighbours) * options.items / len(sample) / 2
    rank = np.arange(options.items)
    lines = []
    for name, find in (
        ("connected", lambda: single_linkage(codes, options.radius)),
        ("star", lambda: star_clustering(codes, options.radius, rank)),
    ):
        start = time.perf_counter()
        numbers = find()
        found = cluster_members(numbers, rank)
        elapsed = time.perf_counter() - start
        if name == "connected" and not all(
            (numbers[rows] == numbers[row]).all() for row, rows in zip(sample, neighbours, strict=True)
        ):
            raise SystemExit("neighbours are in different groups")
        grouped_items = sum(map(len, found))
        lines.append(
            {"by": name, "seconds": elapsed, "ratio": whole / elapsed, "groups": len(found), "items": grouped_items}
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.json:
        summary = {"naive_seconds": whole, "pairs": pairs, "peak_MB": peak, "results": lines}
        print(json.dumps(vars(options) | summary))
        return
    noise = f" {options.noise}" if options.workload == "clustered" else ""
    print(
        f"{options.items:,} x {options.bits} bits, {options.workload}{noise}, radius {options.radius}, "
        f"threads: {options.threads}"
    )
    print(f"about {pairs:,.0f} pairs; naive, from {len(sample)} codes: {whole:,.0f} s; peak memory {peak:,.0f} MB")
    print(f"{'by':12}{'seconds':>9}{'ratio':>9}{'groups':>10}{'in them':>12}")
    for line in lines:
        figures = f"{line['seconds']:9.2f}{line['ratio']:8.0f}x{line['groups']:10,}{line['items']:12,}"
        print(f"{line['by']:12}{figures}")


if __name__ == "__main__":
    main()
