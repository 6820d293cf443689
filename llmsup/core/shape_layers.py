"""What the metadata of a header says of each layer, one by one or for all of them."""

from collections.abc import Mapping
from types import MappingProxyType

from llmsup.core.architectures import Architecture
from llmsup.core.gguf import Model
from llmsup.core.model_shape import Block, Weight

NUMBER_MAX = 2**31 - 1
"""A larger number in a header is nonsense; with this bound no size overflows anything."""


class Layers:
    """What the metadata says of each layer, one by one or for all of them."""

    def __init__(
        self,
        model: Model,
        traits: Architecture,
        numbers: Mapping[str, float],
        *,
        count: int,
        trunk: int,
    ) -> None:
        self.model = model
        self.name = model.architecture
        self.traits = traits
        self.numbers = numbers
        self.count = count
        self.trunk = trunk
        self.window = self._window()

    def number(self, key: str, default: float = 0) -> int:
        """The whole number at `key`."""
        return int(self.numbers.get(key, default))

    def of(self, key: str, number: int) -> int:
        """The value for layer `number` of a key that is a number, or an array with one for each."""
        values = self.model.metadata.get(f"{self.name}.{key}")
        if not isinstance(values, tuple):
            return self.number(key)
        value = values[number] if number < len(values) else 0
        return value if isinstance(value, int) and 0 <= value <= NUMBER_MAX else 0

    def has(self, key: str) -> bool:
        """Whether the header says anything at `key`."""
        return f"{self.name}.{key}" in self.model.metadata

    def _window(self) -> int:
        only = self.traits.windows_with_blocks
        if self.traits.ignores_window or (only and self.count != only):
            return 0
        said = self.number("attention.sliding_window", self.traits.window)
        return self.traits.window if said and self.traits.fixes_window else said

    def is_sliding(self, number: int) -> bool:
        """Whether a layer attends to a window only."""
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
        """Whether a layer keeps a state."""
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
        """A layer with its weights."""
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
