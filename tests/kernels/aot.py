"""Compiles the shipped Triton kernels for GPUs that need not be there, and reads what the compiler made of them.

    python tests/kernels/aot.py [--op OP] [--capability 90]     print the table as JSON
    python tests/kernels/aot.py [--op OP] --write               and put it into aot_table.json beside this file

launches.py lists what is compiled: a new kernel gets its launches there.

Must run without TRITON_INTERPRET, hence in a process of its own: `compiled(op)` starts one.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).with_name("aot_table.json")
CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory that a program may take on every device that the kernels admit: 99 KiB on those of sm_86,
sm_89 and sm_120, which run what is compiled here for sm_80 but for its memory; more on the others (CUDA C++ Programming
Guide, table 27)."""

SPILL = re.compile(r"\bSTL\b")
NARROW = re.compile(r"\b(?:LDG|STG)[.\w]*\.U16\b")
TENSOR_CORE = re.compile(r"\b([HIQ]MMA|HGMMA|UTC[A-Z]*MMA)\b")


def operations() -> list[str]:
    """Return the operations that have Triton kernels."""
    kernels = importlib.import_module("orthotrain.kernels")
    places = [Path(place) for place in kernels.__path__]
    packages = [info.name for info in pkgutil.iter_modules(kernels.__path__) if info.ispkg]
    return sorted(op for op in packages if any((place / op / "triton.py").exists() for place in places))


def compiled(op: str) -> dict[str, dict[str, int | bool]]:
    """Compile an operation's kernels in a process of its own; return what ``compile_operation`` does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--op", op]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling the kernels of {op} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def compile_operation(op: str, capabilities: tuple[int, ...]) -> dict[str, dict[str, int | bool]]:
    """Return registers, shared memory, spilling stores and tensor-core use by ``op/variant/sm_NN``."""
    sys.path.insert(0, str(Path(__file__).parent))  # with `python -P` a script does not find the files beside it
    return {
        f"{op}/{variant.name}/sm_{capability}": compile_variant(variant, capability)
        for variant in importlib.import_module("launches").LAUNCHES[op]
        for capability in capabilities
    }


def compile_variant(variant, capability: int) -> dict[str, int | bool]:
    """Compile one kernel for one generation of GPU, and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = set(variant.signature) ^ set(names) ^ set(variant.constexprs)
    assert not unknown, f"{variant.name}: arguments that are not given, not known, or given twice: {unknown}"
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if (signature[name].startswith("*") and name not in variant.views) or name in variant.aligned
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    kernel = triton.compile(
        ASTSource(variant.kernel, signature, variant.constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **dict(variant.options)},
    )
    resources, code = _read(kernel.asm["cubin"])
    return {
        "registers": int(re.search(r"REG:(\d+)", resources).group(1)),
        "shared": kernel.metadata.shared,
        "spills": len(SPILL.findall(code)),
        "tensor_cores": bool(TENSOR_CORE.search(code)),
        "wants_tensor_cores": variant.tensor_cores,
        "narrow": len(NARROW.findall(code)),
        "wants_vectors": variant.vectors,
    }


def _read(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the machine code of a cubin, by the tools that triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        options = ("--dump-resource-usage", "-sass")
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in options
        )
    return usage, code


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description="Compile the shipped Triton kernels ahead of time.")
    parser.add_argument("--op", choices=operations(), action="append", help="only this operation; may be repeated")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="only this generation, such as 90")
    parser.add_argument("--write", action="store_true", help=f"update {TABLE.name}")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: unset it, an interpreted kernel is not compiled")
    capabilities = (arguments.capability,) if arguments.capability else CAPABILITIES
    found = {}
    for op in arguments.op or operations():
        found.update(compile_operation(op, capabilities))
    print(json.dumps(found, indent=1))
    if arguments.write:
        _update(found, triton.__version__)


def _update(found: dict[str, dict[str, int | bool]], version: str) -> None:
    """Replace the entries of the operations that were compiled."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": version, "kernels": {}}
    done = {key.split("/")[0] for key in found}
    kept = {key: entry for key, entry in table["kernels"].items() if key.split("/")[0] not in done}
    measured = {key: {name: entry[name] for name in ("registers", "shared")} for key, entry in found.items()}
    lines = (f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted({**kept, **measured}.items()))
    body = ",\n".join(lines)
    TABLE.write_text(f'{{\n "triton": {json.dumps(version)},\n "kernels": {{\n{body}\n }}\n}}\n')


if __name__ == "__main__":
    main()
