"""The tables of the report, free of any markup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .methods import METHODS
from .results import Comparison, Results, Row

PEERS = {
    "hf": "HF PEFT eager",
    "compile": "torch.compile",
    "lycoris": "LyCORIS",
    "peftk-torch": "peftk, torch backend",
}
LAYER_ARMS = {"peftk": "peftk", **PEERS}

DISPATCH_TARGET_US = 12.0

DAGGERS = "A dagger: that arm computes something else, or was sampled less often; a table below says what."


@dataclass(frozen=True)
class Table:
    """A title, a sentence on how to read it, a header and rows of strings."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def short(comparison: Comparison) -> str:
    """Name a comparison for a table or a plot."""
    info = comparison.info
    if not info["suite"].startswith("layers"):
        return info["cell"]
    method = METHODS[info["method"]]
    dtype = {"float32": "fp32", "bfloat16": "bf16"}
    base, adapter = dtype[info["dtype"]], dtype[info["parameters"]]
    dtypes = base if base == adapter else f"{base} base, {adapter} adapter"
    if base == adapter == "bf16":
        dtypes = "bf16 base, bf16 adapter"
    features, out = info["in_features"], info["out_features"]
    width = f"{features}²" if out == features else f"{features} \u2192 {out}"
    return f"{method.title} {method.size_text(info['size'])}, {width}, {dtypes}"


def target(comparison: Comparison) -> float | None:
    """Return the largest multiple of the frozen layer that is asked for."""
    info = comparison.info
    method = METHODS.get(info["method"])
    if method is None:
        return None
    if info["device_class"].startswith("cuda"):
        square = (info["tokens"], info["in_features"], info["out_features"]) == (8192, 4096, 4096)
        return method.gpu_targets.get(info["size"]) if square and info["dtype"] == "bfloat16" else None
    if info["tokens"] != 512 or method.targets is None:
        return None
    asked = zip((("float32", 1024), ("bfloat16", 1024), ("bfloat16", 4096)), method.targets, strict=True)
    return dict(asked).get((info["dtype"], info["in_features"]))


def binding(comparison: Comparison) -> bool:
    """Whether the target speaks about this device: bf16 targets are those of a CPU with AMX."""
    return comparison.info["dtype"] == "float32" or comparison.info["device_class"].startswith(("cpu-amx", "cuda"))


def milliseconds(us: float) -> str:
    """Format a time, in microseconds if it is short."""
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    if not row.measured:
        return row.found["status"]
    if row.ratio is None:
        return "-"
    return f"{row.ratio:.3f}x ({row.found['ratio_q25']:.2f}-{row.found['ratio_q75']:.2f}){mark(row)}"


def mark(row: Row | None) -> str:
    """Return a dagger for an arm that there is a remark about, where it has times."""
    return " \u2020" if row is not None and row.measured and row.found.get("remark") else ""


def _bytes(row: Row | None, key: str) -> str:
    value = None if row is None else row.found.get(key)
    return "-" if value is None else f"{value / 2**20:.2f}" if value < 2**24 else f"{value / 2**20:.1f}"


def _error(row: Row | None) -> str:
    if row is None or not row.found.get("errors"):
        return "-"
    output, gradients = row.error(output=True), row.error(output=False)
    text = " / ".join("-" if e is None else f"{e:.1e}" for e in (output, gradients))
    return text if row.measured else f"{text} void"


def samples(comparison: Comparison) -> str:
    return str(comparison.info.get("rounds", 0))


