"""The public value types: checks of query options, and equality with the models of HTTP messages."""

from types import GenericAlias
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from hashret import results
from hashret.results import RANKS, QueryOptions, is_key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 1},
        {"k": None, "max_distance": 0},
        {"k": 3, "max_distance": 64, "rank": "asymmetric", "where": "label = 'cat'"},
    ],
)
def test_query_options_are_an_immutable_value(options: dict[str, Any]) -> None:
    made = QueryOptions(**options)
    assert made == QueryOptions(**options) and hash(made) == hash(QueryOptions(**options))
    assert {name: getattr(made, name) for name in options} == options
    with pytest.raises(AttributeError):
        made.k = 5  # type: ignore[misc]
    assert made != made.with_k(99) and made.with_k(99).with_k(made.k) == made


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"k": None}, "give k, max_distance, or both"),
        ({"k": 0}, "k must be an integer of at least 1, not 0"),
        ({"k": True}, "k must be an integer of at least 1, not True"),
        ({"k": 2.0}, "k must be an integer of at least 1, not 2.0"),
        ({"k": "3"}, "k must be an integer of at least 1, not '3'"),
        ({"max_distance": -1}, "max_distance must be an integer of at least 0, not -1"),
        ({"k": None, "max_distance": 1.5}, "max_distance must be an integer of at least 0, not 1.5"),
        ({"rank": "colour"}, "there is no rank 'colour'; choose distance or asymmetric"),
    ],
)
def test_impossible_options_are_rejected(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        QueryOptions(**options)


@pytest.mark.parametrize("text", ["a", "a.b", "it's", "größe", " ", "x" * 200, "\x7f"])
def test_a_key_can_be_nearly_any_short_text(text: str) -> None:
    assert is_key(text)


@pytest.mark.parametrize("text", ["", "x" * 201, 'a"b', "a\\b", "a\nb", "a\x00b", "a\x1fb", "a\n"])
def test_a_text_that_json_would_escape_is_no_key(text: str) -> None:
    assert not is_key(text)


# The HTTP models with the names of value types, and the fields that only a response has.
TWINS: list[tuple[str, dict[str, Any]]] = [
    ("Hit", {"rank": int, "code": str | None}),
    ("Item", {}),
    ("Group", {"size": int}),
    ("Calibration", {}),
]


def as_messages(annotation: Any) -> Any:
    """Return the type with HTTP models in place of value types."""
    from hashret.service import messages

    if get_origin(annotation) is list:
        return GenericAlias(list, tuple(map(as_messages, get_args(annotation))))
    name = getattr(annotation, "__name__", "")
    return getattr(messages, name) if getattr(results, name, None) is annotation else annotation


@pytest.mark.parametrize(("name", "more"), TWINS)
def test_a_value_has_the_same_fields_over_http(name: str, more: dict[str, Any]) -> None:
    pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    from hashret.service import messages

    value, model = getattr(results, name), getattr(messages, name)
    expected = {field: as_messages(hint) for field, hint in get_type_hints(value).items()}
    found = {field: hint for field, hint in get_type_hints(model).items() if field in model.model_fields}
    assert found == expected | more
    optional = {field for field, info in model.model_fields.items() if not info.is_required()}
    assert optional == {*value._field_defaults} | ({"code"} & more.keys())


def test_every_model_with_the_name_of_a_value_type_is_compared_with_it() -> None:
    pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    from pydantic import BaseModel

    from hashret.service import messages

    models = {
        name for name, model in vars(messages).items() if isinstance(model, type) and issubclass(model, BaseModel)
    }
    assert models & vars(results).keys() == {name for name, _ in TWINS}


def test_an_item_with_its_code_is_an_item() -> None:
    pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    from hashret.service import messages

    assert list(messages.Item.model_fields) == list(results.Item._fields)  # as answers list them
    assert list(messages.CodedItem.model_fields) == [*results.Item._fields, "code"]


def test_the_options_of_a_query_are_the_same_over_http() -> None:
    pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    from hashret.service import messages

    expected = get_type_hints(QueryOptions) | {"rank": Literal["distance", "asymmetric"], "codes": bool}
    expected |= {"fields": str | None}  # of an answer, which Python does not limit
    fields = messages.ImageOptions.model_fields
    found = {name: hint for name, hint in get_type_hints(messages.ImageOptions).items() if name in fields}
    assert found == expected and get_args(expected["rank"]) == RANKS
    assert {*messages.Options.model_fields} == {*fields} - {"rank"}
    for params in (
        messages.ImageOptions(k=3, max_distance=9, rank="asymmetric", where="id < 9"),
        messages.ByCode(code="00ff", k=3, max_distance=9, where="id < 9"),
    ):
        options = params.query_options()
        assert (options.k, options.max_distance, options.where) == (3, 9, "id < 9")
        assert options.rank == getattr(params, "rank", "distance")
    assert messages.ImageOptions().query_options() == QueryOptions()
    assert messages.ImageOptions(max_distance=9).query_options() == QueryOptions(1000, 9)
