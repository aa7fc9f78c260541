"""The HTTP service of a `Collection`, and its web page. Needs the extra `hashret[serve]`."""
