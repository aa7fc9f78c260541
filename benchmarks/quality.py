"""Precision of 10 neighbours of codes learned without labels, for several models in one run.

    python benchmarks/quality.py --train train-images-idx3-ubyte.gz --test t10k-images-idx3-ubyte.gz

Protocol: every model learns from the training images and codes them; every test image is a query, and a neighbour is
right if it has the query's label. Ties in distance are broken by position. Labels only score.
"""

import argparse
import json

import numpy as np

from hashret import Hasher
from hashret.evaluation import precision
from hashret.indexes import BitFlipIndex
from hashret.sources import open_source


def load(source: str) -> tuple[list[object], np.ndarray]:
    records = [(record.read(), record.label) for record in open_source(source)]
    return [content for content, _ in records], np.array([label for _, label in records])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="a data set by name, of which :train and :test are used")
    parser.add_argument("--train", help="a labelled source instead")
    parser.add_argument("--test", help="a labelled source instead")
    parser.add_argument("--models", default="lsh,pca,itq,ae,denoising,vae,binary,contrastive")
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--budget", default="20s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    train, test = asked.train or f"{asked.data}:train", asked.test or f"{asked.data}:test"
    database, labels = load(train)
    queries, wanted = load(test)
    rows = []
    for model in asked.models.split(","):
        hasher = Hasher(model, asked.bits).fit(train, budget=asked.budget, seed=asked.seed)
        index = BitFlipIndex(asked.bits)
        index.add(hasher.encode(database), np.arange(len(database)))
        hits = index.search(hasher.encode(queries), asked.k)
        told = hasher.training
        row = {"model": model, "head": hasher.head, "bits": asked.bits, "seconds": told.get("seconds", 0)}
        row |= {"steps": told.get("steps", 0), "distinct": told["distinct_codes"], "images": told["images"]}
        rows.append(row | {"precision": precision(labels[hits.ids] == wanted[:, None])})
        if not asked.json:
            if len(rows) == 1:
                print(f"{asked.bits} bits, {len(database):,} images, {len(queries):,} queries, seed {asked.seed}")
                print(f"{'model':14}{'head':8}{'steps':>8}{'seconds':>9}{'distinct':>10}{f'precision@{asked.k}':>14}")
            told = rows[-1]
            print(
                f"{model:14}{told['head']:8}{told['steps']:>8,}{told['seconds']:>9.0f}{told['distinct']:>10,}"
                f"{told['precision']:>14.4f}",
                flush=True,
            )
    if asked.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
