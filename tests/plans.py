"""Plans made by hand, to be shown: no estimator and no planner had a part in them."""

from llmsup.core.options import Options
from llmsup.core.plan import Budget, Placement, Plan, Price
from llmsup.core.sizes import Basis, Estimate, Item, Sizes

MIB = 2**20
CARD = Budget(
    device_name="NVIDIA GeForce RTX 4050 Laptop GPU",
    total_bytes=6141 * MIB,
    free_bytes=5800 * MIB,
    headroom_bytes=256 * MIB,
    ceiling_bytes=6141 * MIB,
)


def price(
    weights: float,
    kv_cache: float,
    compute: float,
    overhead: float,
    *,
    host: float = 0,
    basis: Basis = Basis.GRAPH,
    notes: tuple[str, ...] = (),
    items: tuple[Item, ...] = (),
    is_measured: bool = False,
) -> Price:
    """Sizes in MiB."""
    estimate = Estimate(
        device=Sizes(int(weights * MIB), int(kv_cache * MIB), int(compute * MIB)),
        host=Sizes(weights_bytes=int(host * MIB)),
        basis=basis,
        notes=notes,
        items=items,
    )
    return Price(estimate, int(overhead * MIB), is_measured)


CHAT = Placement(
    service="chat",
    model="Qwen2.5-3B-Instruct-Q4_K_M.gguf",
    layers=37,
    options=Options(gpu_layers=37, ctx_size=4096),
    price=price(1834.83, 144, 83.5, 135.7, host=243.4),
    reason="all 37 layers",
)
CODE = Placement(
    service="code",
    model="qwen2.5-coder-7b-instruct-q4_k_m.gguf",
    layers=29,
    options=Options(gpu_layers=19, ctx_size=8192, cache_type_k="q8_0", cache_type_v="q8_0"),
    price=price(2815.1, 153, 190.4, 155.5, host=1650),
    reason="19 of 29 layers: one more takes 142 MiB, 31 MiB are left",
    next_bytes=142 * MIB,
)
DUAL = Plan((CHAT, CODE), CARD)
