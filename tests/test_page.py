"""The web page, in Chromium."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import launch
from numpy.typing import NDArray
from PIL import Image

from hashret.collection import Collection
from hashret.hasher import Hasher

pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

COUNT = 40


def pixels(i: int) -> NDArray[np.uint8]:
    """Return image i: large blocks of random colours."""
    blocks = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def hasher() -> Hasher:
    return Hasher("ae", 16, network="mlp").fit(np.stack([pixels(i) for i in range(COUNT)]), steps=3)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch() as browser:
        yield browser


def make(folder: Path, hasher: Hasher) -> Collection:
    (folder / "photos").mkdir()
    for i in range(COUNT):
        Image.fromarray(pixels(i)).save(folder / "photos" / f"{i:02d}.png")
    collection = Collection.create(folder / "c", hasher)
    collection.index(folder / "photos")
    return collection


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, hasher: Hasher) -> Iterator[Collection]:
    """Return a collection that no test changes."""
    with make(tmp_path_factory.mktemp("page"), hasher) as collection:
        yield collection


@pytest.fixture(scope="module")
def address(collection: Collection, serve: Callable[..., str]) -> str:
    return serve(collection)


@pytest.fixture
def own(tmp_path: Path, hasher: Hasher) -> Iterator[Collection]:
    """Return a collection that the test may change."""
    with make(tmp_path, hasher) as collection:
        yield collection


@pytest.fixture(params=[1200])
def page(request: Any, browser: Any, address: str) -> Iterator[Any]:
    """Open the page of the collection that no test changes."""
    with opened_page(browser, address, request.param) as page:
        yield page


@pytest.fixture
def own_page(browser: Any, own: Collection, serve: Callable[..., str]) -> Iterator[Any]:
    """Open the page of the collection that the test may change."""
    with opened_page(browser, serve(own), 1200) as page:
        yield page


@contextmanager
def opened_page(browser: Any, address: str, width: int) -> Iterator[Any]:
    """Open a page; check in the end that it logged no errors and requested no other host."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    urls: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.errors, page.urls = errors, urls
    page.goto(address)
    expect(page.locator("article").first).to_be_visible()
    yield page
    assert not errors
    assert all(url.startswith((f"{address}/", "blob:", "data:")) for url in urls)
    context.close()


def ids(page: Any) -> list[int]:
    """Return the ids of the shown items, in order."""
    return [int(card.get_attribute("data-id")) for card in page.locator("article").all()]


def slide(page: Any, name: str, value: int) -> None:
    page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def upload(page: Any, path: Path) -> None:
    expect(page.locator("article").first).to_be_visible()  # the page has its event listeners
    page.set_input_files("#file", path)
    expect(page.locator("#title")).to_contain_text("images within")


def new_image(folder: Path, i: int = 99) -> Path:
    path = folder / f"query{i}.png"
    Image.fromarray(pixels(i)).save(path)
    return path


def test_the_page_lists_the_images_of_the_collection(page: Any, collection: Collection) -> None:
    assert ids(page) == [item.id for item in collection.items()]
    expect(page.locator("#counts")).to_have_text("40 images, 16-bit codes (model: ae)")
    loaded = "() => [...document.images].filter((image) => image.src).every((image) => image.naturalWidth)"
    page.locator("article").last.scroll_into_view_if_needed()
    page.wait_for_function(loaded)


def test_similar_images_of_a_file_are_found(page: Any, collection: Collection, tmp_path: Path) -> None:
    path = new_image(tmp_path)
    upload(page, path)
    hits = collection.query(path, 30)
    assert ids(page) == [hit.id for hit in hits]
    distances = [int(text.split()[0]) for text in page.locator(".distance strong").all_inner_texts()]
    assert distances == [hit.distance for hit in hits]
    codes = [
        int.from_bytes(code.tobytes()) for code in (*collection.hasher.encode([path]), *collection.codes([hits[5].id]))
    ]
    differing = [i for i in range(16) if (codes[0] ^ codes[1]) >> (15 - i) & 1]
    assert page.locator("canvas").nth(5).get_attribute("title") == f"Differing bits: {', '.join(map(str, differing))}"
    expect(page.locator("#caption")).to_have_text(path.name)


