"""`FaissIndex`: the FAISS factories with the full set of methods."""

from pathlib import Path

import numpy as np
import pytest
from brute_force import as_items, check_search, check_within, exact_search, make_codes

from hashret.codes import hamming
from hashret.indexes import FaissIndex

pytestmark = pytest.mark.usefixtures("flip_early")


FACTORIES = ["BFlat", "BIVF4", "BHNSW8"]


@pytest.mark.parametrize("factory", FACTORIES)
def test_faiss_factories_have_all_methods(factory: str, tmp_path: Path) -> None:
    codes, ids, queries = make_codes(64, 3000, 1, 30, 0.3), np.arange(3000)[::-1].copy(), make_codes(64, 20, 2, 30, 0.3)
    index, items = FaissIndex(64, factory), as_items(codes, ids)
    assert index.exact == (factory == "BFlat")
    index.add(codes, ids)
    assert index._state.engine is not None
    assert index.remove(ids[:500]) == 500
    items = dict(list(items.items())[500:])
    index.save(tmp_path / "index")
    for same in (index, FaissIndex.load(tmp_path / "index")):
        assert same.factory == factory and same._state.engine is not None
        for k in (1, 10, 2499, 3000):  # the longest rows show that a scan fills the rows that FAISS leaves short
            check_search(same, items, queries, k)
            check_search(same, items, queries, k, np.arange(0, 3000, 7))
        check_within(same, items, queries, 12)
        recall = (same.search(queries, 5).distances == exact_search(items, queries)[0][:, :5]).mean()
        assert recall >= 0.9


def test_a_graph_over_distinct_codes_tolerates_collisions() -> None:
    few = make_codes(64, 400, 1, 400, 0.5)
    rng = np.random.default_rng(0)
    codes, ids, queries = few[rng.zipf(1.2, 20_000) % 400], np.arange(20_000), make_codes(64, 300, 2, 400, 0.2)
    index = FaissIndex(64, "BHNSW16")
    index.add(codes, ids)
    nearest = hamming(queries, few).min(axis=1)
    assert (index.search(queries, 10).distances[:, 0] == nearest).mean() >= 0.99


@pytest.mark.parametrize("factory", ["Flat", "BFlat,x", "BIVF0", "BHash8", ""])
def test_unknown_factories_are_rejected(factory: str) -> None:
    with pytest.raises(ValueError, match="factory"):
        FaissIndex(64, factory)
