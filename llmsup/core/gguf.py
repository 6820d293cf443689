"""What the header of a GGUF model tells: metadata and a table of tensors, over all its parts.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmsup.config.wording import quoted
from llmsup.core.ggml import type_name
from llmsup.errors import Flaw, ModelFileError


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that is too long to be read, such as the vocabulary: `count` items of `kind`.

    Of a string that is too long, `count` is its length in bytes.
    """

    kind: str
    count: int


Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | Unread


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. `offset` is from the beginning of the data of its part.

    `size_bytes` is by its type, or the room up to the next tensor where the type is not known.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    size_bytes: int

    @property
    def type_name(self) -> str:
        """The type as people write it: "Q4_K"."""
        return type_name(self.type_id)


@dataclass(frozen=True)
class Header:
    """The header of one file, which is a whole model or a part of one."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_offset: int
    file_bytes: int

    def whole(self, key: str) -> int | None:
        """The whole number at `key`; None where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Model:
    """A model of one part or several. The metadata is that of the first."""

    parts: tuple[Header, ...]

    @property
    def version(self) -> int:
        """The version of the format, 2 or 3."""
        return self.parts[0].version

    @property
    def metadata(self) -> Mapping[str, Value]:
        """All keys of the first part."""
        return self.parts[0].metadata

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all parts."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def file_bytes(self) -> int:
        """The size of all files together."""
        return sum(part.file_bytes for part in self.parts)

    @property
    def architecture(self) -> str:
        """What the engine builds of it: "llama", "qwen2"; empty where that is not said."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    @property
    def vocabulary_size(self) -> int | None:
        """How many tokens there are; None without a vocabulary."""
        match self.metadata.get("tokenizer.ggml.tokens"):
            case Unread(count=count):
                return count
            case tuple() as tokens:
                return len(tokens)
        return None


def joined(parts: Sequence[Header]) -> Model:
    """The model of `parts`, which are as many files as the name of the first one says.

    Raises ModelFileError where they do not belong together.
    """
    first = parts[0]
    count = first.whole("split.count") or 1
    if count == 1 and len(parts) == 1:
        return Model((first,))
    if count == 1:
        words = f"its name says {len(parts)} parts, its header does not"
        raise ModelFileError(Flaw.UNKNOWN, words)
    if len(parts) == 1:
        number = (first.whole("split.no") or 0) + 1
        ending = f"-{number:05}-of-{count:05}.gguf"
        words = f"it is part {number} of {count}: its name must end in {ending}"
        raise ModelFileError(Flaw.CORRUPT, words)
    for number, part in enumerate(parts):
        told = (part.whole("split.no"), part.whole("split.count"))
        if told != (number, len(parts)):
            words = f"part {number + 1} of {len(parts)} by its name is another by its header"
            raise ModelFileError(Flaw.CORRUPT, words)
    model = Model(tuple(parts))
    _require_all_tensors(model, first.whole("split.tensors.count"))
    return model


def _require_all_tensors(model: Model, count: int | None) -> None:
    if count is not None and len(model.tensors) != count:
        words = f"its parts have {len(model.tensors)} tensors, the first one tells of {count}"
        raise ModelFileError(Flaw.CORRUPT, words)
    names: set[str] = set()
    for tensor in model.tensors:
        if tensor.name in names:
            raise ModelFileError(Flaw.CORRUPT, f"tensor {quoted(tensor.name)} is in two parts")
        names.add(tensor.name)
