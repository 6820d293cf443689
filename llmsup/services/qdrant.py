"""Qdrant: its settings, which are environment variables, and its readiness endpoint."""

from pathlib import Path

from llmsup.config.schema import Qdrant
from llmsup.services.launch import Launch, Target, Via


def launch(spec: Qdrant, *, binary: str, storage: Path) -> Launch:
    """One Qdrant that keeps its collections in `storage` and its snapshots beside it."""
    if spec.readiness.tcp:
        target = Target(Via.TCP, port=spec.port)
    else:
        target = Target(Via.HTTP, port=spec.port, path=spec.readiness.http_get or "/readyz")
    env = {
        "QDRANT__SERVICE__HOST": "127.0.0.1",
        "QDRANT__TELEMETRY_DISABLED": "true",
        "QDRANT__STORAGE__SNAPSHOTS_PATH": str(storage.with_name(f"{storage.name}-snapshots")),
        **spec.env,
        "QDRANT__SERVICE__HTTP_PORT": str(spec.port),
        "QDRANT__SERVICE__GRPC_PORT": str(spec.grpc_port),
        "QDRANT__STORAGE__STORAGE_PATH": str(storage),
    }
    return Launch(
        argv=(binary, *spec.args),
        target=target,
        env=env,
        cwd=storage.parent,  # where it notes that it has been initialised
        ports=(spec.port, spec.grpc_port),
    )
