"""The launches of the Triton kernels that aot.py compiles ahead of time, described without tensors."""

from typing import Any, NamedTuple

import torch

from orthotrain.kernels.block_rotate import contraction, permute_columns
from orthotrain.kernels.block_rotate import triton as rotation
from orthotrain.kernels.block_rotate.tiling import WIDEST_LOAD
from orthotrain.kernels.cayley import triton as cayley
from orthotrain.kernels.chain import launch
from orthotrain.kernels.chain.kernels import chain_step_kernel, fused_chain_kernel
from orthotrain.kernels.dequant import triton as dequant
from orthotrain.kernels.skew import triton as skew

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
"""Triton's names of pointers to what the kernels compute in."""


class Variant(NamedTuple):
    """One launch of a kernel. The compiled kernel is compared with aot_table.json.

    Attributes:
        name: Unique in its operation, such as ``forward-b64-fp32``.
        kernel: The ``triton.jit`` function.
        signature: Type of every runtime argument by name, in Triton's spelling: ``*fp32``, ``*bf16``, ``i32``.
        constexprs: Value of every ``tl.constexpr`` argument by name.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
        tensor_cores: Whether the kernel has a product that must run on tensor cores.
        vectors: Whether the kernel must move 16-bit values 16 bytes at once, without any load or store of 2 bytes.
        aligned: Integer arguments that are divisible by 16 in a usual launch. Triton specializes on that.
        views: Pointers to views, which need not be divisible by 16 as pointers to new tensors are.
        options: Further options of the launch, such as ``enable_fp_fusion``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    vectors: bool = False
    aligned: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def unaligned(self, *views):
        """Return the same launch for views that begin at any address and matrices whose rows do."""
        return self._replace(name=f"{self.name}-unaligned", vectors=False, aligned=(), views=views)


def permuted(group):
    """Return how the name of a launch ends for permutations by groups of a size; None for no permutation."""
    return "" if group is None else f"-groups{group}" if group > 1 else "-permuted"


def tiled(name, kernel, signature, constexprs, tiling, tensor_cores=True, **options):
    """Return a launch with products whose constants and warps are those of a launch's tiling."""
    constants = {name: value for name, value in tiling.items() if not name.startswith("num_")}
    warps, stages = tiling["num_warps"], tiling["num_stages"]
    return Variant(name, kernel, signature, constexprs | constants, warps, stages, tensor_cores, **options)


def rotate(dtype, block_size, *, group=None, columns_first=False, backward=False, wide=False):
    """Return one launch of the rotation, permuted by groups or not, in rows or in columns; backward by ``D^T``."""
    tiles, pointer = rotation.rotation_tiles(dtype, block_size), POINTERS[dtype]
    unit, strided = ("row", "column") if columns_first else ("column", "row")
    permutations = ("gather", "scatter")
    return tiled(
        f"rotate-b{block_size}-{pointer[1:]}{permuted(group)}{'-transposed' * columns_first}"
        f"{'-backward' * backward}{'-wide' * wide}",
        rotation._rotate_kernel,
        {
            **dict.fromkeys(("x", "displacement", "y"), pointer),
            **({} if group is None else dict.fromkeys(permutations, "*i64")),
            **dict.fromkeys(("rows", "width", "blocks", "tiles", f"x_{strided}", f"y_{strided}"), "i32"),
        },
        {
            **(dict.fromkeys(permutations) if group is None else {}),
            **{f"x_{unit}": 1, f"y_{unit}": 1, "BLOCK": block_size, "TRANSPOSED": backward, "WIDE": wide},
            **{"GATHER_GROUP": group or 1, "SCATTER_GROUP": group or 1},
        },
        tiles,
        tensor_cores=dtype != torch.float32,
        vectors=group is None or group * dtype.itemsize >= WIDEST_LOAD,
        aligned=("rows", "width", f"x_{strided}", f"y_{strided}"),
    )


