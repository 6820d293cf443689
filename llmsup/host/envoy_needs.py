"""What Envoy needs of the machine. It is looked at first, because Envoy dies without saying why."""

import os

from llmsup.config.paths import SOCKET_PATH_MAX_BYTES
from llmsup.errors import GatewayError
from llmsup.host import inotify
from llmsup.services.envoy import SPARE_INSTANCES, Layout


def require_possible(layout: Layout, route_count: int) -> None:
    """Raise GatewayError where an Envoy with so many routes could not start."""
    longest = f"{layout.hot_restart_sockets}_udp_parent_1234567890"
    if len(os.fsencode(longest)) > SOCKET_PATH_MAX_BYTES:
        raise GatewayError(
            f"the path {longest} is too long for a socket",
            hint="set LLMSUP_HOME to a shorter directory",
        )
    needed = route_count + SPARE_INSTANCES
    left = inotify.instances_left()
    if left is not None and left < needed:
        raise GatewayError(
            f"{route_count} routes need {needed} inotify instances and {left} are left",
            hint="raise the limit: sudo sysctl fs.inotify.max_user_instances=1024",
        )
