"""The shape of a model, from its header: what decides how much memory it takes.

`shape_of` makes it of any header, odd ones too: what is not said or makes no sense counts as 0.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from llmsup.core.architectures import architecture
from llmsup.core.ggml import TYPES
from llmsup.core.gguf import Model, Tensor
from llmsup.core.model_shape import Block, ModelShape, Weight, aligned
from llmsup.core.shape_layers import NUMBER_MAX, Layers

__all__ = ["Block", "ModelShape", "Weight", "aligned", "shape_of"]

BLOCKS_MAX = 1024
"""The engine's own limit is 512."""

_ROW_ELEMENTS = 512

_BLOCK_NAME = re.compile(r"blk\.(\d{1,4})\.(.+)")
_EXPERT_NAME = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps")


def shape_of(model: Model) -> ModelShape:
    """The shape of any model; raises nothing."""
    name = model.architecture
    traits = architecture(name)
    numbers = _numbers(model, name)
    outer: dict[str, Weight] = {}
    found: dict[int, dict[str, Weight]] = {}
    for tensor in model.tensors:
        named = _BLOCK_NAME.fullmatch(tensor.name)
        if named is None or int(named[1]) >= BLOCKS_MAX:
            outer[tensor.name] = _weight(tensor, tensor.name)
        else:
            found.setdefault(int(named[1]), {})[named[2]] = _weight(tensor, named[2])
    count = int(numbers.get("block_count", 0)) or max(found, default=-1) + 1
    count = min(count, BLOCKS_MAX)
    for number in [number for number in found if number >= count]:
        outer |= {f"blk.{number}.{name}": each for name, each in found.pop(number).items()}
    trunk = max(0, count - int(numbers.get("nextn_predict_layers", 0)))
    embedding = int(numbers.get("embedding_length", 0))
    layers = Layers(model, traits, numbers, count=count, trunk=trunk)
    return ModelShape(
        architecture=name,
        traits=traits,
        embedding=embedding,
        vocabulary=_vocabulary(model, outer),
        experts_used=int(layers.of("expert_used_count", 0)),
        expert_groups=int(numbers.get("expert_group_count", 0)),
        numbers=MappingProxyType(numbers),
        blocks=tuple(layers.block(number, found.get(number, {})) for number in range(count)),
        trunk=trunk,
        outer=MappingProxyType(outer),
    )


def _weight(tensor: Tensor, name: str) -> Weight:
    padding = 0
    known = TYPES.get(tensor.type_id)
    row = tensor.shape[0] if tensor.shape else 1
    if known is None or known.block > 1:
        # The kernels of quantised types read whole rows of 512: the last one gets the room.
        missing = -row % _ROW_ELEMENTS
        block, block_bytes = (32, 34) if known is None else known[1:]
        padding = -(-missing // block) * block_bytes
    return Weight(
        name=name,
        shape=tensor.shape,
        type_id=tensor.type_id,
        size_bytes=tensor.size_bytes,
        device_bytes=tensor.size_bytes + padding,
        is_expert=_EXPERT_NAME.match(name) is not None,
    )


def _numbers(model: Model, name: str) -> dict[str, float]:
    """The numbers under the architecture's name, without it; the nonsense left out."""
    prefix = f"{name}."
    numbers: dict[str, float] = {}
    for key, value in model.metadata.items():
        if key.startswith(prefix) and isinstance(value, int | float) and abs(value) <= NUMBER_MAX:
            numbers[key.removeprefix(prefix)] = value
    return {
        key: value for key, value in numbers.items() if not isinstance(value, int) or value >= 0
    }


def _vocabulary(model: Model, outer: Mapping[str, Weight]) -> int:
    for name in ("output.weight", "token_embd.weight"):
        weight = outer.get(name)
        if weight is not None and len(weight.shape) == 2:
            return min(weight.shape[1], NUMBER_MAX)
    return min(model.vocabulary_size or 0, NUMBER_MAX)
