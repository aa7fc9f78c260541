"""Measure the precision and the cost of ranking hits by asymmetric distance (`rank="asymmetric"`).

    python benchmarks/ranking.py --train train-images-idx3-ubyte.gz

Protocol: --queries random images of --train are held out. The model is trained on all others without labels, and a
collection indexes them. Each query returns its 100 nearest images by either rank. Hits with the label of the query are
relevant. The average precision is that of the 100 hits, relative to the relevant ones among them. Times are of queries
with k = 10 through `Collection`, from pixels to paths, in CPU time, which other load on the machine changes little.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hashret import Collection, Hasher
from hashret.data.sources import open_source
from hashret.evaluation.measures import average_precision, precision
from hashret.results import RANKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="digits", help="a labelled source of arrays")
    parser.add_argument("--models", default="contrastive,itq")
    parser.add_argument("--bits", default="32,64")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500, help="training steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    records = [(record.read(), record.label) for record in open_source(options.train)]
    order = np.random.default_rng(options.seed).permutation(len(records))
    images, labels = np.stack([records[i][0] for i in order]), np.array([records[i][1] for i in order])
    queries, images = images[: options.queries], images[options.queries :]
    query_labels, labels = labels[: options.queries], labels[options.queries :]
    if not options.json:
        print(f"{len(images):,} images, {len(queries):,} queries, seed {options.seed}, {options.steps} steps")
        head = f"{'precision@10':>14}{'precision@100':>15}{'mAP@100':>9}{'µs alone':>10}{'µs of 200':>11}"
        print(f"{'model':14}{'bits':>5}  {'rank':12}{head}")
    rows = []
    for model in options.models.split(","):
        for bits in map(int, options.bits.split(",")):
            hasher = Hasher(model, bits).fit(images, steps=options.steps, seed=options.seed)
            with tempfile.TemporaryDirectory() as folder, Collection.create(Path(folder) / "c", hasher) as collection:
                collection.index(images)
                for rank in RANKS:
                    results = collection.query_batch(queries, 100, rank=rank)
                    # The path of an item ends in its row. Equal images are one item, nearly always of one label.
                    hit_labels = [[labels[int(hit.path.rpartition("#")[2])] for hit in hits] for hits in results]
                    relevant = np.array(hit_labels) == query_labels[:, None]
                    row: dict[str, Any] = {"model": model, "bits": bits, "rank": rank}
                    row |= {f"precision@{k}": precision(relevant[:, :k]) for k in (10, 100)}
                    nonempty = relevant[relevant.any(1)]
                    row["map@100"] = (
                        float(average_precision(np.ones_like(nonempty, int), nonempty).mean())
                        * len(nonempty)
                        / len(relevant)
                    )
                    row["us_alone"] = timed(collection, queries[:100], 1, rank)
                    row["us_together"] = timed(collection, queries, 200, rank)
                    rows.append(row)
                    if not options.json:
                        line = f"{row['precision@10']:>14.4f}{row['precision@100']:>15.4f}{row['map@100']:>9.4f}"
                        line += f"{row['us_alone']:>10,.0f}{row['us_together']:>11,.0f}"
                        print(f"{model:14}{bits:>5}  {rank:12}{line}", flush=True)
    if options.json:
        print(json.dumps(rows))


def timed(collection: Collection, queries: np.ndarray, size: int, rank: str) -> float:
    """Return the CPU microseconds of all threads per query, in batches of this size."""
    collection.query_batch(queries[:size], rank=rank)
    start = time.process_time()
    for start in range(0, len(queries), size):
        collection.query_batch(queries[start : start + size], rank=rank)
    return 1e6 * (time.process_time() - start) / len(queries)


if __name__ == "__main__":
    main()
