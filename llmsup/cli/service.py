"""`llmsup service`: the systemd unit that keeps the daemon."""

import os
import pwd
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmsup.cli import complete, terminal
from llmsup.config.load import load
from llmsup.config.paths import Paths, paths
from llmsup.config.profiles import default_name, find
from llmsup.control.client import daemon_is_alive
from llmsup.errors import ConfigError, LlmsupError, UsageError
from llmsup.host import choices
from llmsup.host.systemctl import Systemctl, is_wsl, lingers
from llmsup.services.systemd_unit import NAME, is_untouched, render

SYSTEM_UNITS = Path("/etc/systemd/system")
SYSTEM_HOME = "/var/lib/llmsup"
CARRIED = ("LLMSUP_HOME", "LLMSUP_LLAMA_SERVER", "LLMSUP_QDRANT", "LLMSUP_ENVOY", "LLMSUP_LOG")
"""Variables of this shell that the unit sets, too, since systemd knows nothing of them."""
CARRIED_BY_USER = ("XDG_CONFIG_HOME", "XDG_STATE_HOME")

app = typer.Typer(help="The systemd unit: install, uninstall, status.", no_args_is_help=True)

System = Annotated[
    bool, typer.Option("--system", help="The machine's service manager, not your own.")
]
Force = Annotated[bool, typer.Option("--force", help="Also where the unit was edited by hand.")]


@app.command()
def install(
    profile: Annotated[
        str | None,
        typer.Argument(
            metavar="PROFILE",
            help="A profile's name or file. Default: LLMSUP_PROFILE, else dual.",
            autocompletion=complete.profiles,
        ),
    ] = None,
    *,
    system: System = False,
    now: Annotated[bool, typer.Option("--now/--no-start", help="Start it, too.")] = True,
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="With --system: who it runs as.")
    ] = "",
    force: Force = False,
) -> None:
    """Write the unit, have systemd start it with every login (or boot), and start it now."""
    if user and not system:
        raise UsageError("--user goes with --system", hint="llmsup service install -h")
    unit = _unit(system=system)
    named = profile or default_name(os.environ)
    text = _rendered(unit, named, _owner(user) if system else None)
    _require_untouched(unit, force=force)
    _write(unit.path, text)
    terminal.say(f"wrote {unit.path}")
    if not unit.manager.answers():
        _explain_absence(unit)
        return
    for words in (("daemon-reload",), ("enable", NAME)):
        unit.manager.do(*words)
        terminal.say(unit.manager.said(*words))
    if now:
        _start(unit)
    if not system:
        _warn_of_choice(named, _home(unit))
        _warn_of_linger()


@app.command()
def uninstall(*, system: System = False, force: Force = False) -> None:
    """Stop the stack and remove the unit; profiles, state and logs are left alone."""
    unit = _unit(system=system)
    if not unit.path.exists():
        terminal.say(f"not installed: there is no {unit.path}")
        return
    _require_untouched(unit, force=force)
    if unit.manager.answers():
        unit.manager.do("disable", "--now", NAME)
        terminal.say(unit.manager.said("disable", "--now", NAME))
    try:
        unit.path.unlink()
    except OSError as error:
        raise _unwritable(unit.path, error) from None
    terminal.say(f"removed {unit.path}")
    if unit.manager.answers():
        unit.manager.do("daemon-reload")
    terminal.say(f"left alone: {_kept(unit)}")


