import json
from pathlib import Path

from command_line import Command, check_failed


def test_calibrate_chooses_the_radius(folder: Path, hashret: Command) -> None:
    advice = "not calibrated: run hashret calibrate, or give a radius in bits"
    check_failed(hashret("query", "id:1", "-r", "auto"), 1, advice)
    check_failed(hashret("dupes", "-r", "auto"), 1, "run hashret calibrate")
    result = hashret("calibrate", "--target", 0.2, "--plot", "plot.png")
    assert result.out.startswith("radius  precision  recall\n") and Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "measured with 200 near-duplicates (altered copies) among 40 items\n-r auto is " in result.err
    document = json.loads(hashret("calibrate", "--target", 0.2, "--json").out)
    radius = document["radius"]
    assert document["precision"][radius] >= 0.2 and len(document["recall"]) == 33 and document["items"] == 40
    result = hashret("query", "id:1", "-r", "auto", "--target", 0.2)
    assert result == (
        0,
        hashret("query", "id:1", "-r", radius).out,
        f"-r auto is {radius} bits, for a precision of 0.2\n",
    )
    assert hashret("dupes", "-r", "auto", "--target", 0.2, "--json").out == hashret("dupes", "-r", radius, "--json").out
    for verdict, other in (("same", 2), ("different", 3)):
        assert hashret("verdict", "id:1", f"id:{other}", verdict).code == 0
    assert hashret("verdict", "--export", "pairs.csv", "-q").err == ""
    labelled = json.loads(hashret("calibrate", "pairs.csv", "--json").out)
    assert labelled == json.loads(hashret("calibrate", "--verdicts", "--json").out) | {"source": "pairs.csv"}
    assert labelled["items"] is None and sorted(set(labelled["recall"])) == [0, 1]
