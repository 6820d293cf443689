"""A profile looked at before it is acted on: without problems, and its ports not a stranger's."""

from collections.abc import Mapping, Sequence

from llmsup.config.listen import parse_listen
from llmsup.config.load import Loaded, load
from llmsup.config.paths import Paths
from llmsup.config.schema import Profile, Qdrant
from llmsup.errors import ConfigError, Problem
from llmsup.host import choices, ports
from llmsup.host.leftovers import home_mark
from llmsup.host.process import marked


def load_startable(
    source: str, *, environ: Mapping[str, str], overrides: Sequence[str], home: Paths
) -> Loaded:
    """The profile `source`. Raises ConfigError with everything that keeps it from being started.

    What a daemon of this home has started may hold ports: it is adopted, or ended.
    """
    loaded = load(
        source,
        environ=environ,
        overrides=overrides,
        config_dir=home.config,
        choices=choices.peek(home.choices).usable,
    )
    holders = [
        (owner, key) for key, port in _ports(loaded.profile).items() for owner in ports.owners(port)
    ]
    # Looked for last: another start may be bringing them up just now.
    own = set(marked(home_mark(home))) if holders else set()
    problems = [
        Problem(str(loaded.path), key, f"port {owner.port} is taken by {ports.describe(owner)}")
        for owner, key in holders
        if owner.pid not in own and _is_kept(owner)
    ]
    if problems:
        raise ConfigError(problems, hint="end what holds the port, or choose another one")
    return loaded


def _is_kept(owner: ports.PortOwner) -> bool:
    """Whether it holds the port still. One that ends has lost its mark and its command line by the
    time that the port is free, so it would pass for a stranger.
    """
    return owner in ports.owners(owner.port)


def _ports(profile: Profile) -> Mapping[str, int]:
    """The ports that the profile names, by their keys."""
    found = {"gateway.listen": parse_listen(profile.gateway.listen)[1]}
    for name, service in profile.service.items():
        if service.port is not None:
            found[f"service.{name}.port"] = service.port
        if isinstance(service, Qdrant):
            found[f"service.{name}.grpc_port"] = service.grpc_port
    return found
