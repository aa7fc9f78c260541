"""Requests and responses as pydantic models, from which the OpenAPI document is made.

`Hit`, `Item`, `Group` and `Calibration` are the JSON forms of the types of the same names in `hashret.results`; the
OpenAPI document takes the names and docstrings of all models, so that they cannot change. Use them as `messages.Hit`.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from hashret.codes import MAX_BITS
from hashret.errors import one_line
from hashret.results import MAX_K, MAX_QUERIES, QueryOptions
from hashret.service.problems import Problem

Code = Annotated[str, Field(pattern="^([0-9a-fA-F]{2})+$", max_length=256, description="In hex.")]
Id = Annotated[int, Field(ge=1, le=2**63 - 1)]
K = Annotated[int, Field(ge=1, le=MAX_K, description="How many: default 10, or 1,000 with max_distance.")]
MaxDistance = Annotated[int, Field(ge=0, le=MAX_BITS, description="Only within this Hamming distance.")]
Where = Annotated[
    str, Field(max_length=10_000, description="Only items for which this SQLite expression holds: label = 'cat'.")
]
Fingerprint = Annotated[str, Field(description="The model that codes are of: 409 if it is not the collection's.")]
FieldNames = Annotated[
    str, Field(max_length=200, description="Only these members of hits or items, separated by commas: id,distance.")
]
M = TypeVar("M", bound=BaseModel)

MAX_JSON_BYTES = 2**18  # of one text: parsing it on the event loop keeps others waiting


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Options(_Model):
    """What every query may say: in a JSON body, as fields of a form, or in the address."""

    k: K | None = None
    max_distance: MaxDistance | None = None
    where: Where | None = None
    codes: Annotated[bool, Field(description="Whether to give the codes of queries and hits.")] = False
    fields: FieldNames | None = None

    @property
    def limit(self) -> int:
        """The maximum number of hits of a query."""
        return self.k or (10 if self.max_distance is None else MAX_K)

    def query_options(self) -> QueryOptions:
        return QueryOptions(self.limit, self.max_distance, where=self.where)


class ImageOptions(Options):
    """What queries by images may say as well."""

    rank: Annotated[Literal["distance", "asymmetric"], Field(description="What hits are ordered by.")] = "distance"

    def query_options(self) -> QueryOptions:
        return QueryOptions(self.limit, self.max_distance, self.rank, self.where)


class ByCode(Options):
    """A query by a code."""

    code: Code
    fingerprint: Fingerprint | None = None


class ByCodes(Options):
    """Queries by codes."""

    code: Annotated[list[Code], Field(min_length=1, max_length=MAX_QUERIES)]
    fingerprint: Fingerprint | None = None


class ById(Options):
    """A query by an item, which is left out of its own answer."""

    id: Id


class ItemReference(_Model):
    """A request by an item."""

    id: Id


class Hit(_Model):
    """A similar image."""

    rank: int
    distance: int
    id: int
    path: str | None
    label: str | None
    paths: list[str]
    metadata: dict[str, Any] | None
    score: Annotated[float | None, Field(description="What hits are ordered by, with rank asymmetric.")] = None
    code: str | None = None


class Answer(_Model):
    """The hits of one query, nearest first."""

    query: Annotated[str | None, Field(description="The file's name, hex:CODE, or id:N.")]
    k: int
    hits: list[Hit]
    code: str | None = None


class Encoded(_Model):
    """Codes of images, and which model they are of."""

    fingerprint: str
    bits: int
    codes: list[str]


class Added(_Model):
    """The item of each image."""

    ids: list[int]


class Removed(_Model):
    """How many items were there."""

    removed: int


class Item(_Model):
    """One content and where it lies."""

    id: int
    sha256: str
    width: int
    height: int
    bytes: int
    added: str
    metadata: dict[str, Any] | None
    paths: list[str]
    label: str | None


class CodedItem(Item):
    """An item, and its code."""

    code: str


class Items(_Model):
    """A page of items; `next` is the cursor of the page that follows, null after the last."""

    items: list[Item]
    next: int | None


class Group(_Model):
    """Copies of one image, the one to keep first: at most a thousand of the `size` that there are."""

    size: int
    items: list[Item]
    distances: Annotated[list[int], Field(description="From the first, in bits.")]


class Groups(_Model):
    """Groups of copies, and whether there are more."""

    groups: list[Group]
    more: bool


class Verdict(_Model):
    """That two items are the same, or different, whatever their codes say."""

    a: Id
    b: Id
    verdict: Literal["same", "different"]


class Calibration(_Model):
    """How many copies of images, and how many others, were found at each distance, by which a radius is chosen."""

    source: str
    copies: Annotated[dict[str, list[int]], Field(description="By kind, at each distance from 0.")]
    others: list[float]
    items: Annotated[int | None, Field(description="Among how many the others were found.")]


class Info(BaseModel):
    """What the collection holds."""

    model_config = ConfigDict(extra="allow")

    items: int
    paths: int
    model: str
    bits: int
    fingerprint: str
    generation: int
    read_only: bool


class Health(_Model):
    """That all is well."""

    status: str


def validate(model: type[M], value: Any, *, text: bool = False) -> M:
    """Return the value as a model. Raise Problem 422 for an invalid value. With `text` all members are strings."""
    try:
        return model.model_validate_strings(value) if text else model.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        location = ".".join(map(str, first["loc"])) or "the request"
        raise Problem(422, f"{location}: {first['msg']}", "ValueError") from None


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text. Raise Problem 400 for invalid JSON or a lone surrogate, 413 for a long text."""
    if len(data) > MAX_JSON_BYTES:
        raise Problem(413, f"the JSON has more than {MAX_JSON_BYTES // 2**10} KiB: send less at a time", "TooLarge")
    try:
        value = _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
        if b"\\u" in data:  # an escape can make a lone surrogate, which has no encoding
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # a UnicodeError is a ValueError
        raise Problem(400, f"invalid JSON: {one_line(error)}", "ValueError") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would build one per call


def to_json(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON response. Paths that are not UTF-8 have the lone surrogates of Python's
    surrogateescape."""
    return json_response(json.dumps(value, separators=(",", ":")).encode(), status)


def json_response(text: bytes, status: int = 200) -> Response:
    """Return a JSON text as a response."""
    return Response(text, status, media_type="application/json")