def layers(results: Results) -> Iterable[Table]:
    """Overhead, speed-up, errors and memory of the layers."""
    found = results.of("layers")
    if not found:
        return
    rows = []
    for c in found:
        frozen, ours = c.rows["frozen"], c.rows["peftk"]
        asked = target(c)
        verdict = "" if asked is None else f"<= {asked:.2f}x"
        if asked is not None and not binding(c):
            verdict += " (AMX)"
        elif asked is not None and ours.ratio is not None:
            verdict += " met" if ours.ratio <= asked else " **missed**"
        rows.append(
            (
                short(c),
                milliseconds(frozen.found["median_us"]) if frozen.measured else frozen.found["status"],
                _ratio(ours),
                verdict,
                *(_ratio(c.rows.get(arm)) for arm in PEERS),
                samples(c),
            )
        )
    yield Table(
        "Layers: forward + backward as a multiple of the frozen layer",
        "Median (and quartiles) of the ratios to the frozen layer's sample of the same round; x requires grad in every "
        "arm, so the frozen layer does two products. The target is peftk's; one marked (AMX) was set for a CPU with "
        f"bf16 matrix hardware and says nothing about a CPU without it. {DAGGERS}",
        ("layer", "frozen", "peftk", "target", *PEERS.values(), "N"),
        rows,
    )
    yield Table(
        "Layers: how much faster peftk is",
        "Median of the ratios of the peer's time to peftk's, of samples of the same round. Above 1, peftk is faster. "
        + DAGGERS,
        ("layer", *PEERS.values()),
        [(short(c), *(_times(c.ratio(arm, "peftk")) + mark(c.rows.get(arm)) for arm in PEERS)) for c in found],
    )
    yield Table(
        "Layers: error against float64",
        "Largest relative error (Frobenius norm) of the output / of the gradients, before anything was timed. A row "
        "above the limit of its dtype is void and has no times.",
        ("layer", "frozen", *LAYER_ARMS.values()),
        [(short(c), *(_error(c.rows.get(arm)) for arm in ("frozen", *LAYER_ARMS))) for c in found],
    )
    yield Table(
        "Layers: MiB kept for backward",
        "Tensors saved for backward other than inputs and parameters.",
        ("layer", *LAYER_ARMS.values()),
        [(short(c), *(_bytes(c.rows.get(arm), "saved_bytes") for arm in LAYER_ARMS)) for c in found],
    )
    yield Table(
        "Layers: MiB at the peak",
        "The most that torch's allocator held at once during forward + backward, above what it held before; results "
        "included.",
        ("layer", "frozen", *LAYER_ARMS.values()),
        [(short(c), *(_bytes(c.rows.get(arm), "peak_bytes") for arm in ("frozen", *LAYER_ARMS))) for c in found],
    )
    yield from remarks(found)


def remarks(found: list[Comparison]) -> Iterable[Table]:
    """What computes something else than its row says, or was sampled less often."""
    seen: dict[tuple[str, str], list[str]] = {}
    for c in found:
        for name, row in c.rows.items():
            if mark(row):
                key = LAYER_ARMS.get(name, name), row.found["remark"]
                seen.setdefault(key, []).append(short(c))
    rows = [("; ".join(layers), arm, remark) for (arm, remark), layers in seen.items()]
    if rows:
        note = "Each of these was compared with a float64 formula of what it says it computes."
        yield Table("Layers: what the daggers mean", note, ("layers", "arm", "remark"), rows)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def operators(results: Results) -> Iterable[Table]:
    """Kernels of the backends, and public functions beside plain PyTorch."""
    if found := results.of("kernels"):
        rows = []
        for c in found:
            native, torch = c.rows["native"], c.rows["torch"]
            rows.append(
                (
                    short(c),
                    milliseconds(native.found["median_us"]) if native.measured else native.found["status"],
                    _error(native).split(" / ")[0],
                    milliseconds(torch.found["median_us"]) if torch.measured else torch.found["status"],
                    _error(torch).split(" / ")[0],
                    _times(c.ratio("torch", "native")),
                    samples(c),
                )
            )
        yield Table(
            "Kernels: C++ beside plain PyTorch",
            "The kernels themselves, forward and backward operators, without the registry. Name: operator, tokens, "
            "sizes, block size or rank, dtype of the activations. Speed-up: median of paired ratios.",
            ("kernel", "native", "error", "torch", "error", "speed-up", "N"),
            rows,
        )
    if found := results.of("functions"):
        arms = ("native", "torch", "eager", "compile")
        yield Table(
            "Functions: forward + backward beside plain PyTorch",
            "peftk.functional on both backends, the same formula in plain PyTorch under its own autograd (eager), and "
            "that compiled. Multiples of eager: below 1 is faster.",
            ("function", "eager", *(f"{a} / eager" for a in arms if a != "eager"), "kept MiB (native / eager)", "N"),
            [
                (
                    short(c),
                    milliseconds(c.rows["eager"].found["median_us"]) if c.rows["eager"].measured else "void",
                    *(_ratio(c.rows.get(a)) for a in arms if a != "eager"),
                    f"{_bytes(c.rows['native'], 'saved_bytes')} / {_bytes(c.rows['eager'], 'saved_bytes')}",
                    samples(c),
                )
                for c in found
            ],
        )


