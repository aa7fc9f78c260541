"""Measure the recall of nearest vectors by short codes, beside FAISS with codes of equal size.

    python benchmarks/vectors.py --vectors embeddings.npy
    python benchmarks/vectors.py --images train-images-idx3-ubyte.gz

Protocol: --queries vectors are drawn at random and held out; every method is fitted to all others and encodes them. The
ground truth is the 10 nearest vectors by Euclidean distance (with --normalise, by cosine). `recall` is the share of
these among the 10 nearest by Hamming distance, with ties in the order of rows. `by query` is the share by asymmetric
distance, for which the query is not encoded: hashret with `rank="asymmetric"`, and product quantisation.
Without --vectors, vectors are made from --images: the leading principal components, each divided by the square root of
its standard deviation (half-whitened), so that their spectrum decays about as slowly as that of embeddings. Figures for
embeddings of CLIP or DINO will differ.
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
Answer = tuple[NDArray[Any] | None, NDArray[Any] | None]  # ids of the K nearest by codes, and by asymmetric distance


def half_whitened(args: argparse.Namespace) -> tuple[Vectors, str]:
    """Return the half-whitened leading principal components of the images, and their description."""
    images = sample(open_source(args.images), limit=args.limit, seed=args.seed).images
    pixels = images.reshape(len(images), -1).astype(np.float32) / 255
    pixels -= pixels.mean(0)
    variances, directions = np.linalg.eigh(pixels.T @ pixels / len(pixels))
    variances, directions = variances[: -args.numbers - 1 : -1], directions[:, : -args.numbers - 1 : -1]
    description = f"half-whitened principal components of {len(images):,} images of {args.images}"
    return (pixels @ directions / np.maximum(variances, 1e-6) ** 0.25).astype(np.float32), description


def nearest(vectors: Vectors, queries: Vectors) -> NDArray[np.int64]:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    return np.asarray(index.search(queries, K)[1])


def by_hashret(model: str, bits: int, vectors: Vectors, queries: Vectors, args: argparse.Namespace) -> Answer:
    hasher = Hasher(model, bits).fit(vectors, steps=args.steps, seed=args.seed)
    ids, codes = np.arange(len(vectors)), hasher.encode(vectors)
    index = BitFlipIndex(bits)
    index.add(codes, ids)
    codes_of_queries, margins = hasher.margins(queries)
    hits = index.search(codes_of_queries, candidate_count(K) or K)
    near = [Neighbours(*row) for row in zip(hits.distances, hits.ids, strict=True)]
    ranked, _ = rerank(near, codes_of_queries, margins, ids, codes, K)
    return hits.ids[:, :K], np.stack([row for _, row in ranked])


def by_threshold(bits: int, vectors: Vectors, queries: Vectors) -> Answer:
    """Search by one bit per coordinate, which is 1 above the mean of the coordinate."""
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
    """Search by product quantisation with a byte for each of bits / 8 parts of the zero-padded vectors."""
    parts = bits // 8
    missing = -vectors.shape[1] % parts
    vectors, queries = (np.ascontiguousarray(np.pad(x, ((0, 0), (0, missing)))) for x in (vectors, queries))
    index = faiss.IndexPQ(vectors.shape[1], parts, 8)
    index.pq.cp.min_points_per_centroid = 1  # no warning about few vectors
    index.train(vectors)
    index.add(vectors)
    return None, index.search(queries, K)[1]


def recall(ids: NDArray[Any] | None, truth: NDArray[np.int64]) -> float | None:
    if ids is None:
        return None
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, truth, strict=True)]) / K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", help="a .npy or .npz of floats (n, d)")
    parser.add_argument("--images", default="digits", help="a source of images to make vectors from")
    parser.add_argument("--numbers", type=int, default=256, help="dimension of vectors made from images")
    parser.add_argument("--normalise", action="store_true", help="scale vectors to length 1, for cosine similarity")
    parser.add_argument("--models", default="lsh,pca,itq,anchor-graph,contrastive")
    parser.add_argument("--bits", default="64,128,256")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument(
        "--limit", type=int, default=100_000, help="maximum number of vectors or images, drawn at random"
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.vectors:
        all_vectors, description = (
            sample(open_source(args.vectors), limit=args.limit, seed=args.seed).images,
            args.vectors,
        )
    else:
        all_vectors, description = half_whitened(args)
    if args.normalise:
        all_vectors = all_vectors / np.linalg.norm(all_vectors, axis=1, keepdims=True)
    order = np.random.default_rng(args.seed).permutation(len(all_vectors))
    queries, vectors = all_vectors[order[: args.queries]], all_vectors[order[args.queries :]]
    dim = vectors.shape[1]
    truth = nearest(vectors, queries)
    if not args.json:
        print(f"{len(vectors):,} vectors of {dim} numbers ({4 * dim:,} bytes), {len(queries):,} queries: {description}")
        print(f"{'method':24}{'bits':>6}{'bytes':>7}{f'recall@{K}':>11}{'by query':>10}{'seconds':>9}")
    rows = []
    for bits in map(int, args.bits.split(",")):
        methods: dict[str, Callable[[], Answer]] = {
            f"hashret {model}": lambda model=model, bits=bits: by_hashret(model, bits, vectors, queries, args)
            for model in args.models.split(",")
            if model not in ("pca", "itq") or bits <= dim
        }
        if bits == dim:
            methods["one bit a number"] = lambda bits=bits: by_threshold(bits, vectors, queries)
        if bits <= dim:
            methods[f"FAISS ITQ{bits},LSH"] = lambda bits=bits: by_itq_lsh(bits, vectors, queries)
        methods["FAISS PQ"] = lambda bits=bits: by_product(bits, vectors, queries)
        for name, answer in methods.items():
            start = time.monotonic()
            by_code, by_query = (recall(ids, truth) for ids in answer())
            row = {"method": name, "bits": bits, "bytes": bits // 8, "recall": by_code, "by_query": by_query}
            rows.append(row | {"seconds": round(time.monotonic() - start, 1)})
            if not args.json:
                shares = "".join(
                    f"{'' if share is None else f'{share:.3f}':>{w}}" for share, w in ((by_code, 11), (by_query, 10))
                )
                print(f"{name:24}{bits:>6}{bits // 8:>7}{shares}{rows[-1]['seconds']:>9.1f}", flush=True)
    if args.json:
        print(json.dumps({"vectors": description, "n": len(vectors), "numbers": dim, "rows": rows}))


if __name__ == "__main__":
    main()
