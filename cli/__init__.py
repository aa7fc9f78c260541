"""hashret on the command line: `main` is what the `hashret` command runs. Only this package prints."""

from hashret.cli.app import main

__all__ = ["main"]
