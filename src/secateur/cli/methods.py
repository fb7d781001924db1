"""``secateur methods``: the plug-ins there are, and the options of one of them. No torch is imported."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from secateur.cli import console, tables
from secateur.cli.options import Debug, Json
from secateur.errors import UnknownNameError
from secateur.plugins import available, describe

KINDS = {
    "combinations": "method",
    "methods": "method",
    "criteria": "method for --structure",
    "expert_criteria": "method for --structure experts",
    "allocation": "allocation",
    "schedules": "schedule",
    "formats": "format",
    "conversions": "conversion",
}
"""Folder of plug-ins -> what one of them is called."""


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", show_default=False, help="Tell all about this one, options included."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List methods (for weights, units, experts), allocation rules, schedules, export formats and conversions."""
    found = {kind: available(kind) for kind in KINDS}
    if name is None:
        if json:
            console.write(json_format.dumps(found, indent=2))
        else:
            console.show(tables.plugins(found))
        return
    told = {kind: describe(kind, name, noun) for kind, noun in KINDS.items() if name in found[kind]}
    if not told:
        raise UnknownNameError("method", name, sorted({known for names in found.values() for known in names}))
    if json:
        rows = [
            {"name": name, "kind": kind, "doc": one.doc, "options": [vars(option) for option in one.options]}
            for kind, one in told.items()
        ]
        console.write(json_format.dumps({**rows[0], "others": rows[1:]}, indent=2))
        return
    for one in told.values():
        console.show(tables.plugin(one))
