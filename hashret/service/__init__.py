"""HTTP over a `Collection`, and its web page; needs the extra `hashret[serve]`."""

MOST_QUERIES = 256  # images or codes in one request
MOST_K = 1000
MOST_HITS = 25_600  # of all queries of one request