def test_the_sliders_filter_without_a_request(page: Any, collection: Collection, tmp_path: Path) -> None:
    path = new_image(tmp_path)
    upload(page, path)
    before = len([url for url in page.urls if "/v1/query" in url])
    slide(page, "k", 7)
    assert ids(page) == [hit.id for hit in collection.query(path, 7)]
    slide(page, "k", 200)
    slide(page, "radius", 5)
    within = [hit.id for hit in collection.query(path, None, 5)]
    assert ids(page) == within and len(within) < COUNT
    slide(page, "radius", 0)
    if not collection.query(path, None, 0):
        expect(page.locator("#empty")).to_contain_text("No image within 0 bits. The nearest image differs in")
    assert len([url for url in page.urls if "/v1/query" in url]) == before


def test_similar_images_of_a_result_are_found_and_back_returns(page: Any, collection: Collection) -> None:
    page.locator("article").nth(4).locator(".picture").click()
    expect(page.locator("#title")).to_contain_text("images within")
    assert ids(page) == [hit.id for hit in collection.query_item(5, 30)]
    expect(page.locator("#caption")).to_have_text(collection.get(5).paths[0])
    page.locator("article").first.get_by_role("button", name="Find similar").click()
    second = collection.query_item(5, 1)[0].id
    expect(page.locator("#caption")).to_have_text(collection.get(second).paths[0])
    page.go_back()
    expect(page.locator("#caption")).to_have_text(collection.get(5).paths[0])
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#title")).to_have_text("All images")


