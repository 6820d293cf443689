"""What of a model decides how much memory it takes: its architecture, its layers, their tensors.

`shape_of` makes it of any header, odd ones too: what is not said or makes no sense counts as 0.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from llmsup.core.architectures import UNKNOWN, Architecture, architecture
from llmsup.core.ggml import TYPES
from llmsup.core.gguf import Model, Tensor

NUMBER_MAX = 2**31 - 1
"""A larger number in a header is nonsense; with this bound no size overflows anything."""
BLOCKS_MAX = 1024
"""The engine's own limit is 512."""

DEVICE_ALIGNMENT = 128
_ROW_ELEMENTS = 512

_BLOCK_NAME = re.compile(r"blk\.(\d{1,4})\.(.+)")
_EXPERT_NAME = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps")


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the model: its shape, its size in the file and on the device. Bytes."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    size_bytes: int
    device_bytes: int
    is_expert: bool = False

    @property
    def aligned_bytes(self) -> int:
        """What it takes in a buffer of the device, up to the next tensor."""
        return aligned(self.device_bytes)


@dataclass(frozen=True, eq=False)
class Block:
    """One repeating layer.

    `window`: it attends to so many tokens; 0 is to all of them. `has_cache`: it keeps keys and
    values. `state`: the elements of its recurrent state for one sequence, two tensors of F32.
    """

    weights: Mapping[str, Weight]
    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    window: int = 0
    has_cache: bool = True
    state: tuple[int, int] = (0, 0)

    @cached_property
    def sums(self) -> tuple[int, int, int, int]:
        """Bytes of the weights on the device and on the host, then of the experts alone."""
        plain = [each for each in self.weights.values() if not each.is_expert]
        experts = [each for each in self.weights.values() if each.is_expert]
        return (
            sum(each.aligned_bytes for each in plain),
            sum(each.size_bytes for each in plain),
            sum(each.aligned_bytes for each in experts),
            sum(each.size_bytes for each in experts),
        )

    @cached_property
    def largest(self) -> tuple[int, int]:
        """The largest weight on the device, and the largest of the experts. Bytes."""
        plain = [each.aligned_bytes for each in self.weights.values() if not each.is_expert]
        experts = [each.aligned_bytes for each in self.weights.values() if each.is_expert]
        return max(plain, default=0), max(experts, default=0)

    @cached_property
    def has_attention(self) -> bool:
        """Whether it attends at all; some layers only feed forward."""
        return (
            "attn_q.weight" in self.weights
            or "attn_qkv.weight" in self.weights
            or ("attn_kv_a_mqa.weight" in self.weights)
        )

    @cached_property
    def has_experts(self) -> bool:
        """Whether it has experts."""
        return any(each.is_expert for each in self.weights.values())

    @property
    def is_recurrent(self) -> bool:
        """Whether it keeps a state for each sequence."""
        return any(self.state)


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model as the estimator sees it. Two are equal only where they are the same object.

    `trunk`: how many of `blocks` run; those after it predict further tokens and are not loaded.
    `outer`: the tensors that belong to no layer.
    """

    architecture: str
    traits: Architecture
    embedding: int
    vocabulary: int
    experts_used: int
    expert_groups: int
    numbers: Mapping[str, float]
    blocks: tuple[Block, ...]
    trunk: int
    outer: Mapping[str, Weight]

    @property
    def layers(self) -> int:
        """How many there are for the card: the repeating ones, and the output layer."""
        return len(self.blocks) + 1

    @cached_property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """Numbers for each layer: equal ones have equal operations; equal sizes of weights too."""
        structures: dict[object, int] = {}
        exact: dict[object, int] = {}
        kinds = []
        for block in self.blocks:
            weights = sorted(block.weights.values(), key=lambda weight: weight.name)
            lengths = (block.heads, block.kv_heads, block.key_length, block.value_length)
            names = tuple((weight.name, weight.shape) for weight in weights)
            same = (names, lengths, block.has_cache, block.state)
            sizes = (same, tuple(weight.device_bytes for weight in weights))
            kinds.append(
                (structures.setdefault(same, len(structures)), exact.setdefault(sizes, len(exact)))
            )
        return tuple(kinds)

    @property
    def is_known(self) -> bool:
        """Whether its graph is known here."""
        return self.traits is not UNKNOWN

    @cached_property
    def has_experts(self) -> bool:
        """Whether there are experts that may stay on the host."""
        return any(block.has_experts for block in self.blocks)

    def number(self, key: str) -> float:
        """A number of its metadata; 0 where there is none."""
        return self.numbers.get(key, 0)


def aligned(size: int, alignment: int = DEVICE_ALIGNMENT) -> int:
    """`size` rounded up."""
    return size + -size % alignment


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
    layers = _Layers(model, name, traits, numbers, count, trunk)
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


class _Layers:
    """What the metadata says of each layer, one by one or for all of them."""

    def __init__(
        self,
        model: Model,
        name: str,
        traits: Architecture,
        numbers: Mapping[str, float],
        count: int,
        trunk: int,
    ) -> None:
        self.model = model
        self.name = name
        self.traits = traits
        self.numbers = numbers
        self.count = count
        self.trunk = trunk
        self.window = self._window()

    def number(self, key: str, default: float = 0) -> int:
        return int(self.numbers.get(key, default))

    def of(self, key: str, number: int) -> int:
        """The value for layer `number` of a key that is a number, or an array with one for each."""
        values = self.model.metadata.get(f"{self.name}.{key}")
        if not isinstance(values, tuple):
            return self.number(key)
        value = values[number] if number < len(values) else 0
        return value if isinstance(value, int) and 0 <= value <= NUMBER_MAX else 0

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.model.metadata

    def _window(self) -> int:
        only = self.traits.windows_with_blocks
        if self.traits.ignores_window or (only and self.count != only):
            return 0
        said = self.number("attention.sliding_window", self.traits.window)
        return self.traits.window if said and self.traits.fixes_window else said

    def is_sliding(self, number: int) -> bool:
        if not self.window or number >= self.trunk or not self.traits.has_windows:
            return False
        key = "attention.sliding_window_pattern"
        if isinstance(self.model.metadata.get(f"{self.name}.{key}"), tuple):
            return bool(self.of(key, number))
        if self.traits.all_slide:
            return not self.is_recurrent(number)
        period = self.number(key, self.traits.window_period)
        if not period:
            return period == 0 and self.has(key)
        if self.traits.dense_first:
            return number % period != 0
        return number % period < period - 1

    def is_recurrent(self, number: int) -> bool:
        match self.traits.recurrence:
            case "all" | "beside":
                return True
            case "no heads":
                return self.of("attention.head_count_kv", number) == 0
            case "no heads, no feed-forward":
                return not self.of("attention.head_count_kv", number) and not self.of(
                    "feed_forward_length", number
                )
            case "interval":
                if self.has("attention.recurrent_layers"):
                    return bool(self.of("attention.recurrent_layers", number))
                interval = self.number("full_attention_interval", 4) or 4
                return number < self.trunk and (number + 1) % interval != 0
        return False

    def block(self, number: int, weights: Mapping[str, Weight]) -> Block:
        heads = self.of("attention.head_count", number)
        kv_heads = heads
        if self.has("attention.head_count_kv"):
            kv_heads = self.of("attention.head_count_kv", number)
        embedding = self.number("embedding_length")
        length = embedding // heads if heads else 0
        sliding = self.is_sliding(number)
        key_length = self.number("attention.key_length", length)
        value_length = self.number("attention.value_length", length)
        if sliding:
            key_length = self.number("attention.key_length_swa", key_length)
            value_length = self.number("attention.value_length_swa", value_length)
        recurrent = number < self.trunk and self.is_recurrent(number)
        has_cache = number < self.trunk and self.traits.has_cache and kv_heads > 0
        if recurrent and self.traits.recurrence != "beside":
            has_cache = False
        shared = self.number("attention.shared_kv_layers", 0)
        from_start = self.traits.caches_of_the_first or (self.count - shared if shared else 0)
        if from_start and number >= from_start:
            has_cache = False
        return Block(
            weights=MappingProxyType(dict(weights)),
            heads=heads,
            kv_heads=kv_heads,
            key_length=key_length,
            value_length=value_length,
            window=self.window if sliding else 0,
            has_cache=has_cache,
            state=self._state(heads) if recurrent else (0, 0),
        )

    def _state(self, heads: int) -> tuple[int, int]:
        """The elements of the convolution's state and of the layer's, for one sequence."""
        embedding = self.number("embedding_length")
        convolution = max(0, self.number("ssm.conv_kernel") - 1)
        if self.has("wkv.head_size"):
            shift = self.number("token_shift_count", 2)
            return shift * embedding, embedding * self.number("wkv.head_size")
        if self.has("shortconv.l_cache"):
            return embedding * max(0, self.number("shortconv.l_cache") - 1), 0
        if self.has("kda.head_dim"):
            length = self.number("kda.head_dim")
            inner = heads * length
            return 3 * (convolution or 3) * inner, length * length * heads
        inner, state = self.number("ssm.inner_size"), self.number("ssm.state_size")
        groups = self.number("ssm.group_count")
        return convolution * (inner + 2 * groups * state), state * inner
