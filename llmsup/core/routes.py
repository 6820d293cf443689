"""The routes of a profile: those it declares, and one for every model under its own name."""

from llmsup.config.schema import LlamaServer, Profile
from llmsup.core.routing import Route


def effective_routes(profile: Profile) -> tuple[Route, ...]:
    """The declared routes, then each llama-server under its service name where that is free."""
    declared = tuple(
        Route(name, route.services, route.aliases) for name, route in profile.route.items()
    )
    taken = {name for route in declared for name in route.names}
    implicit = tuple(
        Route(name, (name,))
        for name, service in profile.service.items()
        if isinstance(service, LlamaServer) and name not in taken
    )
    return declared + implicit
