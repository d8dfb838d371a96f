"""``p2pkv keys``: make the cell's keys, and rotate them without downtime."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from p2pkv.errors import ConfigError, InvalidArgument
from p2pkv.gossip.keyfile import read, write
from p2pkv.gossip.keyring import KEY_BYTES, Key, Keyring

app = typer.Typer(
    help="Make and rotate the keys of a cell. Each step goes to every node before the next: install, use, remove.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Option("--file", metavar="PATH", help="The key file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="A key's id, as `p2pkv keys list` shows it.")]


@app.command()
def generate(file: File, json_: Json = False) -> None:
    """Make a key file with one new key. Refuses where there is a file already."""
    if os.path.lexists(file):
        raise ConfigError("there is a file already", path=file, hint="`p2pkv keys install` adds a key to it.")
    _save(file, Keyring([Key(secrets.token_bytes(KEY_BYTES))]), json_)


@app.command("list")
def list_(file: File, json_: Json = False) -> None:
    """Show the ids of the keys; the one in use is the first."""
    _show(read(file), json_)


@app.command()
def install(
    file: File,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="PATH", help="A key file with the key; default: a new key.")
    ] = None,
    json_: Json = False,
) -> None:
    """Add a key. Frames that are sealed with it are opened from now on; none are sealed with it yet."""
    keyring = read(file)
    added = Key(secrets.token_bytes(KEY_BYTES)) if source is None else read(source).in_use
    _save(file, keyring.install(added), json_)


@app.command()
def use(file: File, key: Id, json_: Json = False) -> None:
    """Seal with another key that is installed. First see that every node has it."""
    _save(file, read(file).use(_id(key)), json_)


@app.command()
def remove(file: File, key: Id, json_: Json = False) -> None:
    """Take a key out that is not in use. First see that no node uses it any more."""
    _save(file, read(file).remove(_id(key)), json_)


def _id(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError as error:
        raise InvalidArgument("a key's id is hexadecimal", id=text, hint="`p2pkv keys list` shows them.") from error


def _save(file: Path, keyring: Keyring, json_: bool) -> None:
    write(file, keyring)
    _show(keyring, json_)


def _show(keyring: Keyring, json_: bool) -> None:
    ids = [f"{key.id:08x}" for key in keyring]
    if json_:
        print(json.dumps({"in_use": ids[0], "installed": ids}))
        return
    for name in ids:
        print(f"{name}  in use" if name == ids[0] else name)
