"""Measure images per second of `Collection.index`, of decoding alone and of the forward pass of the same model alone.

    python benchmarks/encode.py --arrays train-images-idx3-ubyte.gz --photos photos.tar.gz

All three use all cores and alternate `--repeats` times; medians are printed. During indexing, decoding and the model
share the cores, so the upper bound for photos is 1 / (1/decode + 1/forward), and for arrays the forward pass. The share
of this bound is printed. Codes in the collection are compared with those of the forward pass.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hashret import Collection, Hasher
from hashret.data.sources import open_source
from hashret.parallel import ordered_map
from hashret.runtime import batch_slices
from hashret.runtime.inputs import default_device, to_input


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def forward(hasher: Hasher, pixels: np.ndarray) -> None:
    """Compute the outputs of all images in batches, the minimum that encoding has to compute."""
    member = hasher.member
    with torch.inference_mode():
        for rows in batch_slices(pixels):
            member.outputs(to_input(pixels[rows], default_device()))


def measure(source: str | np.ndarray, steps: int, repeats: int, decoded: bool) -> dict[str, float]:
    hasher = Hasher().fit(source, steps=steps)
    contents = [record.read() for record in open_source(source)]
    pixels = np.stack([hasher.preprocessing(content).pixels for content in contents])
    times: dict[str, list[float]] = {"decode": [], "forward": [], "index": []}
    for _ in range(repeats):
        if decoded:
            times["decode"].append(seconds(lambda: [None for _ in ordered_map(hasher.preprocessing, contents)]))
        times["forward"].append(seconds(lambda: forward(hasher, pixels)))
        with tempfile.TemporaryDirectory() as folder, Collection.create(Path(folder) / "c", hasher) as collection:
            collection.query_codes(hasher.encode_pixels(pixels[:1]))  # loads everything that the first query needs
            times["index"].append(seconds(lambda: collection.index(source)))
            assert collection.info()["paths"] == len(pixels), "some images were not indexed"
            answers = collection.query_codes(hasher.encode_pixels(pixels[:100]), k=1)
            assert all(hits[0].distance == 0 for hits in answers), (
                "codes in the collection differ from those of the forward pass"
            )
    rates = {name: len(pixels) / statistics.median(values) for name, values in times.items() if values}
    bound = 1 / (1 / rates["decode"] + 1 / rates["forward"]) if decoded else rates["forward"]
    return rates | {"bound": bound, "share": rates["index"] / bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", default="fashion-mnist:train", help="a source of arrays")
    parser.add_argument("--photos", help="a source of image files")
    parser.add_argument(
        "--steps", type=int, default=20, help="training steps of the default model; speed does not depend on them"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = {}
    arrays = np.stack([record.read() for record in open_source(args.arrays)])
    rows["arrays"] = measure(arrays, args.steps, args.repeats, decoded=False)
    if args.photos:
        rows["photos"] = measure(args.photos, args.steps, args.repeats, decoded=True)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"images per second, {torch.get_num_threads()} threads")
    print(f"{'':8}{'decode':>10}{'forward':>10}{'index':>10}{'of bound':>10}")
    for name, row in rows.items():
        decode = f"{row['decode']:>10,.0f}" if "decode" in row else f"{'–':>10}"
        print(f"{name:8}{decode}{row['forward']:>10,.0f}{row['index']:>10,.0f}{row['share']:>10.2f}")


if __name__ == "__main__":
    main()
