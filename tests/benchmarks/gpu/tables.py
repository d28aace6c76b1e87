"""The tables of a run, in Markdown, from its results by stage and case."""

from collections.abc import Iterable, Sequence
from typing import Any

Results = dict[str, dict[str, Any]]

LAYER_TARGETS = (
    ("4096x4096 N=2048 POET pooled, replayed", "nn.Linear", 1.10),
    ("4096x4096 N=16384 POET pooled, replayed", "nn.Linear", 0.95),
    ("4096x4096 N=16384 step-wise, replayed", "nn.Linear", 0.80),
    ("4096x4096 N=2048 OFT, replayed", "frozen", 1.25),
)
"""Case, the layer that it is compared with, and the largest ratio that is aimed at."""


def good(results: Results, stage: int) -> dict[str, Any]:
    """Return the results of a stage that are neither errors nor left out."""
    return {n: r for n, r in results.get(str(stage), {}).items() if "error" not in r and "skipped" not in r}


def markdown(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table, or nothing where it has no rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"**{title}**", "", f"| {' | '.join(heads)} |", "|-" * len(heads) + "|", *lines]) if lines else ""


def number(value: float | None, digits: int = 2) -> str:
    """Return a number of a cell, a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def machine(results: Results) -> str:
    """Return the machine, the versions and the commit."""
    found = good(results, 1)
    told = found.get("machine", {})
    rows = [(key, told[key]) for key in ("capability", "memory_gib", "multiprocessors", "cuda", "cores") if key in told]
    rows += [*told.get("versions", {}).items(), ("commit", told.get("commit"))] if told else []
    rows += list(found.get("clocks", {}).get("clocks", {}).items())
    rows += [
        pair for case in ("import", "first kernel") for pair in found.get(case, {}).items() if pair[0] != "seconds"
    ]
    rows = [(key, f"{value:.3g}" if isinstance(value, float) else value) for key, value in rows]
    return markdown("Machine", ("what", "value"), rows)


def correctness(results: Results) -> str:
    """Return how many results are right, and the largest error in parts of its limit, by dtype and kind."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, found in good(results, 2).items():
        dtype = name.rpartition(" ")[2] if not name.startswith("training ") else "float32"
        kinds.setdefault((name.split(" ")[0], dtype), []).append(found)
    rows = []
    for (kind, dtype), found in kinds.items():
        worst = max(max(one["errors"].values()) / one["limit"] for one in found)
        rows.append((kind, dtype, f"{sum(one['right'] for one in found)} of {len(found)}", number(worst)))
    return markdown("Correct", ("what", "dtype", "right", "largest error, of its limit"), rows)


def layers(results: Results) -> str:
    """Return forward and backward of layers relative to a trained nn.Linear, a table for each shape."""
    found = good(results, 3)
    shapes: dict[str, list[str]] = {}
    for name in found:
        d, n, contender = name.split(" ", 2)
        if "," not in contender:
            shapes.setdefault(f"{d} {n}", []).append(contender)
    texts = []
    for shape, contenders in shapes.items():
        rows = []
        for name in contenders:
            own, replay = found[f"{shape} {name}"], found.get(f"{shape} {name}, replayed", {})
            starts = found.get(f"{shape} {name}, launches", {}).get("launches")
            times = (own["ms"], own["ratio"], own["host_ms"], replay.get("ms"), replay.get("ratio"))
            cells = [number(value, digits) for value, digits in zip(times, (3, 2, 3, 3, 2), strict=True)]
            rows.append((name, *cells, number(own["peak_mib"], 0), number(starts, 0)))
        linear = found[f"{shape} {contenders[0]}"]
        title = f"Layer {shape}, bf16: forward and backward; nn.Linear {number(linear['linear_ms'], 3)} ms"
        heads = ("layer", "ms", "of nn.Linear", "host ms", "replayed ms", "of nn.Linear", "peak MiB", "launches")
        texts.append(markdown(title, heads, rows))
    return "\n\n".join(texts)


def targets(results: Results) -> str:
    """Return the ratios that layers should reach, and whether they do."""
    found, rows = good(results, 3), []
    for name, base, limit in LAYER_TARGETS:
        frozen = f"{name.rpartition(' OFT,')[0]} frozen, replayed"
        if name not in found or (base == "frozen" and frozen not in found):
            continue
        value = found[name]["ratio"] if base == "nn.Linear" else found[name]["ms"] / found[frozen]["ms"]
        rows.append((name, base, number(value), number(limit), "met" if value <= limit else "missed"))
    return markdown("Targets", ("case", "against", "ratio", "at most", ""), rows)


