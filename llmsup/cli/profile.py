"""`llmsup profile`: which profiles there are, what one says, and what is wrong with it."""

import json
import os
from typing import Annotated

import typer

from llmsup.config.dump import document, toml
from llmsup.config.load import load, look
from llmsup.config.paths import paths
from llmsup.config.profiles import available, find
from llmsup.config.wording import one_line
from llmsup.host.choices import profile_meant

app = typer.Typer(help="Profiles: list, show, validate.", no_args_is_help=True)

Name = Annotated[
    str | None,
    typer.Argument(metavar="[PROFILE]", help="A name, or the path of a TOML file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value; may be repeated."),
]


@app.command("list")
def list_profiles(*, as_json: AsJson = False) -> None:
    """The profiles that can be named."""
    profiles = available(paths().config)
    if as_json:
        rows = [
            {
                "name": profile.name,
                "origin": profile.origin,
                "summary": profile.summary,
                "path": str(profile.path),
            }
            for profile in profiles
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not profiles:
        typer.echo(f"no profiles in {paths().profiles}", err=True)
    width = max((len(profile.name) for profile in profiles), default=0)
    for profile in profiles:
        row = f"{profile.name:<{width}}  {profile.origin:<7}  {profile.summary}"
        typer.echo(row.rstrip())


@app.command()
def show(name: Name = None, *, settings: Settings = None, as_json: AsJson = False) -> None:
    """What is in effect: variables filled in, defaults added, paths found, secrets masked.

    A profile whose model files are missing is shown, too; they are named on stderr.
    """
    loaded, missing = look(
        name or profile_meant(paths(), os.environ),
        environ=os.environ,
        overrides=settings or (),
        config_dir=paths().config,
    )
    table = document(loaded.profile)
    if as_json:
        typer.echo(json.dumps(table, indent=2))
    else:
        typer.echo(f"# {one_line(f'{loaded.name}: {loaded.path}')}\n{toml(table)}")
    if missing is not None:
        for problem in missing.problems:
            typer.echo(f"missing: {problem}", err=True)
        typer.echo(f"hint: {missing.hint}", err=True)


@app.command()
def validate(name: Name = None, *, settings: Settings = None) -> None:
    """Every problem of a profile, one a line; exit 2 where there is one."""
    loaded = load(
        name or profile_meant(paths(), os.environ),
        environ=os.environ,
        overrides=settings or (),
        config_dir=paths().config,
    )
    services = _counted(len(loaded.profile.service), "service")
    routes = _counted(len(loaded.profile.route), "route")
    typer.echo(f"{loaded.name}: ok ({services}, {routes})")


@app.command()
def path(name: Name = None) -> None:
    """The file of a profile."""
    typer.echo(find(name or profile_meant(paths(), os.environ), paths().config))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
