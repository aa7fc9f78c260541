"""hashret info: what a collection holds."""

import json

from hashret.cli.common import CollectionFolder, Json, Quiet


def info(collection: CollectionFolder = None, as_json: Json = False, quiet: Quiet = False) -> int:
    """Show what the collection holds, and of which model its codes are."""
    from hashret.collection import Collection, locate
    from hashret.vectors import describe

    with Collection.open(locate(collection), read_only=True) as there:
        told = there.info()
    if as_json:
        print(json.dumps(told))
        return 0
    for name, value in {
        "collection": told["path"],
        "items": f"{told['items']:,} under {told['paths']:,} paths; {told['failures']:,} files could not be read",
        "codes": f"{told['bits']} bits, {told['model']} with head {told['head']}, of {describe(told['preprocessing'])}",
        "model": told["fingerprint"],
        "trained on": f"{told['training']['images']:,} images from {told['training']['source']}",
        "index": f"{told['index']}, generation {told['generation']}",
        "on disk": f"{told['bytes_on_disk'] / 1e6:,.1f} MB",
    }.items():
        print(f"{name:<12}{value}")
    return 0