def overhead(results: Results) -> Iterable[Table]:
    """What the dispatch costs."""
    found = results.of("overhead")
    if not found:
        return
    rows = []
    for c in found:
        if c.info["mode"] != "forward":
            continue
        cost = c.difference("peftk", "plain")
        # The torch backend is the reference; what runs by itself is the other.
        default = c.info["cell"].endswith("native")
        ok = "" if cost is None or not default else "met" if cost <= DISPATCH_TARGET_US else "**missed**"
        times = (_us(c.rows[arm].found.get("median_us")) for arm in ("plain", "kernel", "peftk"))
        rows.append((c.info["cell"], *times, _us(c.difference("peftk", "kernel")), _us(cost), ok, samples(c)))
    if rows:
        yield Table(
            "Dispatch: microseconds a call, forward",
            "Public functions on tensors of a few elements, beside plain PyTorch and beside their kernels called "
            "directly: checks, casts, choice of the backend. Medians, and medians of paired differences; the target of "
            f"what runs by itself is {DISPATCH_TARGET_US:.0f} us over plain PyTorch. One thread.",
            ("call", "plain PyTorch", "kernel", "peftk", "peftk - kernel", "peftk - plain", "target", "N"),
            rows,
        )
    both = [c for c in found if c.info["mode"] != "forward" and "kernel" in c.rows]
    if both:
        yield Table(
            "Dispatch: microseconds a call, forward + backward",
            "With gradients, backend torch: the two kernels called directly, plain PyTorch under its own autograd, and "
            "peftk. What the last two take beyond the kernels contains torch's autograd engine.",
            ("call", "kernels", "plain PyTorch", "peftk", "peftk - kernels", "peftk - plain", "N"),
            [
                (
                    c.info["cell"],
                    *(_us(c.rows[a].found.get("median_us")) for a in ("kernel", "plain", "peftk")),
                    _us(c.difference("peftk", "kernel")),
                    _us(c.difference("peftk", "plain")),
                    samples(c),
                )
                for c in both
            ],
        )
    tiny = [c for c in found if c.info["cell"].startswith("layer-")]
    if tiny:
        yield Table(
            "Dispatch: a whole layer on tiny tensors, forward + backward",
            "Microseconds of a 16 x 16 layer on 2 tokens: nothing but Python and launches.",
            ("layer", "frozen", *(label for arm, label in LAYER_ARMS.items() if arm != "compile"), "N"),
            [
                (
                    c.info["method"],
                    *(
                        _us(c.rows[a].found.get("median_us")) if a in c.rows else ""
                        for a in ("frozen", *(arm for arm in LAYER_ARMS if arm != "compile"))
                    ),
                    samples(c),
                )
                for c in tiny
            ],
        )


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def model(results: Results) -> Iterable[Table]:
    """What operations on whole models take, and how that grows with the number of layers."""
    found: dict[str, dict[int, Comparison]] = {}
    for c in results.of("model"):
        found.setdefault(c.info["mode"], {})[c.info["size"]] = c
    rows = []
    for operation, by_size in found.items():
        sizes = sorted(by_size)
        times = [[by_size[n].rows[a].found.get("median_us") for n in sizes] for a in ("peftk", "hf")]
        growth = ("-" if t[-1] is None or t[0] is None or len(t) < 2 else f"{t[-1] / t[-2]:.1f}" for t in times)
        ratio = by_size[sizes[-1]].rows["peftk"].found.get("ratio")
        ms = (" / ".join("-" if t is None else f"{t / 1000:.1f}" for t in column) for column in times)
        layers = " / ".join(map(str, sizes))
        rows.append(
            (operation, layers, *ms, *growth, "-" if ratio is None else f"{ratio:.2f}", samples(by_size[sizes[-1]]))
        )
    if rows:
        yield Table(
            "Whole models: milliseconds an operation",
            "Models of tiny layers with LoRA on all of them, so that the work for each layer is what counts. Each step "
            "ends with what undoes it. Growth is the time at the largest model over that at the one before, which has "
            "a fourth of its layers; the last ratio is that at the largest. One thread.",
            ("operation", "layers", "peftk", "PEFT", "peftk grows", "PEFT grows", "peftk / PEFT", "N"),
            rows,
        )


