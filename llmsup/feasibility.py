"""Whether a profile would come up here: its models, its programs, and its plan of the card."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmsup.config.schema import LlamaServer, Profile, Qdrant
from llmsup.core.device import Reading
from llmsup.errors import LaunchError, LlmsupError
from llmsup.host import binaries, gguf
from llmsup.sizing import Sizing


def require_feasible(
    profile: Profile,
    services: Sequence[str],
    *,
    sizing: Sizing,
    reading: Reading,
    coming_back_bytes: int,
    environ: Mapping[str, str],
) -> None:
    """Raise LlmsupError with everything for which it is certain not to come up.

    `services` are those that come up together, planned by `sizing` on the card as it was read, of
    which at most `coming_back_bytes` more are free by then. Call it in a thread.
    """
    problems = [*_problems(profile, environ)]
    plan = sizing.plan(reading, services, coming_back_bytes=coming_back_bytes)
    if plan.refusal:
        problems.append(plan.refusal)
    if problems:
        raise LlmsupError("; ".join(problems))


def _problems(profile: Profile, environ: Mapping[str, str]) -> Iterator[str]:
    try:
        binaries.envoy(profile.gateway.envoy, environ)
    except LaunchError as error:
        yield error.message
    for name, service in profile.service.items():
        try:
            if isinstance(service, LlamaServer):
                gguf.require_loadable(Path(service.model))
                binaries.llama_server(service.binary, environ)
            elif isinstance(service, Qdrant):
                binaries.qdrant(service.binary, environ)
        except LaunchError as error:
            yield f"{name}: {error.message}"
