"""Any program: what the profile says, and nothing added."""

from pathlib import Path

from llmsup.config.schema import Command
from llmsup.services.launch import Launch, Target, Via


def launch(spec: Command) -> Launch:
    """The command as written, probed at its port; without one it is ready once it stays up."""
    return Launch(
        argv=(*spec.command, *spec.args),
        target=_target(spec),
        env=spec.env,
        cwd=Path(spec.cwd) if spec.cwd is not None else None,
        ports=() if spec.port is None else (spec.port,),
        may_wait=True,
    )


def _target(spec: Command) -> Target:
    if spec.port is None:
        return Target(Via.ALIVE)
    if spec.readiness.http_get is not None and not spec.readiness.tcp:
        return Target(Via.HTTP, port=spec.port, path=spec.readiness.http_get)
    return Target(Via.TCP, port=spec.port)
