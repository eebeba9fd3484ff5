"""`streamopd methods`: what there is, and what each of it is made of."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

PIPED = 400  # columns where no terminal says how many it has: a line a method

app = typer.Typer(invoke_without_command=True, help="The methods there are; `methods show NAME` tells all of one.")


@app.callback()
def table(context: typer.Context) -> None:
    """The methods there are."""
    if context.invoked_subcommand:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from streamopd import methods
    from streamopd.methods.about.describe import composition
    from streamopd.methods.about.needs import needs

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "paper", "evidence", "needs", "composition"):
        shown.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for name in methods.names():
        method = methods.load(name)
        made_of = f"= {method.alias_of}" if method.alias_of else composition(method)
        shown.add_row(method.name, method.paper, method.evidence_level, "; ".join(needs(method)), made_of)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPED).print(shown)


@app.command()
def show(name: Annotated[str, typer.Argument(help='The name of a method, or "my_file.py:NAME".')]) -> None:
    """The paper, what it needs of a run, and every setting."""
    from streamopd import methods
    from streamopd.methods.about.describe import card

    print(card(methods.load(name)))
