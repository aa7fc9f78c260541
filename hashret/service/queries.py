"""Queries by code and by item, which come as JSON, and by one image, which comes as it is.

They take less work than FastAPI's and Starlette's layers would, so the guard hands them straight to `Queries`. What is
asked, answered and refused is the same as by the ordinary way.
"""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from hashret.errors import HashretError
from hashret.service import MOST_HITS, messages
from hashret.service.guard import Message, Receive, Send
from hashret.service.messages import parse_json, validate
from hashret.service.problems import Problem, to_problem, to_response
from hashret.service.work import Question, Wanted, Work


class Queries:
    """ASGI application of the route."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            body = await _body(receive)
            if is_image(scope):
                answer = await answer_image(self._work, body, scope["query_string"])
            else:
                answer = await answer_json(self._work, body)
        except ClientDisconnect:
            await Response(status_code=400)(scope, receive, send)  # to nobody
        except (Problem, HashretError) as error:
            await to_response(to_problem(error))(scope, receive, send)
        except Exception as error:
            await to_response(to_problem(error))(scope, receive, send)
            raise  # for the log
        else:
            headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})


async def answer_json(work: Work, body: bytes) -> bytes:
    """The answer to a query by JSON, as JSON."""
    questions, several = _questions(parse_json(body))
    return await answer(work, questions, several=several)


async def answer_image(work: Work, image: bytes, address: bytes) -> bytes:
    """The answer to a query by an image, whose options stand in the address, as JSON."""
    wanted = _PLAIN
    if address:
        wanted = wanted_of(validate(messages.ImageOptions, dict(QueryParams(address)), text=True))
    return await answer(work, [Question(None, image, False, wanted)], several=False)


async def answer(work: Work, questions: Sequence[Question], *, several: bool) -> bytes:
    """The answers to questions of one kind as JSON: a list if there may be several."""
    wanted = questions[0].wanted
    gather = work.gather_for(questions)
    if not several:
        return await gather.ask(questions[0])
    if wanted.k * len(questions) > MOST_HITS:
        each = MOST_HITS // len(questions)
        raise Problem(422, f"k: at most {each} for so many queries, which is {MOST_HITS:,} in all", "ValueError")
    return b"[" + b",".join(await gather.ask_all(questions)) + b"]"


def wanted_of(options: messages.Options) -> Wanted:
    rank = options.rank if isinstance(options, messages.ImageOptions) else "distance"
    return Wanted(options.most, options.max_distance, options.where, rank, options.codes)


_PLAIN = wanted_of(messages.ImageOptions())


def is_image(scope: Message) -> bool:
    """Whether a request says that its body is an image."""
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return bool(kinds) and kinds[-1].lstrip().lower().startswith(b"image/")


def _questions(asked: Any) -> tuple[list[Question], bool]:
    """The queries of a JSON body, and whether their answer is a list."""
    if not isinstance(asked, dict):
        raise Problem(422, "the request: give an object with code or id", "ValueError")
    if "id" in asked:
        item = validate(messages.ById, asked)
        return [Question(f"id:{item.id}", item.id, False, wanted_of(item))], False
    several = isinstance(asked.get("code"), list)
    query: messages.ByCode | messages.ByCodes
    query = validate(messages.ByCodes, asked) if several else validate(messages.ByCode, asked)
    texts = query.code if isinstance(query.code, list) else [query.code]
    wanted = wanted_of(query)
    return [Question(f"hex:{text}", bytes.fromhex(text), True, wanted, query.fingerprint) for text in texts], several


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
