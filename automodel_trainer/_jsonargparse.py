"""Every private jsonargparse name (jsonargparse 4.53): the one file to check after an upgrade."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any


def all_actions(parser: ArgumentParser) -> list[Any]:
    """The arguments of a parser and of its subcommands' parsers."""
    nested = [each for action in parser._actions for each in getattr(action, "_name_parser_map", {}).values()]
    return [action for each in (parser, *nested) for action in each._actions]
