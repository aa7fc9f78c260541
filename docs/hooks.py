"""MkDocs hooks: the command reference from the Typer application, and a check that pages load no foreign file."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import typer

from hashret.cli.app import app

COMMANDS = "<!-- commands -->"  # in a page, stands for the reference of all commands
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of the reference of commands by the reference."""
    return markdown.replace(COMMANDS, command_reference()) if COMMANDS in markdown else markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Refuse pages that would load a file from another host."""
    from mkdocs.exceptions import PluginError

    for page in sorted(Path(config["site_dir"]).rglob("*.html")):
        loader = _Loaded()
        loader.feed(page.read_text("utf-8"))
        foreign = [address for address in loader.addresses if re.match(r"(https?:)?//", address)]
        if foreign:
            raise PluginError(f"{page} loads {', '.join(foreign)}: keep a copy in docs/ instead")


class _Loaded(HTMLParser):
    """The addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev", "alternate"):
            return
        if tag in LOADING and (address := values.get(LOADING[tag])):
            self.addresses.append(address)


def command_reference() -> str:
    """Return Markdown with a section for each command, made from its `--help`."""
    root: Any = typer.main.get_command(app)
    return "\n\n".join(_sections("hashret", root))


def _sections(name: str, command: Any) -> list[str]:
    if not hasattr(command, "commands"):
        return [_section(name, command)]
    return [section for child, below in command.commands.items() for section in _sections(f"{name} {child}", below)]


def _section(name: str, command: Any) -> str:
    context: Any = command.make_context(name, [], resilient_parsing=True)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    parts = [f"## {name}", f"```\n{name} {' '.join(command.collect_usage_pieces(context))}\n```", _plain(command.help)]
    parts += [_table(context, "argument", arguments), _table(context, "option", options)]
    return "\n\n".join(part for part in parts if part)


def _plain(text: str | None) -> str:
    """Return a docstring as paragraphs of Markdown."""
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(_escaped(" ".join(paragraph.split())) for paragraph in paragraphs)


def _table(context: Any, title: str, params: list[Any]) -> str:
    """Return a table of names and descriptions, in the order of `--help`."""
    records = [record for param in params if (record := param.get_help_record(context))]
    if not records:
        return ""
    rows = [f"| `{names.strip()}` | {_escaped(' '.join(text.split()))} |" for names, text in records]
    return "\n".join([f"| {title} | |", "| --- | --- |", *rows])


def _escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return re.sub(r"([|*_`\[\]])", r"\\\1", html.escape(text, quote=False))
