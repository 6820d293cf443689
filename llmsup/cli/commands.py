"""The verbs of `llmsup` with their options, as Typer commands.

A verb's module is imported when the verb is called, so that none waits for what others need.
"""
# ruff: noqa: PLC0415

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsup import __version__
from llmsup.cli import complete
from llmsup.cli.terminal import show
from llmsup.config.units import parse_duration_s, parse_size_bytes
from llmsup.errors import UsageError

app = typer.Typer(
    help="Keeps a local LLM stack up on one small GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Where Typer keeps it has changed between releases.
_TYPER_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

Services = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SERVICE",
        help="Services of the stack. Default: all of it.",
        autocompletion=complete.services,
    ),
]
Profile = Annotated[
    str | None,
    typer.Argument(
        metavar="PROFILE",
        help="A profile's name or file. Default: what is up or was switched to, else "
        "LLMSUP_PROFILE, else dual.",
        autocompletion=complete.profiles,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the profile."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Now = Annotated[bool, typer.Option("--now", help="Do not wait for requests in flight.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")]
Lines = Annotated[
    int, typer.Option("--lines", "-n", metavar="N", min=0, help="How many of the last lines.")
]


def _seconds(text: str) -> float:
    try:
        return parse_duration_s(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _mebibytes(text: str) -> int:
    """Bytes in `text`: a size with a unit, or a number of MiB."""
    from llmsup.config.wording import quoted

    try:
        return parse_size_bytes(f"{text}MiB" if text.isdecimal() else text)
    except ValueError:
        expected = f"expected MiB or a size with a unit, as 6141 or 6GiB, got {quoted(text)}"
        raise typer.BadParameter(expected) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"llmsup {__version__}")
        raise typer.Exit


@app.callback()
def llmsup(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Keeps a local LLM stack up on one small GPU."""


@app.command()
def start(
    source: Profile = None,
    overrides: Overrides = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Be the daemon, with its log on stderr.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return once the daemon answers.")
    ] = False,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout", parser=_seconds, metavar="TIME", help='Give up after, as "90s".'),
    ] = None,
) -> None:
    """Bring the stack up and show each service until it is ready."""
    from llmsup.cli import start as verb

    if foreground and (no_wait or timeout_s is not None):
        raise UsageError(
            "--foreground excludes --no-wait and --timeout: it is the daemon",
            hint="llmsup start -h",
        )
    if foreground:
        verb.start_in_foreground(source, overrides or ())
    else:
        verb.start(source, overrides or (), wait=not no_wait, timeout_s=timeout_s)


@app.command()
def stop(services: Services = None, now: Now = False) -> None:
    """Stop some services, or the whole stack and its daemon."""
    from llmsup.cli import stop as verb

    if services:
        verb.stop_services(services, now=now)
    else:
        verb.stop_stack(now=now)


@app.command()
def restart(
    services: Services = None,
    now: Now = False,
    daemon: Annotated[
        bool, typer.Option("--daemon", help="Replace the daemon; services are not touched.")
    ] = False,
) -> None:
    """Give some services, or all but the gateway, a new process, one after another."""
    from llmsup.cli import restart as verb

    if not daemon:
        verb.restart(services or (), now=now)
    elif services or now:
        raise UsageError("--daemon goes with nothing else", hint="llmsup restart --daemon")
    else:
        verb.restart_daemon()


@app.command()
def switch(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A service with a model; in single mode it becomes the active one. "
            "Or another profile.",
            autocompletion=complete.targets,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE", help="A GGUF file. Default: the profile's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Have a service serve another model, or switch to another profile.

    What served before comes back where that fails.
    """
    from llmsup.cli import switch as verb

    verb.switch(target, model, as_json=as_json)


@app.command()
def reload() -> None:
    """Bring about what the profile says now; touch only the services that it changes."""
    from llmsup.cli import reload as verb

    verb.reload()


@app.command()
def status(
    as_json: Json = False,
    watching: Annotated[bool, typer.Option("--watch", help="Redraw every second.")] = False,
) -> None:
    """Show the services. Exit status: 0 all ready, 1 degraded, 3 not running, 4 unknown."""
    if watching and as_json:
        raise UsageError("--watch and --json exclude each other", hint="llmsup events -f --json")
    if watching:
        from llmsup.cli import watch as watch_verb

        watch_verb.watch()
    else:
        from llmsup.cli import status as verb

        raise typer.Exit(verb.status(as_json=as_json))


@app.command()
def plan(
    source: Profile = None,
    *,
    total_bytes: Annotated[
        int | None,
        typer.Option(
            "--total", parser=_mebibytes, metavar="MIB", help="Suppose a card of so much."
        ),
    ] = None,
    free_bytes: Annotated[
        int | None,
        typer.Option(
            "--free",
            parser=_mebibytes,
            metavar="MIB",
            help="Suppose so much of it free. Default: all of --total.",
        ),
    ] = None,
    overrides: Overrides = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what each model's memory consists of.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show who gets what of the card, without starting anything. Exit status 1: it does not fit."""
    from llmsup.cli import plan as verb

    verb.plan(
        source,
        overrides or (),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        as_json=as_json,
        is_verbose=verbose,
    )


@app.command()
def logs(
    service: Annotated[
        str,
        typer.Argument(
            metavar="SERVICE", help='A service, or "daemon".', autocompletion=complete.logs
        ),
    ],
    follow: Follow = False,
    lines: Lines = 50,
) -> None:
    """Show the output of a service, or the daemon's own log."""
    from llmsup.cli import logs as verb

    verb.logs(service, lines=lines, follow=follow)


@app.command()
def events(follow: Follow = False, as_json: Json = False, lines: Lines = 50) -> None:
    """Show state changes and what was published to the gateway."""
    from llmsup.cli import events as verb

    verb.events(lines=lines, follow=follow, as_json=as_json)


@app.command()
def why(
    service: Annotated[
        str,
        typer.Argument(metavar="SERVICE", help="A service.", autocompletion=complete.deaths),
    ],
    last: Annotated[
        int, typer.Option("-n", metavar="N", min=1, help="How many of its last deaths.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Show why a service died: cause, last output, what followed, and where it is kept."""
    from llmsup.cli import why as verb

    verb.why(service, last=last, as_json=as_json)


@app.command()
def upstreams(as_json: Json = False) -> None:
    """Show the upstream lists: as desired, as published, and as Envoy has them."""
    from llmsup.cli import upstreams as verb

    verb.upstreams(as_json=as_json)


@app.command()
def drill(
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCENARIO",
            help="load, kill, hang, daemon, gateway, disk or crashloop. Default: all of them "
            "that let no request fail here.",
            autocompletion=complete.scenarios,
        ),
    ] = None,
    as_json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the evidence goes."),
    ] = None,
) -> None:
    """Break the stack on purpose under light traffic, and show what requests felt."""
    from llmsup.cli import drill as verb

    raise typer.Exit(verb.drill(scenarios or (), as_json=as_json, out=out))


@app.command()
def mcp() -> None:
    """Serve MCP on stdin and stdout, for a client that starts it; see docs/mcp.md."""
    from llmsup.cli import mcp as verb

    verb.mcp()


def call(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status. Raises LlmsupError and OutputClosedError."""
    _mount_groups(argv)
    command: Any = typer.main.get_command(app)
    _hide_types(command)
    try:
        result = command.main(args=_spelled(argv), prog_name="llmsup", standalone_mode=False)
    except _TYPER_USAGE_ERROR as error:
        return _refuse(error)
    except typer.Abort:
        return 1
    except SystemExit as end:
        result = end.code
    return result if isinstance(result, int) else 0


def _spelled(argv: Sequence[str]) -> list[str]:
    """The command line with what people try first as what it is called here."""
    match list(argv):
        case ["version"]:
            return ["--version"]
        case ["help", *verb]:
            return [*verb, "--help"]
    return list(argv)


def _refuse(error: Any) -> int:
    """A usage error as a line and a hint; the help where nothing at all was said."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return UsageError.exit_code
    words = " ".join(error.format_message().split()).removesuffix(".")
    command = error.ctx.command_path if error.ctx else "llmsup"
    raise UsageError(words[:1].lower() + words[1:], hint=f"{command} -h") from None


def _hide_types(command: Any) -> None:
    """Leave Python's types out of the help: "SERVICE", not "SERVICE <list[str]>"."""
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None  # noqa: ARG005
    for nested in getattr(command, "commands", {}).values():
        _hide_types(nested)


def _mount_groups(argv: Sequence[str]) -> None:
    """Add the groups of verbs, unless another verb is called: they import what reads profiles."""
    verbs = {info.callback.__name__ for info in app.registered_commands if info.callback}
    if verbs.union({"version", "--version", "-V"}).isdisjoint(argv[:1]):
        from llmsup.cli import profile, service

        app.add_typer(profile.app, name="profile")
        app.add_typer(service.app, name="service")
