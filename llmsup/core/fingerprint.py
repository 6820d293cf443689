"""What tells one model from another, wherever its files are and whenever they were written."""

import hashlib
from collections.abc import Iterable

from llmsup.core.gguf import Model


def fingerprint(model: Model, more: Iterable[str] = ()) -> str:
    """Of its size, the metadata of its architecture and its tensors: names, shapes, types.

    `more`: what else the same process loads (projector, draft model, adapters), a word each.
    """
    own = f"{model.architecture}."
    digest = hashlib.sha256(f"{model.file_bytes} {model.architecture}".encode())
    for key, value in sorted(model.metadata.items()):
        if key.startswith(own):
            digest.update(f"\n{key!r}={value!r}".encode(errors="replace"))
    for tensor in model.tensors:
        line = f"\n{tensor.name!r}{tensor.shape}{tensor.type_id}"
        digest.update(line.encode(errors="replace"))
    for word in more:
        digest.update(f"\n+{word!r}".encode(errors="replace"))
    return digest.hexdigest()[:32]
