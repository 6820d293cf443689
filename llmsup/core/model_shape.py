"""A model as the estimator sees it: its layers, their tensors and what these take on a device."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from llmsup.core.architectures import Architecture

DEVICE_ALIGNMENT = 128


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
        return self.traits.has_graph

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
