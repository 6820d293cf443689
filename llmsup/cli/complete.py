"""What the shell offers on Tab. Errors offer nothing: there is nobody to tell."""
# ruff: noqa: PLC0415

from collections.abc import Callable

TIMEOUT_S = 0.5


def profiles(incomplete: str) -> list[str]:
    """Names of profiles; files are completed by the shell."""
    return _offered(_profiles, incomplete)


def services(incomplete: str) -> list[str]:
    """Services of the stack that is up."""
    return _offered(_services, incomplete)


def targets(incomplete: str) -> list[str]:
    """What can be switched to."""
    return [*services(incomplete), *profiles(incomplete)]


def logs(incomplete: str) -> list[str]:
    """Whatever there are logs of."""
    return _offered(_logs, incomplete)


def deaths(incomplete: str) -> list[str]:
    """Services that something is known of."""
    return _offered(_deaths, incomplete)


def scenarios(incomplete: str) -> list[str]:
    """What a drill can break."""
    return _offered(_scenarios, incomplete)


def _offered(names: Callable[[], list[str]], incomplete: str) -> list[str]:
    try:
        return [name for name in names() if name.startswith(incomplete)]
    except Exception:
        return []


def _profiles() -> list[str]:
    from llmsup.config.paths import paths
    from llmsup.config.profiles import available

    return [profile.name for profile in available(paths().config)]


def _services() -> list[str]:
    from llmsup.config.paths import paths
    from llmsup.control.client import Client

    status = Client(paths(), timeout_s=TIMEOUT_S).status()
    return [info["service"] for info in status["services"]]


def _logs() -> list[str]:
    from llmsup.cli.logs import known
    from llmsup.config.paths import paths

    return sorted(known(paths()))


def _deaths() -> list[str]:
    from llmsup.cli.why import known
    from llmsup.config.paths import paths

    return known(paths())


def _scenarios() -> list[str]:
    from llmsup.drill.table import NAMES

    return list(NAMES)
