"""A Triton kernel as it is shipped: with the dtypes, tile sizes and warps of one launch."""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """What compiles one kernel ahead of time, without a GPU and without tensors.

    The ``aot_variants()`` of an operation's ``triton.py`` returns the few that matter; a test compiles them for every
    generation of GPU and holds their registers, spills and shared memory.

    Attributes:
        name: Unique in its operation, such as ``forward-b64-fp32``.
        kernel: The ``triton.jit`` function.
        signature: Type of every runtime argument by name, in Triton's spelling: ``*fp32``, ``*bf16``, ``i32``.
        constexprs: Value of every ``tl.constexpr`` argument by name.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
        tensor_cores: Whether the kernel has a product that must run on the tensor cores.
        vectors: Whether it must move 16 bytes at once where it moves 16-bit values: it has no 2-byte load or store.
        aligned: Integer arguments that are divisible by 16 in a usual launch. Triton specialises on that.
        views: Pointers that need not be divisible by 16, as those of fresh tensors are: they are of views.
        options: What the launch sets beside warps and stages, such as ``enable_fp_fusion``.
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

    def unaligned(self, *views: str) -> "Variant":
        """Return the variant of views that begin anywhere, and of matrices whose rows do."""
        return self._replace(name=f"{self.name}-unaligned", vectors=False, aligned=(), views=views)
