"""`llmsup service`, with stand-ins for systemctl and loginctl, and the unit as systemd reads it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llmsup.cli import service
from llmsup.config.files import digest
from tests.home import LLMSUP, REPOSITORY, Home

STAND_IN = """#!/bin/sh
# Stands in for {name}: records its calls, and answers what is written beside it.
echo "{name} $*" >> "{root}/calls"
case "$*" in
  *show*--property=Version*) cat "{root}/version" ;;
  *show-user*) cat "{root}/linger" ;;
  *show\\ llmsup.service*) cat "{root}/properties" ;;
  *) cat "{root}/refusal" >&2; test ! -s "{root}/refusal" ;;
esac
"""


class StandIn:
    """A systemd that runs, and takes everything."""

    def __init__(self, home: Home) -> None:
        self.root = home.root / "stand-in"
        self.root.mkdir()
        for name in ("systemctl", "loginctl"):
            program = self.root / name
            program.write_text(STAND_IN.format(name=name, root=self.root))
            program.chmod(0o755)
        for name, text in {"version": "Version=255", "linger": "Linger=yes"}.items():
            (self.root / name).write_text(text + "\n")
        for name in ("properties", "refusal", "calls"):
            (self.root / name).touch()
        home.environ["PATH"] = f"{self.root}:{home.environ['PATH']}"

    def verbs(self) -> list[str]:
        """What was asked to be done, without what was only asked."""
        lines = (self.root / "calls").read_text().splitlines()
        return [line for line in lines if " show" not in line]


@pytest.fixture
def user(home: Home) -> Home:
    """A home of a user with one profile."""
    home.environ["HOME"] = str(home.root)
    home.environ.pop("XDG_CONFIG_HOME", None)
    home.write(home.command("chat", ["sleep", "1000"]))
    return home


def unit(home: Home) -> Path:
    return home.root / ".config/systemd/user/llmsup.service"


def test_install_writes_enables_and_starts(user: Home) -> None:
    systemd = StandIn(user)
    result = user.cli("service", "install", str(user.profile))
    assert result.returncode == 0, result.stderr
    text = unit(user).read_text()
    assert f"ExecStart={LLMSUP} start --foreground\n" in text
    assert f"Environment=LLMSUP_PROFILE={user.profile}\n" in text
    assert f"ExecReload={LLMSUP} reload\n" in text
    assert f"Environment=LLMSUP_HOME={user.root}\n" in text
    assert systemd.verbs() == [
        "systemctl --user daemon-reload",
        "systemctl --user enable llmsup.service",
        "systemctl --user start --no-block llmsup.service",
    ]
    assert f"wrote {unit(user)}" in result.stderr
    assert "linger" not in result.stderr


def test_install_again_changes_nothing(user: Home) -> None:
    StandIn(user)
    assert user.cli("service", "install", "test.toml").returncode == 0
    before = digest(unit(user))
    assert user.cli("service", "install", "test.toml", "--no-start").returncode == 0
    assert digest(unit(user)) == before


def test_no_start_only_enables(user: Home) -> None:
    systemd = StandIn(user)
    assert user.cli("service", "install", "test.toml", "--no-start").returncode == 0
    assert not any("start" in verb for verb in systemd.verbs())


def test_linger_that_is_off_is_warned_of(user: Home) -> None:
    (StandIn(user).root / "linger").write_text("Linger=no\n")
    result = user.cli("service", "install", "test.toml")
    assert result.returncode == 0
    assert result.stderr.endswith("hint: loginctl enable-linger\n")


def test_where_no_systemd_answers_the_unit_is_written_all_the_same(user: Home) -> None:
    (StandIn(user).root / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    result = user.cli("service", "install", "test.toml")
    assert result.returncode == 0
    assert unit(user).exists()
    assert "not enabled: no service manager of your own answers here\nhint: " in result.stderr
    assert "systemctl --user enable --now llmsup.service" in result.stderr


def test_what_systemctl_refuses_is_told(user: Home) -> None:
    (StandIn(user).root / "refusal").write_text("Failed to enable unit: no room\n")
    result = user.cli("service", "install", "test.toml")
    assert result.returncode == 1
    assert "error: systemctl --user daemon-reload: Failed to enable unit: no room" in result.stderr


def test_a_unit_that_was_edited_is_not_overwritten_nor_removed(user: Home) -> None:
    StandIn(user)
    assert user.cli("service", "install", "test.toml").returncode == 0
    text = unit(user).read_text().replace("WatchdogSec=30s", "WatchdogSec=90s")
    unit(user).write_text(text)
    for verb in (["install", "test.toml"], ["uninstall"]):
        result = user.cli("service", *verb)
        assert result.returncode == 1
        assert f"error: {unit(user)} was edited by hand\n" in result.stderr
        assert unit(user).read_text() == text
    assert user.cli("service", "install", "test.toml", "--force").returncode == 0
    assert "WatchdogSec=30s" in unit(user).read_text()


def test_uninstall_stops_and_leaves_profiles_and_state(user: Home) -> None:
    systemd = StandIn(user)
    user.paths.create()
    assert user.cli("service", "install", "test.toml").returncode == 0
    result = user.cli("service", "uninstall")
    assert result.returncode == 0, result.stderr
    assert not unit(user).exists()
    assert systemd.verbs()[-2:] == [
        "systemctl --user disable --now llmsup.service",
        "systemctl --user daemon-reload",
    ]
    assert user.profile.exists()
    assert user.paths.state.exists()
    again = user.cli("service", "uninstall")
    assert (again.returncode, again.stderr[:13]) == (0, "not installed")


def test_a_bad_profile_is_refused_before_anything_is_written(user: Home) -> None:
    systemd = StandIn(user)
    user.profile.write_text("nonsense")
    result = user.cli("service", "install", "test.toml")
    assert result.returncode == 2
    assert "not valid TOML" in result.stderr
    assert (unit(user).exists(), systemd.verbs()) == (False, [])


def test_a_variable_of_the_shell_alone_is_refused(user: Home) -> None:
    """Given a profile that is good here, and would not be where systemd starts it."""
    StandIn(user)
    user.write(user.command("chat", ["sleep", "${NAP_S}"]))
    user.environ["NAP_S"] = "1000"
    assert user.cli("profile", "validate", "test.toml").returncode == 0
    result = user.cli("service", "install", "test.toml")
    assert result.returncode == 2
    assert "NAP_S" in result.stderr
    assert "env_file" in result.stderr
    assert not unit(user).exists()


def test_a_stack_that_is_up_without_systemd_is_not_started_twice(user: Home) -> None:
    systemd = StandIn(user)
    user.start()
    result = user.cli("service", "install", "test.toml")
    assert result.returncode == 0
    assert f"the stack is up without systemd (daemon pid {user.daemon_pid()})" in result.stderr
    assert not any(" start " in verb for verb in systemd.verbs())


def test_status_shows_what_systemd_says(user: Home) -> None:
    systemd = StandIn(user)
    result = user.cli("service", "status")
    assert (result.returncode, "not installed" in result.stdout) == (3, True)
    user.cli("service", "install", "test.toml")
    (systemd.root / "properties").write_text(
        "ActiveState=active\nSubState=running\nUnitFileState=enabled\nMainPID=42\nNRestarts=1\n"
        "StatusText=4 of 5 ready; code failed: a=b\n"
    )
    result = user.cli("service", "status")
    assert result.returncode == 0
    assert "systemd   active (running), enabled\n" in result.stdout
    assert "status    4 of 5 ready; code failed: a=b\n" in result.stdout
    data = json.loads(user.cli("service", "status", "--json").stdout)
    assert data == {
        "unit": str(unit(user)), "file": "as written", "systemd": True, "active": "active",
        "sub": "running", "enabled": "enabled", "pid": 42, "restarts": 1,
        "status": "4 of 5 ready; code failed: a=b", "linger": True,
    }  # fmt: skip


# --- the machine's


@pytest.fixture
def system(user: Home, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine's units would be."""
    directory = user.root / "system"
    monkeypatch.setattr(service, "SYSTEM_UNITS", directory)
    for name, value in user.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LLMSUP_HOME")
    monkeypatch.delenv("SUDO_USER", raising=False)
    return directory / "llmsup.service"