@pytest.mark.parametrize("action", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(page: Any, collection: Collection, tmp_path: Path, action: str) -> None:
    path = new_image(tmp_path)
    page.evaluate(
        """([action, bytes]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "image.png", { type: "image/png" }));
          const event = action === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
          document.body.dispatchEvent(event);
        }""",
        [action, list(path.read_bytes())],
    )
    expect(page.locator("#title")).to_contain_text("images within")
    assert ids(page) == [hit.id for hit in collection.query(path, 30)]


def test_the_keyboard_selects_and_searches(page: Any, collection: Collection) -> None:
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#caption")).to_have_text(collection.get(2).paths[0])
    expect(page.locator("#title")).to_contain_text("images within")
    assert ids(page) == [hit.id for hit in collection.query_item(2, 30)]
    page.keyboard.press("/")
    expect(page.locator("#where")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.locator("#title")).to_have_text("All images")


def test_a_reconstruction_is_shown_beside_the_query(page: Any, tmp_path: Path) -> None:
    upload(page, new_image(tmp_path))
    page.get_by_role("button", name="Reconstruct").click()
    page.wait_for_function("() => document.getElementById('reconstruction').naturalWidth === 32")


def test_an_image_is_added(own_page: Any, own: Collection, tmp_path: Path) -> None:
    path = new_image(tmp_path)
    upload(own_page, path)
    own_page.get_by_role("button", name="Add to collection").click()
    expect(own_page.locator("#counts")).to_contain_text("41 images")
    expect(own_page.locator("#caption")).to_contain_text("blobs")
    assert own.query(path, 1)[0].distance == 0
    assert ids(own_page) == [hit.id for hit in own.query_item(COUNT + 1, 30)]


def test_a_result_is_marked_as_no_match(own_page: Any, own: Collection) -> None:
    own_page.locator("article").first.locator(".picture").click()
    expect(own_page.locator("#title")).to_contain_text("images within")
    near = own.query_item(1, 1)[0].id
    card = own_page.locator("article").first
    card.get_by_role("button", name="Not a match").click()
    expect(card).to_have_class("rejected")
    assert own.verdicts() == [(1, near, "different")]
    own_page.reload()
    expect(own_page.locator("#title")).to_contain_text("images within")
    assert ids(own_page) == [hit.id for hit in own.query_item(1, 30)] and near not in ids(own_page)


def test_duplicates_are_shown_in_groups(page: Any, collection: Collection) -> None:
    page.get_by_role("link", name="Duplicates").click()
    expect(page.locator("#title")).to_contain_text("of near-duplicates within 3 bits")
    expected = collection.dupes(3)
    assert page.locator(".group").count() == len(expected)
    assert ids(page) == [item.id for group in expected for item in group.items]


def test_neighbours_are_filtered(page: Any, collection: Collection) -> None:
    page.locator("article").first.locator(".picture").click()
    page.locator("#where").fill("name < '05'")
    page.locator("#where").press("Enter")
    expect(page.locator("article")).to_have_count(4)
    assert ids(page) == [hit.id for hit in collection.query_item(1, 30, where="name < '05'")]


def test_all_images_are_filtered(page: Any, collection: Collection) -> None:
    page.keyboard.press("/")
    page.keyboard.type("name < '05'")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Images that match the filter")
    assert ids(page) == [item.id for item in collection.items(where="name < '05'")] == [1, 2, 3, 4, 5]
    page.locator("#where").fill("name = 'none'")
    page.locator("#where").press("Enter")
    expect(page.locator("#empty")).to_have_text("No image matches the filter.")
    page.locator("#where").fill("")
    page.locator("#where").press("Enter")
    expect(page.locator("#title")).to_have_text("All images")
    assert len(ids(page)) == COUNT
    page.locator("#where").fill("name =")
    page.locator("#where").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("where: ")
    assert len(page.errors) == 1 and "422" in page.errors[0]  # Chromium logs the error response
    page.errors.clear()
    page.get_by_role("link", name="Duplicates").click()
    expect(page.locator("#where")).to_be_hidden()


def test_the_next_page_has_the_same_filter(own_page: Any, own: Collection) -> None:
    own.add([pixels(i) for i in range(100, 170)], [{"new": i % 2} for i in range(70)])
    own_page.reload()
    own_page.locator("#where").fill("new is null or new = 1")
    own_page.locator("#where").press("Enter")
    expect(own_page.locator("#title")).to_have_text("Images that match the filter")
    own_page.locator("#where").evaluate("(field) => { field.value = 'unfinished text'; }")
    own_page.locator("#more").click()
    expected = [item.id for item in own.items(limit=1000, where="new is null or new = 1")]
    expect(own_page.locator("article")).to_have_count(len(expected))
    assert ids(own_page) == expected and len(expected) == 75


def test_an_error_is_shown_until_the_next_query(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"broken")
    page.set_input_files("#file", broken)
    expect(page.get_by_role("alert")).to_contain_text("no image: no format begins with")
    assert len(page.errors) == 1 and "422" in page.errors[0]  # Chromium logs the error response
    page.errors.clear()
    upload(page, new_image(tmp_path))
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("page", [400, 1600], indirect=True)
def test_the_page_does_not_scroll_sideways(page: Any, tmp_path: Path) -> None:
    width = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(width) == 0
    upload(page, new_image(tmp_path))
    assert page.evaluate(width) == 0


def test_an_empty_collection_names_the_command_to_fill_it(
    browser: Any, hasher: Hasher, tmp_path: Path, serve: Any
) -> None:
    with Collection.create(tmp_path / "empty", hasher) as collection:
        page = browser.new_page()
        page.goto(serve(collection))
        expect(page.locator("#empty")).to_contain_text("hashret index SOURCE")
        page.close()


def test_the_token_is_requested_and_stored(browser: Any, own: Collection, serve: Any, tmp_path: Path) -> None:
    address = serve(own, token="secret")
    page = browser.new_page()
    page.goto(address)
    upload(page, new_image(tmp_path))
    page.get_by_role("button", name="Add to collection").click()
    page.get_by_label("Token").fill("secret")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_url(re.compile(f"^{address}/$"))
    upload(page, new_image(tmp_path))
    page.get_by_role("button", name="Add to collection").click()
    expect(page.locator("#counts")).to_contain_text("41 images")
    page.close()
