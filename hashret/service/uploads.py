"""Uploaded images: the body of a request, or the files of a form."""

from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hashret.errors import one_line
from hashret.results import MAX_QUERIES
from hashret.service.problems import Problem

BINARY = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}


class Upload(NamedTuple):
    """The images of a request, each with its file name, and the fields and metadata of its form."""

    images: list[tuple[str | None, bytes]]
    fields: dict[str, str]
    metadata: list[str]


def media_type(request: Request) -> str:
    """Return the media type of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_upload(request: Request) -> Upload:
    """Read the images of a request. Raise Problem for a body that is neither an image nor a form with files."""
    body_type = media_type(request)
    if body_type.startswith("image/") or body_type == "application/octet-stream":
        return Upload([(None, await request.body())], {}, [])
    if body_type != "multipart/form-data":
        raise Problem(415, "send an image as image/*, images as multipart/form-data, or codes and ids as JSON")
    try:
        form = await request.form(max_files=MAX_QUERIES, max_fields=MAX_QUERIES + 16, max_part_size=2**16)
    except HTTPException as error:
        raise Problem(422 if "Too many" in str(error.detail) else 400, str(error.detail), "ValueError") from None
    except FormParserError as error:  # which older versions of Starlette do not catch
        raise Problem(
            400, f"the multipart form is malformed ({one_line(error)}): send a valid one", "ValueError"
        ) from None
    upload = Upload([], {}, [])
    try:
        for name, value in form.multi_items():
            await _add_part(upload, name, value)
    finally:
        await form.close()
    if not upload.images:
        raise Problem(422, "file: give an image", "ValueError")
    return upload


async def read_images(request: Request) -> list[bytes]:
    """Read the images of a request. Raise Problem if it has fields or metadata."""
    upload = await read_upload(request)
    if upload.fields or upload.metadata:
        raise Problem(422, f"{next(iter(upload.fields), 'metadata')}: this route has no such field", "ValueError")
    return [image for _, image in upload.images]


async def _add_part(upload: Upload, name: str, value: UploadFile | str) -> None:
    """Add a part of a form to an upload."""
    if isinstance(value, UploadFile):
        if name != "file":
            raise Problem(422, f"{name[:40]}: files go in the field 'file'", "ValueError")
        upload.images.append((value.filename or None, await value.read()))
    elif name == "metadata":
        upload.metadata.append(value)
    elif name == "file":
        raise Problem(422, "file: give a file with a file name, not a text field", "ValueError")
    else:
        upload.fields[name] = value


def image_body(fields: dict[str, Any], other_types: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the OpenAPI of a body with images: a form, which may have these fields, or a single image."""
    files = {"type": "array", "items": BINARY["schema"], "minItems": 1, "maxItems": MAX_QUERIES}
    form = {"type": "object", "required": ["file"], "properties": {"file": files, **fields}}
    content = {"multipart/form-data": {"schema": form}, "image/*": BINARY, "application/octet-stream": BINARY}
    return {"required": True, "content": content | (other_types or {})}