def contract(dtype, block_size, *, group=None, columns_first=False, wide=False):
    """Return one launch of the contraction, of matrices in rows or in columns, permuted by groups or not."""
    tiles, pointer = contraction.contraction_tiles(dtype, block_size), POINTERS[dtype]
    unit, strided = ("row", "column") if columns_first else ("column", "row")
    permutations = ("left_permutation", "right_permutation")
    return tiled(
        f"contract-b{block_size}-{pointer[1:]}{permuted(group)}{'-transposed' * columns_first}{'-wide' * wide}",
        contraction._contract_kernel,
        {
            **{"left": pointer, "right": pointer, "out": "*fp32"},
            **({} if group is None else dict.fromkeys(permutations, "*i64")),
            **dict.fromkeys(("rows", "split_rows", "blocks", f"left_{strided}", f"right_{strided}"), "i32"),
        },
        {
            **(dict.fromkeys(permutations) if group is None else {}),
            **{f"left_{unit}": 1, f"right_{unit}": 1, "BLOCK": block_size, "WIDE": wide},
            **{"LEFT_GROUP": group or 1, "RIGHT_GROUP": group or 1},
        },
        tiles,
        tensor_cores=dtype != torch.float32,
        vectors=group is None or group * dtype.itemsize >= WIDEST_LOAD,
        aligned=("rows", "split_rows", f"left_{strided}", f"right_{strided}"),
    )


def add_splits(dtype):
    """Return the launch that adds partial sums up to a result of a dtype."""
    pointer = POINTERS[dtype]
    signature = {"partial": "*fp32", "out": pointer, "size": "i32", "splits": "i32"}
    name = f"add-splits-{pointer[1:]}"
    return Variant(name, contraction._add_splits_kernel, signature, {"SIZE": 1024}, aligned=("size",))


