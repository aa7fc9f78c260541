"""HTTP over a `Collection`, and its web page; needs the extra `hashret[serve]`."""
