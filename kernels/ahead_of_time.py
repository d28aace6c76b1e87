"""A launch of a Triton kernel, described for compilation ahead of time: dtypes, tile sizes and warps."""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One launch of a kernel, which a test compiles without a GPU and without tensors.

    ``aot_variants()`` of an operation's ``triton.py`` returns the launches that matter. A test compiles them for every
    generation of GPU and compares registers, spills and shared memory with a table.

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

    def unaligned(self, *views: str) -> "Variant":
        """Return the same launch for views that begin at any address and matrices whose rows do."""
        return self._replace(name=f"{self.name}-unaligned", vectors=False, aligned=(), views=views)
