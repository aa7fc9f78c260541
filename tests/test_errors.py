from hashret.errors import format_count


def test_a_count_agrees_with_its_noun() -> None:
    assert format_count(1, "item") == "1 item"
    assert format_count(2, "item") == "2 items" and format_count(0, "item") == "0 items"
    assert format_count(1, "query", "queries") == "1 query"
    assert format_count(1597, "query", "queries") == "1,597 queries"
