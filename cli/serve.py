"""hashret serve: the collection over HTTP, and its page for the browser."""

import os
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Quiet, say, usage
from hashret.errors import HashretError


def serve(
    collection: CollectionFolder = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 is any that is free.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None, typer.Option(help="What whoever writes must know. [default: $HASHRET_TOKEN]", metavar="TEXT")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Change nothing.")] = False,
    origin: Annotated[
        list[str] | None, typer.Option("--origin", metavar="URL", help="Let pages from there use the service.")
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Serve the collection over HTTP until Ctrl-C or SIGTERM.

    Off loopback every route needs a token, which is made up if none is given.
    """
    import secrets

    from hashret.collection import Collection, locate

    try:
        from hashret.service.app import create_app
        from hashret.service.guard import is_loopback
        from hashret.service.server import listen
        from hashret.service.server import serve as run
    except ImportError as error:
        raise HashretError(f"serving needs more packages ({error.name}): pip install 'hashret[serve]'") from None
    token = token or os.environ.get("HASHRET_TOKEN") or (None if is_loopback(host) else secrets.token_urlsafe(24))
    with Collection.open(locate(collection), read_only=read_only) as there, listen(host, port) as listening:
        with usage("--origin"):
            app = create_app(there, host=host, token=token, origins=origin or [])
        shown = f"[{host}]" if ":" in host else host
        page = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
        run(app, listening, lambda: say(f"{there.path} at {page}", quiet))
    return 0
