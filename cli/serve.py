"""hashret serve: the collection over HTTP, with a page for the browser."""

import os
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Quiet, say, usage
from hashret.errors import HashretError


def serve(
    collection: CollectionFolder = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 is any free one.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(help="The token that a client needs in order to write. [default: $HASHRET_TOKEN]", metavar="TEXT"),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse all changes.")] = False,
    origin: Annotated[
        list[str] | None,
        typer.Option("--origin", metavar="URL", help="Allow web pages of this origin; repeatable."),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Serve the collection over HTTP, with a page for the browser.

    Ctrl-C or SIGTERM stops it. On any other address than a loopback address, reading needs the token too, and one is
    generated if none is given.
    """
    import secrets

    from hashret.collection import Collection, locate

    try:
        from hashret.service.access import is_loopback
        from hashret.service.app import create_app
        from hashret.service.server import listen
        from hashret.service.server import serve as run
    except ImportError as error:
        raise HashretError(f"serving needs more packages ({error.name}): pip install 'hashret[serve]'") from None
    token = token or os.environ.get("HASHRET_TOKEN") or (None if is_loopback(host) else secrets.token_urlsafe(24))
    with Collection.open(locate(collection), read_only=read_only) as images, listen(host, port) as listener:
        with usage("--origin"):
            app = create_app(images, host=host, token=token, origins=origin or [])
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        run(app, listener, lambda: say(f"serving {images.path} at {url}", quiet))
    return 0
