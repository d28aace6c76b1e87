"""The part of kernels.py that needs a GPU: correctness, operations against their floors, layers, the targets."""

from collections.abc import Iterator
from typing import Any

import kernel_accuracy as accuracy
import kernel_cases as cases
import kernel_floors as floors
import torch
from torch import nn

from orthotrain.kernels.groups import GROUPS

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 1024), (512, 512)]
BLOCKS = [256, 32, 64, 128, 512]
TOKENS = [16384, 2048, 512]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(session: Any, device: torch.device) -> bool:
    """Check, then time; return whether all was right. No time is reported of a wrong kernel."""
    if not correctness(session, device):
        return False
    ceilings = floors.measured_ceilings(device)
    session.results["ceilings"] = ceilings._asdict()
    rates = f"bf16 {ceilings.bf16 / 1e12:.0f} and tf32x3 {ceilings.tf32x3 / 1e12:.0f} TFLOP/s"
    print(f"copy {ceilings.bandwidth / 1e12:.2f} TB/s, products {rates}")
    operations(session, device, ceilings)
    layers(session, device)
    session.results["targets"] = list(targets(session.results))
    for target in session.results["targets"]:
        met = "met" if target["value"] <= target["limit"] else "MISSED"
        print(f"{target['target']:<52}{target['value']:>7.2f} of {target['limit']:.2f}  {met}")
    return True


def correctness(session: Any, device: torch.device) -> bool:
    """Hold every operation to fp64; return whether all were right."""
    right = True
    for dtype in DTYPES:
        worst: dict[str, float] = {}
        for name, limit, results in accuracy.checks(dtype, device):
            for key, error in accuracy.errors(results, dtype).items():
                if error > limit:
                    print(f"WRONG: {name} {key} {dtype}: {error:.1e} > {limit:.1e}")
                    right = False
                kind = f"{name.split(' n=')[0].split(' ')[0]} {key}"
                worst[kind] = max(worst.get(kind, 0.0), error)
        session.results[f"error {dtype}"] = worst
        print(f"{dtype}: largest error of {len(worst)} results {max(worst.values()):.1e}")
    return right


def operations(session: Any, device: torch.device, ceilings: floors.Ceilings) -> None:
    """Every operation alone: time and the share of its floor, rotations with every route of a permutation."""
    print(f"\n{'operation':<36}{'forward us':>11}{'floor':>7}{'backward us':>13}{'floor':>7}")
    for name, make in floors.operations(device):
        if session.wants(name):
            report(session, name, make(), device, ceilings)
    for tokens, width in ((16384, 4096), (2048, 4096), (16384, 14336)):
        for size in (32, 64, 256):
            for route in ("natural", "groups", "fused", "passes"):
                name = f"rotation {tokens}x{width} b={size} {route}"
                if session.wants(name):
                    with cases.permutation_route(route):
                        group = {"natural": None, "groups": GROUPS[0]}.get(route, 1)
                        passes = floors.rotation(tokens, width, size, group, device)
                        report(session, name, passes, device, ceilings)


def report(
    session: Any, name: str, passes: dict[str, floors.Pass], device: torch.device, ceilings: floors.Ceilings
) -> None:
    """Time an operation, print a line and keep the numbers."""
    ms = cases.interleaved({part: one.run for part, one in passes.items()}, device, session.rounds, repeat=5)
    row = {p: {"us": 1e3 * ms[p], "share_of_floor": one.floor(ceilings) / ms[p]} for p, one in passes.items()}
    session.results[name] = row
    widths = {"forward": 11, "backward": 13}
    cells = "".join(f"{found['us']:>{widths[part]}.0f}{found['share_of_floor']:>7.2f}" for part, found in row.items())
    print(f"{name:<36}{cells}", flush=True)


def layers(session: Any, device: torch.device) -> None:
    """Layers in bf16: forward, forward and backward, and peak memory, relative to a trained nn.Linear."""
    print(f"\n{'out x in, N, b':<26}{'ms':>8}  forward + backward relative to nn.Linear")
    for name, d_out, d_in, tokens, size in layer_cases():
        if not session.wants(name):
            continue
        linear = nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16, device=device)
        x = torch.randn(tokens, d_in, dtype=torch.bfloat16, device=device, requires_grad=True)
        grad = torch.randn(tokens, d_out, dtype=torch.bfloat16, device=device)
        made = cases.plain_layers(linear) | cases.block_layers(linear, size)
        runs = {key: cases.passes(layer, x, grad, choice) for key, (layer, choice) in made.items()}
        forward = cases.interleaved({k: run[0] for k, run in runs.items()}, device, session.rounds, repeat=2)
        both = cases.interleaved({k: run[1] for k, run in runs.items()}, device, session.rounds, repeat=2)
        session.results[name] = {
            key: {"forward_ms": forward[key], "both_ms": both[key], "peak_mib": cases.peak_mib(run[1], device)}
            for key, run in runs.items()
        }
        base = both["nn.Linear"]
        ratios = ", ".join(f"{key} {value / base:.2f}" for key, value in both.items() if key != "nn.Linear")
        print(f"{name[6:]:<26}{base:>8.3f}  {ratios}", flush=True)


def layer_cases() -> Iterator[tuple[str, int, int, int, int]]:
    """Yield name, out, in, tokens and block size: those of the targets first, then those that matter most."""
    found = [(*shape, tokens, size) for size in BLOCKS for shape in SHAPES for tokens in TOKENS]
    for d_out, d_in, tokens, size in sorted(found, key=lambda case: case[:2] != SHAPES[0] or case[3] not in (256, 32)):
        yield f"layer {d_out}x{d_in} N={tokens} b={size}", d_out, d_in, tokens, size


def targets(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the numbers that are to be held, of what was measured: what, value and limit."""
    for tokens in (16384, 2048):
        for size, layer, base, limit in (
            (256, "POET auto", "nn.Linear", 1.0),
            (256, "POET mem", "nn.Linear", 1.3),
            (32, "OFT", "frozen", 1.15),
        ):
            row = results.get(f"layer 4096x4096 N={tokens} b={size}", {})
            if layer in row and base in row:
                value = row[layer]["both_ms"] / row[base]["both_ms"]
                yield {"target": f"{layer} 4096 N={tokens} b={size} over {base}", "value": value, "limit": limit}
    for name in ("cayley_neumann", "cayley_neumann_generators"):
        for size in (32, 64, 256):
            for part, found in results.get(f"{name} b={size}", {}).items():
                yield {"target": f"{name} b={size} {part} over floor", "value": 1 / found["share_of_floor"], "limit": 2}
