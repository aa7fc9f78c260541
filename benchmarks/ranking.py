"""What it brings, and costs, to order the nearest by how sure a query is of its bits (`rank="asymmetric"`).

    python benchmarks/ranking.py --train train-images-idx3-ubyte.gz

Protocol: of the images of --train, --queries are drawn at random and held out; the model learns from all others, which
a collection then holds. Each query asks for its 100 nearest in either order. Right are those of its label, which is
used for nothing else; the average precision is that of the list of 100, over the right ones in it. Times are of whole
queries of 10 through `Collection`, from pixels to paths, in processor time, which a busy machine changes little.
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
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    records = [(record.read(), record.label) for record in open_source(asked.train)]
    order = np.random.default_rng(asked.seed).permutation(len(records))
    images, labels = np.stack([records[i][0] for i in order]), np.array([records[i][1] for i in order])
    queries, images = images[: asked.queries], images[asked.queries :]
    wanted, labels = labels[: asked.queries], labels[asked.queries :]
    if not asked.json:
        print(f"{len(images):,} images, {len(queries):,} queries, seed {asked.seed}, {asked.steps} steps")
        head = f"{'precision@10':>14}{'precision@100':>15}{'mAP@100':>9}{'µs alone':>10}{'µs of 200':>11}"
        print(f"{'model':14}{'bits':>5}  {'rank':12}{head}")
    rows = []
    for model in asked.models.split(","):
        for bits in map(int, asked.bits.split(",")):
            hasher = Hasher(model, bits).fit(images, steps=asked.steps, seed=asked.seed)
            with tempfile.TemporaryDirectory() as folder, Collection.create(Path(folder) / "c", hasher) as collection:
                collection.index(images)
                for rank in RANKS:
                    found = collection.query_batch(queries, 100, rank=rank)
                    # An item's path ends in its row; equal images are one item, of one label as a rule.
                    near = [[labels[int(hit.path.rpartition("#")[2])] for hit in hits] for hits in found]
                    right = np.array(near) == wanted[:, None]
                    row: dict[str, Any] = {"model": model, "bits": bits, "rank": rank}
                    row |= {f"precision@{k}": precision(right[:, :k]) for k in (10, 100)}
                    some = right[right.any(1)]
                    row["map@100"] = (
                        float(average_precision(np.ones_like(some, int), some).mean()) * len(some) / len(right)
                    )
                    row["us_alone"] = timed(collection, queries[:100], 1, rank)
                    row["us_together"] = timed(collection, queries, 200, rank)
                    rows.append(row)
                    if not asked.json:
                        told = f"{row['precision@10']:>14.4f}{row['precision@100']:>15.4f}{row['map@100']:>9.4f}"
                        told += f"{row['us_alone']:>10,.0f}{row['us_together']:>11,.0f}"
                        print(f"{model:14}{bits:>5}  {rank:12}{told}", flush=True)
    if asked.json:
        print(json.dumps(rows))


def timed(collection: Collection, queries: np.ndarray, size: int, rank: str) -> float:
    """Microseconds of all threads together for a query, in batches of that size."""
    collection.query_batch(queries[:size], rank=rank)
    began = time.process_time()
    for start in range(0, len(queries), size):
        collection.query_batch(queries[start : start + size], rank=rank)
    return 1e6 * (time.process_time() - began) / len(queries)


if __name__ == "__main__":
    main()
