"""A `Client` returns what the served collection returns."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashret import Client, Collection, Hasher
from hashret.cli.app import run
from hashret.errors import HashretError, NotFound, TooLarge

pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")


def pixels(i: int) -> NDArray[np.uint8]:
    return np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    (folder / "photos").mkdir()
    for i in range(20):
        Image.fromarray(pixels(i)).save(folder / "photos" / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def collection(folder: Path) -> Iterator[Collection]:
    hasher = Hasher("lsh", 32).fit(np.stack([pixels(i) for i in range(50)]))
    with Collection.create(folder / "c", hasher) as made:
        made.index(folder / "photos")
        yield made


@pytest.fixture(scope="module")
def client(collection: Collection, serve: Callable[..., str]) -> Iterator[Client]:
    with Client(serve(collection, token="secret"), token="secret") as made:
        yield made


@pytest.fixture
def images(folder: Path) -> list[object]:
    """Return an image in each accepted form."""
    path = folder / "photos" / "03.png"
    return [path, str(path), path.read_bytes(), Image.open(path), pixels(3), pixels(40)]


def test_importing_the_client_loads_no_heavy_module() -> None:
    """httpx too is loaded only by `Client()`."""
    code = "import sys\nfrom hashret import Client\nprint(Client.__module__, *sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = done.stdout.split()
    assert loaded[0] == "hashret.client" and "hashret.codes" in loaded
    unwanted = {"torch", "faiss", "numba", "scipy", "sqlite3", "sqlite_utils", "hashret.collection", "fastapi", "httpx"}
    assert not unwanted & {*loaded}


def test_queries_return_what_the_collection_returns(
    client: Client, collection: Collection, images: list[object]
) -> None:
    for image in images:
        assert client.query(image, 3) == collection.query(image, 3)
    assert client.query_item(3, where="name < '05'") == collection.query_item(3, where="name < '05'") != []
    assert client.query(images[0], where="name < '05'") == collection.query(images[0], where="name < '05'")
    assert client.query(images[0], 3, rank="asymmetric") == collection.query(images[0], 3, rank="asymmetric")
    for k, radius in ((4, None), (None, 12), (3, 9)):
        assert client.query_batch(images, k, radius) == collection.query_batch(images, k, radius)
        codes = collection.codes([1, 2, 3])
        assert client.query_codes(codes, k, radius) == collection.query_codes(codes, k, radius)
        assert client.query_item(7, k, radius) == collection.query_item(7, k, radius)
    assert client.query_batch([]) == client.query_codes(collection.codes([])) == []


def test_large_batches_are_split_into_requests(client: Client, collection: Collection) -> None:
    many = np.stack([pixels(i) for i in range(300)])
    codes = client.encode(many)
    assert np.array_equal(codes, collection.hasher.encode(many))
    assert client.query_batch(many, 2) == collection.query_batch(many, 2)
    assert client.query_codes(codes, 200) == collection.query_codes(codes, 200)
    assert client.encode([]).shape == (0, 4)


def test_items_and_info_are_those_of_the_collection(client: Client, collection: Collection) -> None:
    assert len(client) == len(collection)
    assert (client.bits, client.fingerprint) == (collection.bits, collection.fingerprint)
    assert client.get(5) == collection.get(5) and client.items(3, 4) == collection.items(3, 4)
    filtered = [item.id for item in collection.items(3, 4, where="name > '05'")]
    assert filtered == [item.id for item in client.items(3, 4, where="name > '05'")] == [6, 7, 8, 9]
    for source in (client, collection):
        assert source.items(where="name = 'none'") == []
        with pytest.raises(HashretError, match="where: "):
            source.items(where="name =")
    assert {**collection.info(), "read_only": False}.keys() == client.info().keys()


def test_near_duplicates_are_grouped_and_judged(client: Client, collection: Collection) -> None:
    for options in ({}, {"by": "star", "keep": "oldest"}):
        assert client.dupes(9, **options) == collection.dupes(9, **options)
    client.verdict(2, 5, "different")
    assert collection.verdicts() == [(2, 5, "different")]
    assert client.query_item(2, 20) == collection.query_item(2, 20)
    with pytest.raises(NotFound):
        client.verdict(2, 999, "same")


def test_the_radius_is_that_of_the_collection(
    client: Client, collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers() -> list[tuple[int, str, str]]:
        """Return exit code and output of the command for the service, and for the collection."""
        outputs = []
        for options in (["--url", client.url], ["-c", str(collection.path)]):
            code = run(["query", "id:3", "-r", "auto", "--target", "0.1", "--json", *options])
            outputs.append((code, *capsys.readouterr()))
        return outputs

    served, local = answers()
    assert served == local and served[0] == 1
    for source in (client, collection):
        with pytest.raises(NotFound, match="run hashret calibrate"):
            source.radius()
    collection.calibrate(images=10)
    assert client.calibration() == collection.calibration()
    for target in (0.1, 0.5):
        assert client.radius(target) == collection.radius(target)
    for source in (client, collection):
        with pytest.raises(ValueError, match="a target is a precision"):
            source.radius(2)
    served, local = answers()
    assert served == local and served[0] == 0 and f"-r auto is {collection.radius(0.1)} bits" in served[2]


def test_images_are_added_and_removed(client: Client, collection: Collection) -> None:
    before = len(collection)
    images = [pixels(i) for i in range(1000, 1300)]
    ids = client.add(images, [{"i": i} if i % 2 else None for i in range(300)])
    assert ids == client.add(images) == collection.add(images)  # they exist by now
    assert collection.get(ids[299]).metadata == {"i": 299} and collection.get(ids[298]).metadata is None
    assert client.query(images[7], 1)[0].id == ids[7]
    assert client.remove(ids[:3]) == 3 and client.remove(ids[:1]) == 0
    collection.remove(ids)
    assert len(client) == before
    with pytest.raises(ValueError, match="2 images need as many metadata, not 1"):
        client.add(images[:2], [None])


def test_errors_are_those_of_the_collection(client: Client, collection: Collection, folder: Path) -> None:
    for source in (client, collection):
        for method in (source.get, source.query_item):
            with pytest.raises(NotFound, match="there is no item 999"):
                method(999)
        with pytest.raises(ValueError, match="32 bits, not 8"):
            source.query_codes(np.zeros((1, 1), np.uint8))
        with pytest.raises(ValueError, match="give k, max_distance, or both"):
            source.query(pixels(0), None)
        with pytest.raises(ValueError, match="k must be an integer of at least 1, not 0"):
            source.query(pixels(0), 0)
        with pytest.raises(ValueError, match="max_distance must be an integer of at least 0, not -1"):
            source.query_item(1, max_distance=-1)
        with pytest.raises(ValueError, match="there is no rank 'colour'; choose distance or asymmetric"):
            source.query(pixels(0), rank="colour")
        with pytest.raises(HashretError, match="no image"):
            source.query(b"nothing")
        with pytest.raises(HashretError, match="cannot be read: No such file"):
            source.query(folder / "nothing.png")
        bomb = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
        with pytest.raises(TooLarge, match="400 megapixels"):
            source.query(bomb.getvalue())


def test_an_unusable_service_is_an_error(client: Client, collection: Collection) -> None:
    with Client("http://127.0.0.1:9") as unreachable, pytest.raises(HashretError, match="cannot be reached"):
        unreachable.info()
    with pytest.raises(HashretError, match="not a valid URL"):
        Client("http://a:b")
    with Client(client.url) as tokenless, pytest.raises(HashretError, match="needs the token"):
        tokenless.remove([1])
    assert len(collection) == len(client)


def test_the_query_command_uses_a_service(
    client: Client, collection: Collection, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["id:3"],
        ["hex:00ff00ff", "id:4"],
        [str(folder / "photos")],
        [str(folder / "photos" / "07.png"), "id:99"],
    ):
        outputs = []
        for options in (["--url", client.url], ["-c", str(collection.path)]):
            code = run(["query", *arguments, *options, "-k", "3", "--json"])
            output = capsys.readouterr()
            outputs.append((code, json.loads(output.out), output.err))
        assert outputs[0] == outputs[1]
    assert run(["query", "id:1", "--url", "http://127.0.0.1:9"]) == 1
    assert "hashret serve" in capsys.readouterr().err