def permute(width, dtype):
    """Return the launch that permutes rows of ``width`` columns, a power of two."""
    integers = dict.fromkeys(("rows", "width", "chunk", "x_row", "y_row"), "i32")
    return Variant(
        f"permute-{width}-{dtype}",
        permute_columns._permute_kernel,
        {"x": f"*{dtype}", "permutation": "*i64", "y": f"*{dtype}", **integers},
        {"ROWS": permute_columns.rows_at_once(width), "WIDTH": width},
        num_warps=max(4, width // 1024),
        aligned=("width", "x_row", "y_row"),
    )


def fused(size, dtype, generators=False):
    """Return the fused chain kernel of two inputs."""
    pointers = {name: f"*{dtype}" for name in ("first", "second", "out")} | {"scratch": "*fp32", "table": "*i32"}
    return tiled(
        f"{'generators' if generators else 'fused'}-b{size}-{dtype}",
        fused_chain_kernel,
        pointers | {"steps": "i32", "slots": "i32", "scale": "fp32", "blocks": "i32"},
        {"INPUTS": 2, "GENERATORS": generators, "PRECISION": launch.EXACT},
        launch.fused_tiling(size),
    )


def step(size, dtype, terms):
    """Return the kernel of a step of two products."""
    operands = ("left_0", "right_0", "left_1", "right_1", "term_0", "term_1", "term_2")
    numbers = ("factor", "coefficient_0", "coefficient_1", "coefficient_2")
    return tiled(
        f"step-b{size}-{dtype}-{terms}",
        chain_step_kernel,
        {"out": f"*{dtype}"} | dict.fromkeys(operands, "*fp32") | dict.fromkeys(numbers, "fp32"),
        {"PRODUCTS": 2, "TERMS": terms, "PRECISION": launch.EXACT},
        launch.step_tiling(size),
    )


def cayley_forward(size, dtype):
    """Return the launch of the exact Cayley transform on blocks of ``size`` rows."""
    signature = {"skew": f"*{dtype}", "out": f"*{dtype}", "scratch": "*fp32", "blocks": "i32"}
    name, constants = f"forward-b{size}-{dtype}", {"PRECISION": cayley.PRECISION}
    return tiled(name, cayley._cayley_forward_kernel, signature, constants, launch.fused_tiling(size))


def skew_blocks(direction, block_size, dtype):
    """Return the launch that makes skew blocks from generators, or takes their gradients back."""
    kernel, first, second = {
        "forward": (skew._skew_forward_kernel, "generators", "q"),
        "backward": (skew._skew_backward_kernel, "grad", "out"),
    }[direction]
    signature = {first: f"*{dtype}", second: f"*{dtype}", "blocks": "i32"}
    constants = {"size": block_size, **skew.tiling(block_size)}
    return Variant(f"{direction}-b{block_size}-{dtype}", kernel, signature, constants)


def unpack_int8():
    """Return the launch that unpacks 8-bit integers."""
    signature = {"codes": "*i8", "scales": "*fp32", "out": "*bf16", "size": "i32"}
    constants = {"GROUP": 256, "SIZE": dequant.SIZE}
    return Variant("int8-bf16", dequant._int8_kernel, signature, constants, aligned=("size",))


def unpack_nf4(nested):
    """Return the launch that unpacks NF4, with or without double quantization."""
    statistics = ("nested", "offset", "code")
    signature = {
        "packed": "*u8",
        "levels": "*fp32",
        "out": "*bf16",
        "size": "i32",
        "absmax": "*u8" if nested else "*fp32",
    }
    constants = {"GROUP": 64, "SIZE": dequant.SIZE}
    return Variant(
        "nf4-nested-bf16" if nested else "nf4-bf16",
        dequant._nf4_kernel,
        signature | (dict.fromkeys(statistics, "*fp32") if nested else {}),
        constants | ({} if nested else dict.fromkeys(statistics)),
        aligned=("size",) if nested else (),
        options=dequant.EXACT,
    )


LAUNCHES = {
    "block_rotate": [
        rotate(torch.bfloat16, 16, group=1),
        rotate(torch.bfloat16, 32, group=1),
        rotate(torch.bfloat16, 256, group=1),
        rotate(torch.bfloat16, 256, group=1).unaligned("x"),
        rotate(torch.bfloat16, 256, group=1, wide=True),
        rotate(torch.bfloat16, 32, group=8),
        rotate(torch.bfloat16, 256, group=8),
        rotate(torch.bfloat16, 256, group=8, backward=True),
        rotate(torch.float32, 256, group=8),
        rotate(torch.bfloat16, 256),
        rotate(torch.bfloat16, 256, backward=True),
        rotate(torch.float16, 256, group=1, backward=True),
        rotate(torch.float32, 32, group=1),
        rotate(torch.float32, 256, group=1, backward=True, wide=True),
        contract(torch.bfloat16, 16, group=1),
        contract(torch.bfloat16, 32, group=1),
        contract(torch.bfloat16, 32, group=8),
        contract(torch.bfloat16, 256, group=8),
        contract(torch.bfloat16, 256),
        contract(torch.bfloat16, 256).unaligned("left", "right"),
        contract(torch.float16, 256, group=1, wide=True),
        contract(torch.float32, 256),
        add_splits(torch.bfloat16),
        permute(1024, "bf16"),
        permute(1024, "bf16").unaligned("x"),
        permute(4096, "bf16"),
        permute(32768, "bf16"),
        permute(16384, "fp32"),
    ],
    "cayley": [cayley_forward(64, "fp32"), cayley_forward(12, "fp16")],
    "cayley_neumann": [
        *(fused(size, "fp32") for size in (8, 16, 32, 64)),
        *(fused(size, "fp16") for size in (12, 64)),
        fused(64, "fp32", generators=True),
        *(step(size, "fp32", terms=2) for size in (256, 192)),
    ],
    "dequant": [unpack_int8(), unpack_nf4(nested=True), unpack_nf4(nested=False)],
    # beyond the launches of cayley_neumann: steps of three terms
    "exponential": [step(256, "bf16", terms=3), step(200, "fp32", terms=3)],
    # the kernels of block_rotate on transposed matrices
    "fold": [
        rotate(torch.bfloat16, 256, group=1, columns_first=True),
        rotate(torch.bfloat16, 256, group=8, columns_first=True),
        contract(torch.bfloat16, 256, group=1, columns_first=True),
        contract(torch.bfloat16, 256, group=8, columns_first=True),
    ],
    # what block_rotate does not list: small blocks in the natural order
    "oft_linear": [rotate(torch.bfloat16, 32)],
    "skew": [
        skew_blocks("forward", 256, "fp32"),
        skew_blocks("forward", 12, "fp16"),
        skew_blocks("backward", 256, "bf16"),
        skew_blocks("backward", 12, "fp32"),
    ],
    # what block_rotate does not list: transposed matrices, and sums in fp32
    "tangent": [
        contract(torch.bfloat16, 128, group=8),
        contract(torch.bfloat16, 128, group=8, columns_first=True),
        add_splits(torch.float32),
    ],
}
"""The launches by operation: that of every folder of kernels/ with a ``triton.py``."""
