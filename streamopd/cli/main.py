"""The verbs. What a verb does is imported when it is asked for: `--help` stays fast."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from streamopd import __version__
from streamopd.errors import StreamError, StreamopdError, UserError
from streamopd.topology import SERVICES

from . import methods

app = typer.Typer(
    name="streamopd", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Asynchronous on-policy distillation as a stream.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show a run's settings, or every key there is.")
app.add_typer(config_app, name="config")
probe_app = typer.Typer(no_args_is_help=True, help="Find out what something can do, before a run.")
app.add_typer(probe_app, name="probe")
app.add_typer(methods.app, name="methods")

Recipe = Annotated[str, typer.Argument(help="A run file (TOML), or the name of a recipe that comes with streamopd.")]
Overrides = Annotated[list[str], typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a key, e.g. -s learn.lr=1e-5.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder; runs/<name> when not given.")]
Folder = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006  typer reads the default, nobody changes it
    out: Out = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="All services in this process, the stream in memory.")] = False,
    attend: Annotated[bool, typer.Option("--attend", help="The services are started elsewhere: prepare, watch, and tell the end.")] = False,
    stop_redis: Annotated[bool, typer.Option("--stop-redis", help="With --attend: the broker at redis.url ends with the run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run folder holds and start over.")] = False,
) -> None:
    """Run a whole distillation here: all services as local processes, to the end, with its report."""
    from .run import run_here

    ways = {"in_process": in_process, "attend": attend, "stop_redis": stop_redis, "fresh": fresh}
    raise typer.Exit(run_here(recipe, overrides, out, **ways))


@app.command()
def secrets(folder: Annotated[Path, typer.Argument(help="Where they go.")]) -> None:
    """Make credentials for a broker of your own: one file a service, and redis.acl for the server."""
    from .credentials import write_secrets

    for file in write_secrets(folder):
        print(file)


@app.command()
def status(folder: Folder) -> None:
    """Who works, who waits for whom, and who is behind."""
    from .look import show_status

    raise typer.Exit(show_status(folder))


@app.command()
def quarantine(folder: Folder) -> None:
    """What could not be trusted, with its reason."""
    from .look import show_quarantine

    raise typer.Exit(show_quarantine(folder))


@app.command()
def report(folder: Folder) -> None:
    """Write report.html again from what the run folder holds."""
    from streamopd.watch.report import write_report

    print(write_report(folder))


@app.command("serve-teacher")
def serve_teacher(
    model: Annotated[str, typer.Argument(help='An HF folder, or "asset:NAME".')],
    host: Annotated[str, typer.Option(help="Where to listen; beyond loopback a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8001,
    key_env: Annotated[str, typer.Option(help="The environment variable with the bearer token to ask for.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    token_budget: Annotated[int, typer.Option(help="Tokens in one forward, padding included.")] = 4096,
) -> None:
    """Serve a model as a teacher for runs elsewhere: docs/teachers.md says what is spoken."""
    from .teach import serve_teacher as serve

    serve(model, host, port, key_env, dtype, token_budget)


@probe_app.command("teacher")
def probe_teacher(recipe: Recipe, overrides: Overrides = []) -> None:  # noqa: B006
    """What a run finds out about its teachers outside before its first step."""
    from .teach import probe_teachers

    probe_teachers(recipe, overrides)


@config_app.command("show")
def config_show(recipe: Recipe, overrides: Overrides = []) -> None:  # noqa: B006
    """Every key of a run file with its value and where that came from."""
    from streamopd import config

    loaded, origins = config.load(recipe, overrides)
    for key, value in config.flat(loaded).items():
        print(f"{key} = {value!r:<40} # {origins.get(key, 'default')}")


@config_app.command("reference")
def config_reference() -> None:
    """Every key there is, with its default."""
    from streamopd import config

    for key, value in config.reference():
        print(f"{key} = {value!r}")


def _service_command(service: str) -> None:
    def command(
        recipe: Recipe,
        overrides: Overrides = [],  # noqa: B006
        out: Out = None,
        instance: Annotated[str, typer.Option(help="A name for this replica.")] = "",
    ) -> None:
        from .run import serve_here

        raise typer.Exit(serve_here(service, recipe, overrides, out, instance, "--debug" in sys.argv))

    command.__doc__ = f"The {service} alone, for the run in --out (or a run folder in place of the recipe)."
    app.command(service, rich_help_panel="Services")(command)


for _service in SERVICES:
    _service_command(_service)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """The entry point: a person sees one paragraph, `--debug` shows the trace, the exit code tells the truth."""
    debug = "--debug" in sys.argv
    try:
        app([word for word in sys.argv[1:] if word != "--debug"])
    except (UserError, StreamError) as error:
        _explain(error, debug)
        sys.exit(2)
    except (StreamopdError, OSError) as error:
        _explain(error, debug)
        sys.exit(1)


def _explain(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"streamopd: {error}", file=sys.stderr)
