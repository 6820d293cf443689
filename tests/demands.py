"""Demands over price tables, and the search through everything that a plan is held against."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from llmsup.core.estimate import buffers_at_least, estimate, off_card, pool_bytes
from llmsup.core.ladder import degraded
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Demand, Knob, Price
from llmsup.core.shape import ModelShape, shape_of
from llmsup.core.sizes import Estimate, Sizes
from tests.model_shapes import published

MIB = 1 << 20
AUTO = frozenset({Knob.GPU_LAYERS})
MOE = frozenset({Knob.GPU_LAYERS, Knob.N_CPU_MOE})
FIXED: frozenset[Knob] = frozenset()


def budget(usable_mib: int, *, reserved_mib: int = 0) -> Budget:
    """A card with just so much to use."""
    return Budget(
        device_name="a card",
        total_bytes=100_000 * MIB,
        free_bytes=(usable_mib + reserved_mib + 256) * MIB,
        headroom_bytes=256 * MIB,
        ceiling_bytes=100_000 * MIB,
        reserved_bytes=reserved_mib * MIB,
    )


def no_overhead(options: Options) -> int:
    return 0


@dataclass
class Model:
    """A model whose figures are known, in MiB; it counts what it is asked."""

    layer: int = 100
    output: int = 200
    experts: int = 0
    layers: int = 11
    cache: int = 8
    compute: int = 50
    staged: int = 40
    context: int = 120
    extra: Callable[[Options], int] = no_overhead
    asked: Counter[Options] = field(default_factory=Counter)

    def weights_mib(self, options: Options) -> int:
        layers = min(options.gpu_layers, self.layers)
        if not layers:
            return 0
        first = self.layers - layers  # repeating layers from here on are on the card
        on_card = self.layers - 1 - first
        with_experts = max(0, self.layers - 1 - max(first, options.n_cpu_moe))
        return self.output + on_card * self.layer + with_experts * self.experts

    def cache_mib(self, options: Options) -> int:
        width = {"f16": 2, "q8_0": 1}
        both = width[options.cache_type_k] + width[options.cache_type_v]
        layers = max(0, min(options.gpu_layers, self.layers) - 1)
        return layers * self.cache * both * options.ctx_size // (4 * 4096)

    def price(self, options: Options) -> Price:
        self.asked[options] += 1
        if not options.gpu_layers:
            return Price(Estimate(Sizes(), Sizes()), 0)
        on_host = options.gpu_layers < self.layers or (self.experts and options.n_cpu_moe)
        compute = self.compute * options.ubatch // 512 + (self.staged if on_host else 0)
        device = Sizes(
            self.weights_mib(options) * MIB,
            self.cache_mib(options) * MIB,
            compute * MIB,
        )
        overhead_mib = self.context + self.extra(options)
        return Price(Estimate(device, Sizes()), overhead_mib * MIB)

    def buffers_at_least(self, options: Options) -> int:
        return (self.weights_mib(options) + self.cache_mib(options)) * MIB

    def demand(self, service: str = "chat", **fields: object) -> Demand:
        asked = Options(gpu_layers=self.layers)
        made = Demand(
            service=service,
            model=f"{service}.gguf",
            layers=self.layers,
            asked=asked,
            price=self.price,
            buffers_at_least=self.buffers_at_least,
            knobs=MOE if self.experts else AUTO,
            has_experts=bool(self.experts),
        )
        return replace(made, **fields)  # type: ignore[arg-type]


def fixed(demand: Demand, gpu_layers: int, **fields: object) -> Demand:
    """The operator says how many layers."""
    options = replace(demand.asked, gpu_layers=gpu_layers, **fields)  # type: ignore[arg-type]
    return replace(demand, asked=options, knobs=demand.knobs - AUTO)


def everything(demand: Demand) -> list[tuple[Options, int]]:
    """All that one demand may get and what it takes, the best first. Written anew on purpose."""
    asked, repeating = demand.asked, demand.layers - 1
    is_free = Knob.GPU_LAYERS in demand.knobs and not demand.pinned
    layers = range(demand.layers, 0, -1) if is_free else [asked.gpu_layers]
    experts = [asked.n_cpu_moe]
    if Knob.N_CPU_MOE in demand.knobs and demand.has_experts and not demand.pinned:
        experts = list(range(asked.n_cpu_moe, repeating + 1))
    rungs = [asked]
    for what in demand.degrade:
        rungs += degraded(rungs[-1], what, demand.ctx_size_min)
    found: list[tuple[Options, int]] = []
    for count, on_host, rung in product(layers, experts, rungs):
        if is_free and count < demand.layers and on_host != experts[-1]:
            continue  # experts come last
        options = replace(rung, gpu_layers=count, n_cpu_moe=on_host)
        try:
            taken = demand.price(options).device_bytes
        except ValueError:
            continue
        is_allowed = demand.at_most_bytes is None or taken < demand.at_most_bytes
        if is_allowed or not count:
            found.append((options, taken))
    if is_free:
        found.append((replace(asked, gpu_layers=0, n_cpu_moe=0), 0))
    return found


def exhaustive(usable_bytes: int, demands: Iterable[Demand]) -> dict[str, Options] | None:
    """The best plan of services of different ranks, of all plans that fit; None: there is none."""
    ranked = sorted(demands, key=lambda each: (not each.pinned, -each.priority))
    best = _search(usable_bytes, [everything(each) for each in ranked])
    if best is None:
        return None
    return {each.service: options for each, options in zip(ranked, best, strict=True)}


def _search(usable_bytes: int, tables: Sequence[list[tuple[Options, int]]]) -> list[Options] | None:
    if not tables:
        return []
    for options, taken in tables[0]:
        if taken > usable_bytes:
            continue
        rest = _search(usable_bytes - taken, tables[1:])
        if rest is not None:
            return [options, *rest]
    return None


@cache
def of_published(name: str, service: str, **options: object) -> Demand:
    """A published model, priced by the estimator; what was priced once is remembered."""
    return of_shape(shape_of(published(name)), service, **options)


def of_shape(shape: ModelShape, service: str, **options: object) -> Demand:
    """A model priced by the estimator; each process costs the driver 125 MiB more."""

    @cache
    def price(chosen: Options) -> Price:
        if chosen.gpu_layers == 0:
            return Price(off_card(shape, chosen), 0)
        return Price(estimate(shape, chosen), 125 * MIB + pool_bytes(shape, chosen))

    return Demand(
        service=service,
        model=f"{service}.gguf",
        layers=shape.layers,
        asked=Options(gpu_layers=shape.layers, **options),  # type: ignore[arg-type]
        price=price,
        buffers_at_least=lambda chosen: buffers_at_least(shape, chosen),
        knobs=MOE,
        has_experts=shape.has_experts,
    )
