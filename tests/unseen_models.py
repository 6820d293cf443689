"""Models whose memory was measured on the card without a GPU: tests/data/vram-cells-*.csv.gz."""

from llmsup.core.gguf import Model
from llmsup.core.gguf_header import parse
from tests import gguf_files
from tests.gguf_files import Item
from tests.unseen_layers import Shape
from tests.unseen_shapes import header

_GRANITE: dict[str, Item] = {
    "logit_scale": ("f32", 8.0),
    "residual_scale": ("f32", 0.22),
    "embedding_scale": ("f32", 12.0),
    "attention.scale": ("f32", 0.0156),
}


def _mla(latent: int, rope: int, plain: int, value: int, *, absorbed: bool) -> dict[str, Item]:
    lengths = {"key_length": plain + rope, "value_length": value}
    if absorbed:
        lengths = {
            "key_length": latent + rope,
            "value_length": latent,
            "key_length_mla": plain + rope,
            "value_length_mla": value,
        }
    said: dict[str, Item] = {f"attention.{name}": ("u32", size) for name, size in lengths.items()}
    said["attention.kv_lora_rank"] = ("u32", latent)
    said["rope.dimension_count"] = ("u32", rope)
    said["expert_shared_count"] = ("u32", 2)
    said["expert_weights_scale"] = ("f32", 1.0)
    return said


