"""How many of a vector's nearest ones its code of a few bytes still finds, beside FAISS at equal bytes.

    python benchmarks/vectors.py --vectors embeddings.npy
    python benchmarks/vectors.py --images train-images-idx3-ubyte.gz

Protocol: of the vectors, --queries are drawn at random and held out; every method learns from all others, and codes
them. Right are the 10 others that are nearest by Euclidean distance (after --normalise, by the cosine). `recall` is the
share of these among the 10 nearest by Hamming distance, ties by position; `by query` is the share where the query is
not coded but compared as it is: for hashret the order of `rank="asymmetric"`, for product quantisation its only order.
Without --vectors they are made here, of the --images: their leading principal components, half-whitened, that is each
over the square root of its standard deviation, so that their spectrum falls about as slowly as those of embeddings do.
They are no embeddings of CLIP or DINO, and figures for those will differ.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hashret import Hasher
from hashret.collection.search import candidate_count, rerank
from hashret.collection.snapshot import Neighbours
from hashret.data.sample import sample
from hashret.data.sources import open_source
from hashret.indexes import BitFlipIndex

K = 10
Vectors = NDArray[np.float32]
Answer = tuple[NDArray[Any] | None, NDArray[Any] | None]  # ids of the nearest K by codes, and by the query as it is


def make(asked: argparse.Namespace) -> tuple[Vectors, str]:
    """The leading principal components of the images, each over the square root of its standard deviation."""
    images = sample(open_source(asked.images), limit=asked.limit, seed=asked.seed).images
    pixels = images.reshape(len(images), -1).astype(np.float32) / 255
    pixels -= pixels.mean(0)
    variances, directions = np.linalg.eigh(pixels.T @ pixels / len(pixels))
    variances, directions = variances[: -asked.numbers - 1 : -1], directions[:, : -asked.numbers - 1 : -1]
    told = f"half-whitened principal components of {len(images):,} images of {asked.images}"
    return (pixels @ directions / np.maximum(variances, 1e-6) ** 0.25).astype(np.float32), told


def nearest(vectors: Vectors, queries: Vectors) -> NDArray[np.int64]:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    return np.asarray(index.search(queries, K)[1])


def by_hashret(model: str, bits: int, vectors: Vectors, queries: Vectors, asked: argparse.Namespace) -> Answer:
    hasher = Hasher(model, bits).fit(vectors, steps=asked.steps, seed=asked.seed)
    ids, codes = np.arange(len(vectors)), hasher.encode(vectors)
    index = BitFlipIndex(bits)
    index.add(codes, ids)
    asked_for, margins = hasher.margins(queries)
    hits = index.search(asked_for, candidate_count(K) or K)
    near = [Neighbours(*row) for row in zip(hits.distances, hits.ids, strict=True)]
    ranked, _ = rerank(near, asked_for, margins, ids, codes, K)
    return hits.ids[:, :K], np.stack([row for _, row in ranked])


def by_threshold(bits: int, vectors: Vectors, queries: Vectors) -> Answer:
    """Whether each number is above its mean: as many bits as numbers."""
    mean = vectors.mean(0)
    index = faiss.IndexBinaryFlat(bits)
    index.add(np.packbits(vectors > mean, axis=1))
    return index.search(np.packbits(queries > mean, axis=1), K)[1], None


def by_itq_lsh(bits: int, vectors: Vectors, queries: Vectors) -> Answer:
    index = faiss.index_factory(vectors.shape[1], f"ITQ{bits},LSH")
    index.train(vectors)
    index.add(vectors)
    return index.search(queries, K)[1], None


def by_product(bits: int, vectors: Vectors, queries: Vectors) -> Answer:
    """A byte for each of bits / 8 parts of the numbers, which are filled up with zeros to parts of one length."""
    parts = bits // 8
    missing = -vectors.shape[1] % parts
    vectors, queries = (np.ascontiguousarray(np.pad(x, ((0, 0), (0, missing)))) for x in (vectors, queries))
    index = faiss.IndexPQ(vectors.shape[1], parts, 8)
    index.pq.cp.min_points_per_centroid = 1  # no warning where there are few
    index.train(vectors)
    index.add(vectors)
    return None, index.search(queries, K)[1]


def recall(found: NDArray[Any] | None, truth: NDArray[np.int64]) -> float | None:
    if found is None:
        return None
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", help="a .npy or .npz of floats (n, d)")
    parser.add_argument("--images", default="digits", help="a source to make vectors of instead")
    parser.add_argument("--numbers", type=int, default=256, help="of such a vector")
    parser.add_argument("--normalise", action="store_true", help="to length 1, so that the cosine counts")
    parser.add_argument("--models", default="lsh,pca,itq,anchor-graph,contrastive")
    parser.add_argument("--bits", default="64,128,256")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=100_000, help="vectors or images, drawn at random")
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.vectors:
        everything, told = sample(open_source(asked.vectors), limit=asked.limit, seed=asked.seed).images, asked.vectors
    else:
        everything, told = make(asked)
    if asked.normalise:
        everything = everything / np.linalg.norm(everything, axis=1, keepdims=True)
    order = np.random.default_rng(asked.seed).permutation(len(everything))
    queries, vectors = everything[order[: asked.queries]], everything[order[asked.queries :]]
    numbers = vectors.shape[1]
    truth = nearest(vectors, queries)
    if not asked.json:
        print(
            f"{len(vectors):,} vectors of {numbers} numbers ({4 * numbers:,} bytes), {len(queries):,} queries: {told}"
        )
        print(f"{'method':24}{'bits':>6}{'bytes':>7}{f'recall@{K}':>11}{'by query':>10}{'seconds':>9}")
    rows = []
    for bits in map(int, asked.bits.split(",")):
        methods: dict[str, Callable[[], Answer]] = {
            f"hashret {model}": lambda model=model, bits=bits: by_hashret(model, bits, vectors, queries, asked)
            for model in asked.models.split(",")
            if model not in ("pca", "itq") or bits <= numbers
        }
        if bits == numbers:
            methods["one bit a number"] = lambda bits=bits: by_threshold(bits, vectors, queries)
        if bits <= numbers:
            methods[f"FAISS ITQ{bits},LSH"] = lambda bits=bits: by_itq_lsh(bits, vectors, queries)
        methods["FAISS PQ"] = lambda bits=bits: by_product(bits, vectors, queries)
        for name, answer in methods.items():
            began = time.monotonic()
            by_code, by_query = (recall(found, truth) for found in answer())
            row = {"method": name, "bits": bits, "bytes": bits // 8, "recall": by_code, "by_query": by_query}
            rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
            if not asked.json:
                shares = "".join(
                    f"{'' if share is None else f'{share:.3f}':>{w}}" for share, w in ((by_code, 11), (by_query, 10))
                )
                print(f"{name:24}{bits:>6}{bits // 8:>7}{shares}{rows[-1]['seconds']:>9.1f}", flush=True)
    if asked.json:
        print(json.dumps({"vectors": told, "n": len(vectors), "numbers": numbers, "rows": rows}))


if __name__ == "__main__":
    main()
