"""hashret info: the contents, the model and the health of a collection."""

import json
from typing import Any

from hashret.cli.common import CollectionFolder, Json, Quiet
from hashret.errors import HashretError, format_count


def info(collection: CollectionFolder = None, as_json: Json = False, quiet: Quiet = False) -> int:
    """Show the contents, the model and the health of a collection."""
    from hashret.collection import Collection, locate
    from hashret.data.preprocessing import describe

    with Collection.open(locate(collection), read_only=True) as images:
        summary = images.info()
    if as_json:
        print(json.dumps(summary))
        return 0
    try:
        inputs = describe(summary["preprocessing"])
        training = summary["training"]
        trained_on = f"{format_count(training['images'], 'image')} from {training['source']}"
    except (KeyError, ValueError) as error:
        raise HashretError(f"the model of {summary['path']} is incomplete ({error}): restore it") from None
    for name, value in {
        "collection": summary["path"],
        "items": f"{summary['items']:,} under {format_count(summary['paths'], 'path')}; "
        f"{format_count(summary['failures'], 'file')} could not be read",
        "codes": f"{summary['bits']} bits, {summary['model']} with head {summary['head']}, of {inputs}",
        "model": summary["fingerprint"],
        "trained on": trained_on,
        "index": f"{summary['index']}, generation {summary['generation']}",
        "health": _health(summary),
        "on disk": f"{summary['bytes_on_disk'] / 1e6:,.1f} MB, {summary['bytes_per_item']:,.0f} bytes per item",
    }.items():
        print(f"{name:<12}{value}")
    return 0


def _health(summary: dict[str, Any]) -> str:
    health = summary["health"]
    sampled = f" in a sample of {health['codes']:,}" if health["codes"] < summary["items"] else ""
    return (
        f"{format_count(health['distinct_codes'], 'distinct code')}{sampled}, largest bucket "
        f"{format_count(health['largest_bucket'], 'item')}, {format_count(health['dead_bits'], 'dead bit')}, "
        f"balance {health['balance']:.0%}"
    )
