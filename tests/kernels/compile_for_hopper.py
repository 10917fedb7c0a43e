"""Compiles each kernel as its wrapper launches it, for compute capability 9.0, on a machine that needs no GPU.

The wrappers are called with tensors of the meta device, which have shapes but no memory, and what they would launch is
compiled instead. Run in a process of its own: the tests' has Triton's interpreter. Prints a JSON object for each kernel
variant: its name, the shared memory that it takes, in bytes, and whether it uses Hopper's matrix instructions.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.core.kv_layout import KVLayout
from engine.kernels.activation import silu_mul
from engine.kernels.blocks import copy_blocks, gather_blocks, quantize_blocks, records_of, scatter_blocks
from engine.kernels.decode_attention import decode_attention
from engine.kernels.kv_write import write_kv, write_kv_quantized
from engine.kernels.norm import add_rms_norm, rms_norm
from engine.kernels.prefill_attention import prefill_attention
from engine.kernels.rope import rope_
from engine.kernels.sampling import sample
from engine.kv_cache import KVCache

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages")
NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def compile_launch(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
    """Stands in for ``JITFunction.run``."""
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in options.items() if k not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    chosen = {name: options[name] for name in OPTIONS if name in options}
    binary = triton.compile(source, target=TARGET, options=chosen)
    assert binary.asm["cubin"]
    print(
        json.dumps({"kernel": kernel.__name__, "shared": binary.metadata.shared, "wgmma": "wgmma" in binary.asm["ptx"]})
    )


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def cache(dtype: str, dim: int, kv_heads: int = 8, block_size: int = 16) -> KVCache:
    layout = KVLayout(2, kv_heads, dim, block_size, dtype)
    return KVCache(layout, empty(8 * layout.block_bytes, dtype=torch.uint8))


def attention() -> None:
    """Llama 3's shape; Gemma 2's cap, window and head size; an odd head size; fp32; each KV dtype."""
    shapes = [
        (torch.bfloat16, "bfloat16", 32, 8, 128, {}),
        (torch.float16, "int8", 32, 8, 128, {"window": 4096}),
        (torch.bfloat16, "fp8", 64, 8, 128, {}),
        (torch.bfloat16, "bfloat16", 16, 8, 256, {"window": 4096, "softcap": 50.0}),
        (torch.float16, "float16", 12, 12, 80, {}),
        (torch.float32, "float32", 9, 3, 64, {}),
    ]
    for dtype, kv_dtype, heads, kv_heads, dim, options in shapes:
        kv = cache(kv_dtype, dim, kv_heads)
        data, scales = kv.data[:, 1], None if kv.scales is None else kv.scales[:, 1]
        qkv = empty(4, heads + 2 * kv_heads, dim, dtype=dtype)
        query, key, value = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        out = empty(4, heads * dim, dtype=dtype)
        for splits in (1, 16) if options else (16,):
            decode_attention(
                query, data, scales, ints(4, 64), ints(4), ints(4), out, scale=0.1, splits=splits, **options
            )
        prefill_attention(query, data, scales, ints(4, 64), ints(9, 2), ints(5), ints(4), out, scale=0.1, **options)
        if scales is None:
            write_kv(key, value, data, empty(4, dtype=torch.int64))
        else:
            write_kv_quantized(key, value, data, scales, ints(4, 4))


def others() -> None:
    indices = empty(4, dtype=torch.int64)
    x = empty(4, 4096)
    weight = empty(4096, dtype=torch.float32)
    rms_norm(x, weight, 1e-5)
    add_rms_norm(x, x, weight, 1e-5)
    cos = empty(8192, 64)
    norms = (empty(128, dtype=torch.float32), empty(128, dtype=torch.float32))
    rope_(empty(4, 48, 128), indices, cos, cos, 32, 8)
    rope_(empty(4, 48, 128), indices, cos, cos, 32, 8, norms, 1e-6)
    silu_mul(empty(4, 28672))
    rows = [
        empty(4, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.int32, torch.float64, torch.float32)
    ]
    sample(empty(4, 128256, dtype=torch.float32), *rows)
    source = cache("bfloat16", 128)
    records = records_of(source)
    staging = empty(4, *records.shape[1:], dtype=torch.uint8)
    gather_blocks(records, indices, staging)
    scatter_blocks(staging, records, indices)
    copy_blocks(records, indices, indices)
    for kv_dtype in ("int8", "fp8"):
        target = cache(kv_dtype, 128)
        assert target.scales is not None
        quantize_blocks(source.data, indices, ints(4), target.data, target.scales)


def main() -> None:
    JITFunction.run = compile_launch
    attention()
    others()


if __name__ == "__main__":
    main()