MODELS: dict[str, Shape] = {
    # --- llama and its like
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32, 11008, 32000, 4096),
    "codellama-7b": Shape("llama", 32, 4096, 32, 32, 11008, 32016, 16384, quant="Q5_K_M"),
    "yi-6b": Shape("llama", 32, 4096, 32, 4, 11008, 64000, 4096, quant="Q4_0"),
    "smollm2-135m": Shape("llama", 30, 576, 9, 3, 1536, 49152, 8192, quant="Q8_0", tied=True),
    "smollm3-3b": Shape("smollm3", 36, 2048, 16, 4, 11008, 128256, 65536, tied=True),
    "internlm2-1.8b": Shape("internlm2", 24, 2048, 16, 8, 8192, 92544, quant="Q6_K"),
    "ministral-3b": Shape("mistral3", 26, 3072, 32, 8, 9216, 131072, head=128, tied=True),
    "qwen2.5-14b": Shape("qwen2", 48, 5120, 40, 8, 13824, 152064, bias=True),
    "granite-3.1-2b": Shape(
        "granite", 40, 2048, 32, 8, 8192, 49155, 131072, tied=True, metadata=_GRANITE
    ),
    # --- experts
    "mixtral-8x7b": Shape(
        "llama", 32, 4096, 32, 8, 14336, 32000, experts=8, experts_used=2
    ),
    "qwen1.5-moe-a2.7b": Shape(
        "qwen2moe", 24, 2048, 16, 16, 5632, 151936, 8192, bias=True,
        experts=60, experts_used=4, expert_ff=1408, shared_ff=5632,
    ),
    "olmoe-1b-7b": Shape(
        "olmoe", 16, 2048, 16, 16, 1024, 50304, 4096, quant="Q5_K_M", experts=64, experts_used=8
    ),
    "granite-3.1-1b-a400m": Shape(
        "granitemoe", 24, 1024, 16, 8, 512, 49155, 131072, tied=True, quant="Q8_0",
        experts=32, experts_used=8, metadata=_GRANITE,
    ),
    "glm-4.5-air-ish": Shape(
        "glm4moe", 24, 4096, 96, 8, 10944, 151552, 131072, head=128, bias=True, quant="IQ4_XS",
        experts=64, experts_used=8, expert_ff=1408, shared_ff=1408, dense_layers=1,
        metadata={
            "nextn_predict_layers": ("u32", 1), "expert_shared_count": ("u32", 1),
            "rope.dimension_count": ("u32", 64),
        },
    ),
    "deepseek-absorbed": Shape(
        "deepseek2", 27, 1536, 16, 1, 8192, 102400, 163840,
        experts=32, experts_used=4, expert_ff=1024, shared_ff=2048, dense_layers=1,
        ssm={"latent": 512, "rope": 64, "plain": 128, "value": 128},
        metadata=_mla(512, 64, 128, 128, absorbed=True),
    ),
    "deepseek-unabsorbed": Shape(
        "deepseek2", 27, 1536, 16, 16, 8192, 102400, 163840,
        experts=32, experts_used=4, expert_ff=1024, shared_ff=2048, dense_layers=1,
        ssm={"latent": 512, "rope": 64, "plain": 128, "value": 128},
        metadata=_mla(512, 64, 128, 128, absorbed=False),
    ),
    # --- norms, windows, shapes of their own
    "gemma-2-2b": Shape(
        "gemma2", 26, 2304, 8, 4, 9216, 256000, 8192, head=256, tied=True, window=4096,
        metadata={
            "attn_logit_softcapping": ("f32", 50.0), "final_logit_softcapping": ("f32", 30.0),
        },
    ),
    "gemma-3-270m": Shape(
        "gemma3", 18, 640, 4, 1, 2048, 262144, head=256, tied=True, window=512
    ),
    "phi-2": Shape(
        "phi2", 32, 2560, 32, 32, 10240, 51200, 2048, bias=True, fused=True,
        metadata={"rope.dimension_count": ("u32", 32)},
    ),
    "phi-3-medium": Shape("phi3", 40, 5120, 40, 10, 17920, 32064, 4096, fused=True, quant="IQ4_XS"),
    "starcoder2-3b": Shape(
        "starcoder2", 30, 3072, 24, 2, 12288, 49152, 16384, bias=True, tied=True
    ),
    "stablelm-2-1.6b": Shape(
        "stablelm", 24, 2048, 32, 32, 5632, 100352, 4096, bias=True, quant="F16",
        metadata={"rope.dimension_count": ("u32", 16), "use_parallel_residual": ("bool", False)},
    ),
    "command-r7b": Shape(
        "cohere2", 32, 4096, 32, 8, 14336, 256000, 8192, tied=True, window=4096,
        metadata={"logit_scale": ("f32", 0.25), "rope.dimension_count": ("u32", 128)},
    ),
    "olmo-2-7b": Shape("olmo2", 32, 4096, 32, 32, 11008, 100352, 4096),
    "olmo-3-7b": Shape("olmo2", 32, 4096, 32, 32, 11008, 100278, 65536, window=4096),
    "exaone-4.0-1.2b": Shape("exaone4", 30, 2048, 32, 8, 4096, 102400, 65536, tied=True),
    "minicpm3-4b": Shape(
        "minicpm3", 62, 2560, 40, 40, 6400, 73448, quant="Q4_0",
        metadata={
            "attention.q_lora_rank": ("u32", 768), "attention.kv_lora_rank": ("u32", 256),
            "attention.key_length": ("u32", 96), "attention.value_length": ("u32", 64),
            "rope.dimension_count": ("u32", 32),
        },
    ),
    "glm-4-9b": Shape(
        "glm4", 40, 4096, 32, 2, 13696, 151552, bias=True,
        metadata={"rope.dimension_count": ("u32", 64)},
    ),
    # --- embeddings
    "bge-small": Shape("bert", 12, 384, 12, 12, 1536, 30522, 512, bias=True, quant="F16"),
    "all-minilm-l6": Shape("bert", 6, 384, 12, 12, 1536, 30522, 512, bias=True, quant="Q8_0"),
    "jina-v2-small": Shape("jina-bert-v2", 4, 512, 8, 8, 2048, 30528, 8192, bias=True, quant="F16"),
    # --- a state instead of a cache, in all layers or in most
    "mamba-370m": Shape(
        "mamba", 48, 1024, 0, 0, 0, 50280, 1048576, tied=True, quant="Q8_0",
        ssm={"conv": 4, "inner": 2048, "state": 16, "heads": 64},
    ),
    "mamba2-1.3b": Shape(
        "mamba2", 48, 2048, 0, 0, 0, 50288, 1048576, tied=True,
        ssm={"conv": 4, "inner": 4096, "state": 128, "heads": 64, "groups": 1},
    ),
    "falcon-h1-1.5b": Shape(
        "falcon-h1", 24, 2048, 8, 2, 4096, 65537, 131072, head=128,
        ssm={"conv": 4, "inner": 3072, "state": 256, "heads": 48, "groups": 1},
    ),
    "granite-4.0-h-tiny": Shape(
        "granitehybrid", 40, 1536, 12, 4, 512, 100352, 131072, tied=True, attention_every=10,
        experts=64, experts_used=6, shared_ff=1024, metadata=_GRANITE,
        ssm={"conv": 4, "inner": 3072, "state": 128, "heads": 48, "groups": 1},
    ),
    "granite-4.0-h-micro": Shape(
        "granitehybrid", 40, 2048, 32, 8, 8192, 100352, 131072, tied=True, attention_every=10,
        metadata=_GRANITE,
        ssm={"conv": 4, "inner": 4096, "state": 128, "heads": 64, "groups": 1},
    ),
    "lfm2-1.2b": Shape(
        "lfm2", 16, 2048, 32, 8, 8192, 65536, 128000, tied=True, attention_every=3,
        metadata={"shortconv.l_cache": ("u32", 3)},
    ),
    "lfm2-8b-a1b": Shape(
        "lfm2moe", 24, 2048, 32, 8, 7168, 65536, 128000, tied=True, attention_every=4,
        experts=32, experts_used=4, expert_ff=1792, dense_layers=2,
        metadata={"shortconv.l_cache": ("u32", 3), "expert_gating_func": ("u32", 2)},
    ),
    "qwen3.5-4b": Shape(
        "qwen35", 32, 2560, 16, 4, 9216, 248320, 262144, head=256, tied=True, attention_every=4,
        ssm={"conv": 4, "inner": 4096, "state": 128, "heads": 32, "groups": 16},
        metadata={
            "rope.dimension_count": ("u32", 64),
            "rope.dimension_sections": ("i32[]", [11, 11, 10, 0]),
        },
    ),
    "qwen3-next-ish": Shape(
        "qwen3next", 24, 2048, 16, 2, 5120, 151936, 262144, head=256, attention_every=4,
        experts=128, experts_used=10, expert_ff=512, shared_ff=512,
        ssm={"conv": 4, "inner": 4096, "state": 128, "heads": 32, "groups": 16},
        metadata={"rope.dimension_count": ("u32", 64)},
    ),
    "gemma-3n-e2b": Shape(
        "gemma3n", 30, 2048, 8, 2, 8192, 262144, head=256, tied=True, window=512,
        metadata={
            "altup.active_idx": ("u32", 0), "altup.num_inputs": ("u32", 4),
            "embedding_length_per_layer_input": ("u32", 256),
            "attention.shared_kv_layers": ("u32", 10),
            "attention.sliding_window_pattern": ("bool[]", [(n + 1) % 5 != 0 for n in range(30)]),
        },
    ),
}  # fmt: skip


def unseen(name: str) -> Model:
    """The model of that name; its header is really written, and really read."""
    written, data_bytes = gguf_files.header(*header(MODELS[name]))
    parsed = parse(written, len(written) + data_bytes)
    assert parsed is not None
    return Model((parsed,))
