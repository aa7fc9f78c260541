"""hashret info: what a collection holds."""

import json
from typing import Any

from hashret.cli.common import CollectionFolder, Json, Quiet
from hashret.errors import HashretError


def info(collection: CollectionFolder = None, as_json: Json = False, quiet: Quiet = False) -> int:
    """Show what the collection holds, and of which model its codes are."""
    from hashret.collection import Collection, locate
    from hashret.data.preprocessing import describe

    with Collection.open(locate(collection), read_only=True) as there:
        told = there.info()
    if as_json:
        print(json.dumps(told))
        return 0
    try:
        shape = describe(told["preprocessing"])
        learned = f"{told['training']['images']:,} images from {told['training']['source']}"
    except (KeyError, ValueError) as error:
        raise HashretError(f"the model of {told['path']} says too little ({error}): restore it") from None
    for name, value in {
        "collection": told["path"],
        "items": f"{told['items']:,} under {told['paths']:,} paths; {told['failures']:,} files could not be read",
        "codes": f"{told['bits']} bits, {told['model']} with head {told['head']}, of {shape}",
        "model": told["fingerprint"],
        "trained on": learned,
        "index": f"{told['index']}, generation {told['generation']}",
        "health": _health(told),
        "on disk": f"{told['bytes_on_disk'] / 1e6:,.1f} MB, {told['bytes_per_item']:,.0f} bytes an item",
    }.items():
        print(f"{name:<12}{value}")
    return 0


def _health(told: dict[str, Any]) -> str:
    health = told["health"]
    share = f" of {health['codes']:,} looked at" if health["codes"] < told["items"] else ""
    return (
        f"{health['distinct_codes']:,} distinct codes{share}, {health['largest_bucket']:,} items with the commonest; "
        f"{health['dead_bits']} dead bits, rarer values {health['balance']:.0%}"
    )
