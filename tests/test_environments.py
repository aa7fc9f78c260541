"""The same codes with any number of threads, with any of PyTorch's CPU kernels, and in a forked child."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hashret.codes import pack
from hashret.collection import Collection
from hashret.hasher import Hasher
from hashret.heads import Head
from hashret.runtime.rescue import TIE_TOLERANCE

SOAK = "HASHRET_SOAK" in os.environ
DIGITS = (load_digits().images[:300] * 15).astype(np.uint8)
MODELS = {"conv": "vae", "mlp": "ae", "lsh": None, "pca": None, "itq": None}  # by network, or by head
ENVIRONMENTS = [
    {"TORCH_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "NO_ONEDNN": "1", "OPENBLAS_CORETYPE": "Nehalem"},
    {"TORCH_THREADS": "4", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_NUM_THREADS": "4"},
]
LONG_ENVIRONMENTS = [
    *({"TORCH_THREADS": n, "OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n} for n in "124"),
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2", "AVX512_CORE")),
    {"NO_ONEDNN": "1"},
]
ENCODE = """
import hashlib, os, sys
import numpy as np, torch
from hashret.hasher import Hasher

torch.set_num_threads(int(os.environ.get("TORCH_THREADS", 2)))
torch._C._set_mkldnn_enabled("NO_ONEDNN" not in os.environ)
digits = np.load("digits.npy")
for name in sys.argv[1:]:
    hasher = Hasher.load(name)
    outputs = hasher._runtime.outputs(hasher.preprocessing.batch(digits[..., None]))
    print(name, hasher.encode(digits).tobytes().hex(), hashlib.sha256(outputs.tobytes()).hexdigest())
"""
# The child has the threads of its parent in PyTorch's records alone; an alarm kills it if it waits for them.
FORK = """
import os, signal, sys
import numpy as np, torch
from hashret.collection import Collection

torch.set_num_threads(2)
digits = np.load("digits.npy")
with Collection.open("collection", read_only=True) as collection:
    hasher = collection.hasher
    pixels = hasher.preprocessing.batch(np.tile(digits, (4, 1, 1))[..., None])  # too many for one thread
    codes, hits = hasher.encode_pixels(pixels), collection.query_batch(list(digits), 5)
    child = os.fork()
    if not child:
        signal.alarm(60)
        for single_thread in (False, True, False):
            assert (hasher.encode_pixels(pixels, single_thread=single_thread) == codes).all()
        assert collection.query_batch(list(digits), 5) == hits
        with Collection.open("collection") as own:
            assert len(own.add(list(digits[::-1] // 2))) == len(digits)
            assert own.hasher.fit(digits, steps=2).fingerprint
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert collection.query_batch(list(digits), 5)
    assert torch.get_num_threads() == 2
"""


def near_outputs(hasher: Hasher) -> Head:
    """Return the head with threshold j near output j of image j: on it, or by less than float32's rounding above it."""
    head = hasher._parts()[2]
    values = head.project(hasher._runtime.exact(hasher.preprocessing.batch(DIGITS[:32, ..., None])))
    distances = np.resize([0, 1e-7, -1e-7, 1e-6, -1e-6], 32) * head.scale
    return replace(head, threshold=values[range(32), range(32)] + distances)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models with outputs near their thresholds, and a collection."""
    path = tmp_path_factory.mktemp("environments")
    np.save(path / "digits.npy", DIGITS)
    for name, model in MODELS.items():
        hasher = Hasher(model or name, 32, **({"network": name} if model else {})).fit(DIGITS, steps=3)
        hasher._fitted = *hasher._parts()[:2], near_outputs(hasher)
        hasher.__dict__.pop("fingerprint", None)
        hasher.save(path / name)
    with Collection.create(path / "collection", Hasher.load(path / "conv")) as collection:
        collection.add(list(DIGITS))
    return path


def run(script: str, folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_codes_do_not_depend_on_threads_or_kernels(folder: Path) -> None:
    outputs = set()
    expected = {}
    for name in MODELS:
        hasher = Hasher.load(folder / name)
        exact = hasher._runtime.exact(hasher.preprocessing.batch(DIGITS[..., None]))
        expected[name] = pack(hasher._parts()[2].margins(exact) > TIE_TOLERANCE).tobytes().hex()
    for environment in ENVIRONMENTS + LONG_ENVIRONMENTS * SOAK:
        for line in run(ENCODE, folder, *MODELS, **environment).splitlines():
            name, codes, digest = line.split()
            assert codes == expected[name], (name, environment)
            outputs.add((name, digest))
    assert len(outputs) > len(MODELS)  # the kernels do differ


def test_a_forked_child_encodes_and_queries(folder: Path) -> None:
    run(FORK, folder)