def operations(results: Results) -> str:
    """Return the time of operations, and the share of it that bandwidth or FLOPs explain."""
    found = good(results, 4)
    rates = found.get("ceilings")
    if rates is None:
        return ""
    rows = []
    for name, passes in found.items():
        cells: list[str] = []
        for part in ("forward", "backward"):
            one = passes.get(part)
            if isinstance(one, dict):
                least = 1e6 * max(one["moved"] / rates["bandwidth"], one["flops"] / rates[one["products"]])
                cells += [number(one["us"], 1), number(least / one["us"])]
            else:
                cells += ["-", "-"]
        if "forward" in passes:
            rows.append((name, *cells))
    speeds = (
        f"copy {rates['bandwidth'] / 1e12:.2f} TB/s, bf16 {rates['bf16'] / 1e12:.0f}, TF32 {rates['tf32'] / 1e12:.0f}"
    )
    heads = ("operation", "forward us", "floor / time", "backward us", "floor / time")
    return markdown(f"Operations ({speeds} TFLOP/s)", heads, rows)


def speed(results: Results) -> str:
    """Return tokens a second of the 1.3B network."""
    rows = []
    for name, found in good(results, 5).items():
        memory = number(found["peak_gib"]), number(found.get("build_s"), 1), number(found.get("build_peak_gib"))
        times = (number(found.get(key), 1) for key in ("step_ms", "host_ms", "merge_ms"))
        rows.append((name, number(found["tokens_per_s"], 0), *times, *memory))
    heads = ("1.3B, bf16", "tokens/s", "step ms", "host ms", "merge ms", "peak GiB", "build s", "build peak GiB")
    return markdown("Training a 1.3B LLaMA", heads, rows)


def large(results: Results) -> str:
    """Return whether 8B fits into smaller cards."""
    found, rows = good(results, 6), []
    for name, one in found.items():
        if "fits" not in one:
            continue
        plan = found.get(f"plan of {name}", {}).get("planned_gib")
        build = number(one["build_s"], 1), number(one["build_peak_gib"])
        rows.append((name, "yes" if one["fits"] else "no", number(one["peak_gib"]), number(one["reserved_gib"]),
                     number(plan), number(one["step_s"]), *build))  # fmt: skip
    heads = ("8B, 1 x 1024", "fits", "peak GiB", "reserved GiB", "planned GiB", "s a step", "build s", "build peak GiB")
    return markdown("POET of an 8B LLaMA", heads, rows)


def fit(results: Results) -> str:
    """Return the summaries that the command line wrote."""
    rows = []
    for name, one in good(results, 7).items():
        summary = one["summary"]
        losses = summary["before"].get("val_loss"), summary["after"].get("val_loss")
        tokens = number(summary["tokens_per_second"], 0)
        rows.append((name, summary["steps"], summary["merges"], *(number(loss, 3) for loss in losses), tokens,
                     number(one["command_s"], 1), summary["kernels"]))  # fmt: skip
    heads = ("60M", "steps", "merges", "loss before", "after", "tokens/s", "command s", "kernels")
    return markdown("orthotrain fit", heads, rows)


def failed(results: Results) -> list[tuple[str, str, str]]:
    """Return stage, case and what is wrong of every case that failed or is not right."""
    found = []
    for stage, cases in results.items():
        for name, one in cases.items():
            if "error" in one:
                found.append((stage, name, str(one["error"])))
            elif one.get("right") is False:
                wrong = {key: f"{error:.1e}" for key, error in one["errors"].items() if error > one["limit"]}
                found.append((stage, name, f"error above {one['limit']:g}: {wrong}"))
    return found


def failures(results: Results) -> str:
    """Return the cases that failed."""
    rows = [(stage, name, text.replace("|", "/")) for stage, name, text in failed(results)]
    return markdown("Failed", ("stage", "case", "why"), rows)


def left_out(results: Results) -> str:
    """Return the cases for which no time was left."""
    rows = [(stage, name) for stage, cases in results.items() for name, one in cases.items() if "skipped" in one]
    return markdown("Left out, no time", ("stage", "case"), rows)


ALL = (machine, correctness, layers, targets, operations, speed, large, fit, left_out, failures)