def decode(results: Results) -> Iterable[Table]:
    """What a layer takes on few rows without gradients."""
    rows = []
    for c in results.of("decode"):
        found = {arm: c.rows[arm].found for arm in ("frozen", "peftk", "accelerated", "hf") if arm in c.rows}
        us = ["-" if (t := found.get(a, {}).get("median_us")) is None else f"{t:.1f}" for a in found]
        ratios = (found.get(arm, {}).get("ratio") for arm in ("peftk", "hf"))
        rows.append((c.info["cell"], *us, *("-" if not ratio else f"{ratio:.2f}" for ratio in ratios), samples(c)))
    if rows:
        yield Table(
            "Few rows without gradients: microseconds",
            "The forward pass of one layer in evaluation mode, recording nothing, on one thread: the frozen layer, "
            "peftk's, PEFT's under `peftk.accelerate`, and PEFT's. The last two columns are multiples of the frozen "
            "layer.",
            ("cell", "frozen", "peftk", "accelerated", "PEFT", "peftk / frozen", "PEFT / frozen", "N"),
            rows,
        )


def experts(results: Results) -> Iterable[Table]:
    """What adapters on a stack of experts take beside the frozen product."""
    rows = []
    for c in results.of("experts"):
        found = {arm: c.rows[arm].found for arm in ("frozen", "peftk", "loop", "hf") if arm in c.rows}
        ms = ["-" if (t := one.get("median_us")) is None else f"{t / 1000:.2f}" for one in found.values()]
        ratios = (found.get(arm, {}).get("ratio") for arm in ("peftk", "loop", "hf"))
        memory = " / ".join(mib(one.get("peak_bytes")) for one in found.values())
        rows.append(
            (c.info["cell"], *ms, *("-" if not ratio else f"{ratio:.2f}" for ratio in ratios), memory, samples(c))
        )
    if rows:
        yield Table(
            "LoRA on one stack of experts: milliseconds",
            "Forward and backward of rows sorted by expert: the frozen product, with `grouped_low_rank_add`, with "
            "`low_rank_add` for one expert after the other, and PEFT's wrapper, which builds the whole adapted stack. "
            "Then multiples of the frozen product, and peak memory in MiB: frozen / peftk / loop / PEFT.",
            (
                "cell",
                "frozen",
                "peftk",
                "loop",
                "PEFT",
                "peftk / frozen",
                "loop / frozen",
                "PEFT / frozen",
                "memory",
                "N",
            ),
            rows,
        )


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def missing(results: Results) -> Iterable[Table]:
    """Everything that has no times, and why."""
    rows = [(name.rpartition("::")[2], "", reason) for name, reason in results.not_measured.items()]
    rows += [
        (short(c), name, f"{row.found['status']}: {row.found['reason']}")
        for c in results.comparisons
        for name, row in c.rows.items()
        if not row.measured
    ]
    if rows:
        yield Table("Not measured", "Rows without times, and the reason.", ("cell", "arm", "reason"), rows)


def everything(results: Results) -> list[Table]:
    """Return all tables in the order of the report."""
    from . import costs, gpu_tables, growth_tables, integration_tables

    found = [
        *gpu_tables.everything(results),
        *layers(results),
        *operators(results),
        *overhead(results),
        *model(results),
        *integration_tables.everything(results),
        *decode(results),
        *growth_tables.growth(results),
        *experts(results),
    ]
    return [*found, *costs.tables(results), *missing(results)]
