"""A service beside other processes that index into its collection, and switch it to another model."""

import io
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import MAIN
from PIL import Image

from hashret.codes import Codes, hamming
from hashret.collection import Collection
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

ROWS = 20_000 if "HASHRET_SOAK" in os.environ else 1000
K = 5
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8), np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGES[i]).save(file, "PNG")
    return file.getvalue()


def run(folder: Path, *arguments: str) -> None:
    """Run a command, again while an upload holds the lock of the collection."""
    for _ in range(100):
        done = subprocess.run([*MAIN, *arguments, "-c", "c"], cwd=folder, capture_output=True, text=True, timeout=600)
        if "another process is writing" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def test_answers_are_of_one_model_and_state(tmp_path: Path, serve: Callable[..., str]) -> None:
    half = ROWS // 2
    models = [Hasher("lsh", 32).fit(IMAGES[:200]), Hasher("pca", 64).fit(IMAGES[:200])]
    np.save(tmp_path / "rows.npy", IMAGES[half:])
    models[1].save(tmp_path / "other")
    with Collection.create(tmp_path / "c", models[0]) as collection:
        collection.add([*IMAGES[:half], png(0)])  # uploaded again below
    order = [*range(half), 0, *range(half, ROWS)]
    codes = [model.encode(IMAGES)[order] for model in models]
    answers: list[tuple[int, int, Any]] = []
    uploads: list[Any] = []
    stop = threading.Event()

    def read(first: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            i = first
            while not stop.is_set():
                i = (i + 7) % half
                answers.append((i, i + 1, client.post("/v1/query", json={"id": i + 1, "k": K})))
                image = client.post(f"/v1/query?k={K}", content=png(i), headers={"content-type": "image/png"})
                answers.append((i, 0, image))
                time.sleep(0.01)  # leave the processor to the other processes

    def upload() -> None:
        """Upload an image that the collection has, so that the ids stay those of the rows."""
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                uploads.append(client.post("/v1/items", content=png(0), headers={"content-type": "image/png"}))
                time.sleep(0.3)

    with Collection.open(tmp_path / "c") as collection:
        address = serve(collection)
        threads = [threading.Thread(target=read, args=(i,)) for i in range(2)] + [threading.Thread(target=upload)]
        for thread in threads:
            thread.start()
        try:
            run(tmp_path, "index", "rows.npy")
            run(tmp_path, "reindex", "other")
            time.sleep(0.5)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    seen = set()
    for i, own_id, response in answers:
        assert response.status_code == 200, response.text
        found = [(hit["distance"], hit["id"]) for hit in response.json()["hits"]]
        # The hits among the first n items are also those among the items up to the last of the hits.
        count = max(half + 1, *(item_id for _, item_id in found))
        of_models = [nearest(model_codes[:count], i, own_id) for model_codes in codes]
        assert found in of_models, i
        seen.add((of_models.index(found), count > half + 1))
    assert {model for model, _ in seen} == {0, 1} and (1, True) in seen
    for response in uploads:
        if response.status_code != 200:
            assert response.status_code == 503 and "another process is writing" in response.json()["detail"]
        else:
            assert response.json()["ids"] == [half + 1]


def nearest(codes: Codes, i: int, own: int) -> list[tuple[int, int]]:
    """Return distance and id of the nearest items by brute force, without the item `own`."""
    distances = hamming(codes[i : i + 1], codes)[0]
    order = np.lexsort((np.arange(len(codes)), distances))[: K + 1] + 1
    ids = [item_id for item_id in order if item_id != own][:K]
    return [(int(distances[item_id - 1]), int(item_id)) for item_id in ids]
