"""`benchmarks/vectors.py` and `benchmarks/ranking.py` run from end to end, on small data and for a few steps."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("from_file", [True, False])
def test_recall_of_vectors_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, from_file: bool
) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(600, 32)))
    source = ["--vectors", str(tmp_path / "v.npy")] if from_file else ["--numbers", "32", "--limit", "600"]
    script = BENCHMARKS / "vectors.py"
    options = ["--bits", "16,32", "--queries", "50", "--steps", "3", "--models", "itq,contrastive", "--json"]
    monkeypatch.setattr(sys, "argv", [str(script), *source, *options])
    runpy.run_path(str(script), run_name="__main__")
    results = json.loads(capsys.readouterr().out)
    assert results["n"] == 550 and results["numbers"] == 32
    methods = ["hashret itq", "hashret contrastive", "FAISS ITQ16,LSH", "FAISS PQ"]
    methods += ["hashret itq", "hashret contrastive", "one bit a number", "FAISS ITQ32,LSH", "FAISS PQ"]
    assert [row["method"] for row in results["rows"]] == methods
    reached = {(row["method"], row["bits"]): row["recall"] or row["by_query"] for row in results["rows"]}
    assert all(0 < share < 1 for share in reached.values())
    assert reached["hashret itq", 32] > reached["hashret itq", 16]


def test_both_rankings_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = BENCHMARKS / "ranking.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--models", "itq", "--bits", "16", "--queries", "60", "--json"])
    runpy.run_path(str(script), run_name="__main__")
    plain, sure = json.loads(capsys.readouterr().out)
    assert (plain["rank"], sure["rank"]) == ("distance", "asymmetric")
    assert sure["map@100"] > plain["map@100"] > 0.5 and sure["precision@10"] > plain["precision@10"]
