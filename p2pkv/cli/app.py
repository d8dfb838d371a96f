"""The typer application that :func:`p2pkv.cli.main` runs: a group that loads a subcommand when it is called for."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import p2pkv
from p2pkv.cli import COMMANDS

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class LazyGroup(TyperGroup):
    """A group whose members are names and one-line helps until one of them is called.

    The list that ``--help`` prints needs no module of any command. Everything else (running, a command's own help) asks
    :meth:`get_command`, which imports that one module.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._listing = False
        for name, text in COMMANDS.items():
            self.commands[name] = TyperCommand(name=name, help=text, callback=None, params=[])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the group's help from the one-line helps alone."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of :data:`~p2pkv.cli.COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The real command, imported now; a stand-in while help is listed; ``None`` for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        if self._listing:
            return self.commands[cmd_name]
        return load(cmd_name)


def load(name: str) -> Any:
    """Import ``p2pkv.cli.<name>`` and make its command.

    Raises:
        ImportError: the module, or something that it needs, is not installed.
    """
    module = importlib.import_module(f"p2pkv.cli.{name}")
    application = getattr(module, "app", None)
    if application is None:
        application = typer.Typer(
            add_completion=False,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            context_settings=CONTEXT_SETTINGS,
        )
        application.command(name)(getattr(module, name))
    loaded = typer.main.get_command(application)
    loaded.name = name
    return loaded


def command() -> Any:
    """The whole command line, ready to be called with arguments."""
    application = typer.Typer(
        cls=LazyGroup,
        help="Peer-to-peer KV-cache sharing between LLM replicas.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # plain help: rich costs more to import than all the rest
        pretty_exceptions_enable=False,
        context_settings=CONTEXT_SETTINGS,
    )
    application.callback()(_options)
    return typer.main.get_command(application)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"p2pkv {p2pkv.__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a subcommand."""
