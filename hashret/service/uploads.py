"""Images that come in requests: one as it is, or several as the files of a form."""

from typing import Any, NamedTuple

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hashret.results import MAX_QUERIES
from hashret.service.problems import Problem

BINARY = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}


class Upload(NamedTuple):
    """Images that came in a request, each with its name, and the fields that came with them."""

    images: list[tuple[str | None, bytes]]
    fields: dict[str, str]
    metadata: list[str]


def media_type(request: Request) -> str:
    """What a request says that its body is."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_upload(request: Request) -> Upload:
    """The images of a request that is one, or a form with files; raises Problem for any other."""
    kind = media_type(request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload([(None, await request.body())], {}, [])
    if kind != "multipart/form-data":
        raise Problem(415, "send an image as image/*, images as multipart/form-data, or codes and ids as JSON")
    try:
        form = await request.form(max_files=MAX_QUERIES, max_fields=MAX_QUERIES + 16, max_part_size=2**16)
    except HTTPException as error:
        raise Problem(422 if "Too many" in str(error.detail) else 400, str(error.detail), "ValueError") from None
    upload = Upload([], {}, [])
    try:
        for name, value in form.multi_items():
            await _take(upload, name, value)
    finally:
        await form.close()
    if not upload.images:
        raise Problem(422, "file: give an image", "ValueError")
    return upload


async def read_images(request: Request) -> list[bytes]:
    """The images of a request that may have nothing else."""
    upload = await read_upload(request)
    if upload.fields or upload.metadata:
        raise Problem(422, f"{next(iter(upload.fields), 'metadata')}: there is no such field here", "ValueError")
    return [image for _, image in upload.images]


async def _take(upload: Upload, name: str, value: UploadFile | str) -> None:
    """Add a part of a form."""
    if isinstance(value, UploadFile):
        if name != "file":
            raise Problem(422, f"{name[:40]}: files go in the field 'file'", "ValueError")
        upload.images.append((value.filename or None, await value.read()))
    elif name == "metadata":
        upload.metadata.append(value)
    elif name == "file":
        raise Problem(422, "file: give a file, with a name, not a text", "ValueError")
    else:
        upload.fields[name] = value


def documented_body(fields: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The OpenAPI of a body of images, by a form with these fields besides, or a single one as it is."""
    files = {"type": "array", "items": BINARY["schema"], "minItems": 1, "maxItems": MAX_QUERIES}
    form = {"type": "object", "required": ["file"], "properties": {"file": files, **fields}}
    content = {"multipart/form-data": {"schema": form}, "image/*": BINARY, "application/octet-stream": BINARY}
    return {"required": True, "content": content | (more or {})}