@app.command()
def status(
    *,
    system: System = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the unit. Exit status: 0 active, 3 not."""
    unit = _unit(system=system)
    names = ("ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "StatusText")
    answers = unit.manager.answers()
    found = unit.manager.properties(NAME, names) if answers else {}
    linger = None if system else lingers(_me())
    facts: dict[str, object] = {
        "unit": str(unit.path),
        "file": _file_state(unit.path),
        "systemd": answers,
        "active": found.get("ActiveState") or None,
        "sub": found.get("SubState") or None,
        "enabled": found.get("UnitFileState") or None,
        "pid": int(found.get("MainPID") or 0) or None,
        "restarts": int(found["NRestarts"]) if found.get("NRestarts", "").isdigit() else None,
        "status": found.get("StatusText") or None,
        "linger": linger,
    }
    if as_json:
        terminal.show_json(facts)
    else:
        terminal.show("\n".join(f"{name:8}  {text}" for name, text in _lines(facts, system=system)))
    raise typer.Exit(0 if facts["active"] in {"active", "reloading", "activating"} else 3)


@dataclass(frozen=True)
class _Unit:
    """The unit file of one service manager."""

    is_system: bool
    path: Path
    manager: Systemctl


def _unit(*, system: bool) -> _Unit:
    directory = SYSTEM_UNITS if system else _user_units()
    return _Unit(system, directory / NAME, Systemctl(is_system=system))


def _user_units() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME") or ""
    base = Path(config) if config.startswith("/") else Path.home() / ".config"
    return base / "systemd" / "user"


def _rendered(unit: _Unit, profile: str, owner: tuple[str, str] | None) -> str:
    """The text of the unit. Raises ConfigError for a profile that it could not start."""
    environment = _environment(is_system=unit.is_system)
    # Named so, and not as an argument, it gives way to a profile that is switched to.
    environment["LLMSUP_PROFILE"] = _checked(profile, environment)
    program = _program()
    user, group = owner or ("", "")
    name = "llmsup-system.service" if unit.is_system else NAME
    try:
        return render(
            (_templates() / name).read_text(),
            start=(program, "start", "--foreground"),
            reload=(program, "reload"),
            environment=environment,
            user=user,
            group=group,
        )
    except ValueError as error:
        raise UsageError(str(error), hint="move it to a path without such characters") from None


def _environment(*, is_system: bool) -> dict[str, str]:
    names = CARRIED if is_system else (*CARRIED, *CARRIED_BY_USER)
    found = {name: text for name in names if (text := os.environ.get(name))}
    if is_system:
        found.setdefault("LLMSUP_HOME", SYSTEM_HOME)
    return found


def _checked(profile: str, environment: Mapping[str, str]) -> str:
    """The profile as the unit names it, seen to be good without the variables of this shell."""
    base = {name: os.environ[name] for name in ("HOME", "USER", "PATH") if name in os.environ}
    environ = {**base, **environment}
    config = paths(environ).config
    path = find(profile, config)
    try:
        load(path, environ=environ, config_dir=config)
    except ConfigError as error:
        try:
            load(path, environ=os.environ, config_dir=config)
        except ConfigError:
            raise error from None
        raise ConfigError(
            error.problems,
            hint="systemd does not see the variables of your shell: put them into env_file",
        ) from None
    return profile if path.stem == profile else str(path)


def _program() -> str:
    """The absolute path of this llmsup, as it was called: a link outlives an upgrade."""
    called = Path(sys.argv[0]).absolute()
    beside = Path(sys.executable).with_name("llmsup")
    for path in (called, beside):
        if path.name == "llmsup" and os.access(path, os.X_OK):
            return str(path)
    raise LlmsupError("cannot find the program llmsup", hint="pip install llmsup")


def _templates() -> Path:
    """Package data in a wheel; beside the package in an editable install."""
    package = Path(__file__).parents[1]
    packaged = package / "systemd"
    return packaged if packaged.is_dir() else package.parent / "systemd"


def _owner(name: str) -> tuple[str, str]:
    """User and group that the system unit runs as: the one named, or who called sudo."""
    user = name or os.environ.get("SUDO_USER") or _me()
    if user == "root":
        raise UsageError(
            "the stack does not run as root",
            hint="call it by sudo as the user it shall run as, or give --user NAME",
        )
    try:
        return user, str(pwd.getpwnam(user).pw_gid)
    except KeyError:
        raise UsageError(f"no such user: {user}", hint="sudo useradd --system NAME") from None


def _require_untouched(unit: _Unit, *, force: bool) -> None:
    if not force and _file_state(unit.path) == "edited":
        raise LlmsupError(
            f"{unit.path} was edited by hand",
            hint=f"--force takes no notice; a drop-in stays: {unit.manager.said('edit', NAME)}",
        )


def _file_state(path: Path) -> str:
    """ "absent", "as written" or "edited"."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        raise LlmsupError(f"cannot read {path}: {error.strerror}") from None
    return "as written" if is_untouched(text) else "edited"


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> LlmsupError:
    hint = "with --system it takes root: sudo" if path.parent == SYSTEM_UNITS else ""
    return LlmsupError(f"cannot write {path}: {error.strerror}", hint=hint)


def _start(unit: _Unit) -> None:
    """Start it, and do not wait for the models: `llmsup status` shows them."""
    home = _home(unit)
    main = unit.manager.properties(NAME, ("MainPID",)).get("MainPID")
    other = None if unit.is_system and "SUDO_USER" in os.environ else daemon_is_alive(home)
    if other and str(other) != main:
        terminal.say(f"not started: the stack is up without systemd (daemon pid {other})")
        terminal.say(f"hint: llmsup stop, then {unit.manager.said('start', NAME)}")
        return
    unit.manager.do("start", "--no-block", NAME)
    terminal.say(unit.manager.said("start", "--no-block", NAME))
    prefix = f"LLMSUP_HOME={SYSTEM_HOME} " if unit.is_system else ""
    terminal.say(f"starting: {prefix}llmsup status shows how it gets on")


def _home(unit: _Unit) -> Paths:
    return paths({**os.environ, **_environment(is_system=unit.is_system)})


def _explain_absence(unit: _Unit) -> None:
    whose = "of this machine" if unit.is_system else "of your own"
    terminal.say(f"not enabled: no service manager {whose} answers here")
    enable = unit.manager.said("enable", "--now", NAME)
    if is_wsl():
        hint = f"systemd=true below [boot] in /etc/wsl.conf, wsl --shutdown, then {enable}"
    else:
        hint = f"where systemd runs: {enable}; here: llmsup start"
    terminal.say(f"hint: {hint}")


def _warn_of_choice(profile: str, home: Paths) -> None:
    chosen = choices.peek(home.choices).profile
    if chosen not in {"", profile}:
        terminal.say(f"note: {chosen} was switched to, and is started until that is changed")
        terminal.say(f"hint: llmsup switch {profile}")


def _warn_of_linger() -> None:
    if lingers(_me()) is False:
        terminal.say("note: linger is off: the stack ends with your last login session")
        terminal.say("hint: loginctl enable-linger")


def _kept(unit: _Unit) -> str:
    home = _home(unit)
    return ", ".join(str(each) for each in (home.config, home.state, home.logs))


def _lines(facts: Mapping[str, object], *, system: bool) -> list[tuple[str, str]]:
    words = {"absent": "not installed", "as written": "installed", "edited": "edited by hand"}
    lines = [("unit", f"{facts['unit']} ({words[str(facts['file'])]})")]
    if not facts["systemd"]:
        lines.append(("systemd", "does not answer here"))
    else:
        sub = f" ({facts['sub']})" if facts["sub"] else ""
        lines.append(("systemd", f"{facts['active']}{sub}, {facts['enabled'] or 'not enabled'}"))
    if facts["pid"]:
        lines.append(("daemon", f"pid {facts['pid']}, restarted {facts['restarts'] or 0} times"))
    if facts["status"]:
        lines.append(("status", str(facts["status"])))
    if not system:
        linger = {True: "on", False: "off: it ends with your last login session", None: "unknown"}
        lines.append(("linger", linger[facts["linger"]]))  # type: ignore[index]
    return lines


def _me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