def test_the_machines_unit_runs_as_the_user_that_is_named(
    user: Home, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd = StandIn(user)
    monkeypatch.setenv("PATH", user.environ["PATH"])
    service.install(str(user.profile), system=True, user="daemon")
    lines = system.read_text().splitlines()
    assert "User=daemon" in lines
    assert "Environment=LLMSUP_HOME=/var/lib/llmsup" in lines
    assert "StateDirectory=llmsup" in lines
    assert systemd.verbs()[0] == "systemctl daemon-reload"


def test_the_machines_unit_never_runs_as_root(
    user: Home, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "root")
    with pytest.raises(Exception, match="does not run as root"):
        service.install(str(user.profile), system=True)
    assert not system.exists()


# --- as systemd reads it

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(home: Home, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *words],
        env={**os.environ, "XDG_RUNTIME_DIR": str(home.root), "SYSTEMD_COLORS": "0"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@needs_analyze
def test_the_users_unit_is_good_for_systemd(user: Home) -> None:
    assert user.cli("service", "install", "test.toml").returncode == 0
    verified = analyze(user, "--user", "verify", unit(user))
    assert (verified.returncode, verified.stderr) == (0, "")


@needs_analyze
def test_the_machines_unit_is_good_for_systemd_and_well_confined(user: Home, system: Path) -> None:
    service.install(str(user.profile), system=True, user="daemon")
    verified = analyze(user, "verify", system)
    assert (verified.returncode, verified.stderr) == (0, "")
    # 30 of 100: "OK" in its words, which begin at 50 with "MEDIUM".
    assert analyze(user, "security", "--offline=true", "--threshold=30", system).returncode == 0


@needs_analyze
@pytest.mark.parametrize("name", ["llmsup.service", "llmsup-system.service"])
def test_systemd_knows_every_directive_of_the_shipped_units(home: Home, name: str) -> None:
    text = (REPOSITORY / "systemd" / name).read_text()
    for program in ("%h/.local/bin/llmsup", "/usr/local/bin/llmsup"):
        text = text.replace(program, LLMSUP)
    copy = home.root / name
    copy.write_text(text)
    scope = () if "system" in name else ("--user",)
    verified = analyze(home, *scope, "verify", copy)
    assert (verified.returncode, verified.stderr) == (0, "")
