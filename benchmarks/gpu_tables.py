"""The tables of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Iterable

from .results import Comparison, Results, Row
from .tables import DAGGERS, Table, mark, milliseconds, short, target

ARMS = {
    "peftk": "peftk (auto)",
    "peftk-native": "C++",
    "peftk-triton": "Triton",
    "peftk-triton-D0": "Triton D0",
    "peftk-triton-D0-expand-first": "D0 expand first",
    "peftk-triton-D1": "D1",
    "peftk-torch": "torch",
    "hf": "HF PEFT eager",
    "compile": "torch.compile",
    "lycoris": "LyCORIS",
    "eager": "plain PyTorch",
}


def _pair(row: Row | None) -> str:
    """Format the device time and the wall time of a row as multiples of the reference."""
    if row is None:
        return ""
    if not row.measured:
        return row.found["status"]
    if row.ratio is None:
        return "-"
    low, high = row.found["ratio_q25"], row.found["ratio_q75"]
    return f"{row.ratio:.3f}x ({low:.2f}-{high:.2f}) / {row.found['wall_ratio']:.2f}x{mark(row)}"


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    if not row.measured:
        return row.found["status"]
    return f"{milliseconds(row.found['median_us'])} / {milliseconds(row.found['wall_median_us'])}"


def _error(row: Row | None) -> str:
    errors = (row.found.get("errors") or {}).values() if row else ()
    return f"{max(errors):.1e}" if errors else ""


def _present(found: list[Comparison]) -> dict[str, str]:
    return {arm: label for arm, label in ARMS.items() if any(arm in c.rows for c in found)}


def _verdict(comparison: Comparison) -> str:
    asked, ratio = target(comparison), comparison.rows["peftk"].ratio
    if asked is None or comparison.info["mode"] == "forward":
        return ""
    return f"<= {asked:.2f}x" + ("" if ratio is None else " met" if ratio <= asked else " **missed**")


def _layers(results: Results) -> Iterable[Table]:
    for suite, title in (
        ("layers", "GPU: forward + backward as a multiple of the bare products"),
        ("layers-forward", "GPU: forward as a multiple of the bare product"),
    ):
        found = [c for c in results.of(suite) if "clock" in c.info]
        if not found:
            continue
        arms = _present(found)
        yield Table(
            title,
            "Device time (median and quartiles of paired ratios) / wall time, both with a cold L2 cache, over those of "
            "the bare products of the frozen layer (device / wall time in the second column). An arm with a backend in "
            f"its name is refused if any of its operators ran elsewhere. {DAGGERS}",
            ("layer", "bare", *arms.values(), "target", "N"),
            [
                (
                    short(c),
                    _time(c.rows["frozen"]),
                    *(_pair(c.rows.get(arm)) for arm in arms),
                    _verdict(c),
                    str(c.info["rounds"]),
                )
                for c in found
            ],
        )
    found = [c for c in results.of("layers") if "clock" in c.info]
    if found:
        arms = {"frozen": "bare", **_present(found)}
        yield Table(
            "GPU: kernels launched, error, and seconds of the first call",
            "Forward + backward: kernels / largest relative error against float64 / seconds of the first call, in "
            "which compilers compile and tuners tune.",
            ("layer", *arms.values()),
            [(short(c), *(_counts(c.rows.get(arm)) for arm in arms)) for c in found],
        )


def _counts(row: Row | None) -> str:
    if row is None or not row.measured:
        return "" if row is None else row.found["status"]
    return f"{row.found.get('kernels', '-')} / {_error(row)} / {row.found['first_seconds']:.1f}"


def _columns(results: Results, suite: str, title: str, note: str, arms: dict[str, str]) -> Iterable[Table]:
    if found := results.of(suite):
        shown = {arm: label for arm, label in arms.items() if any(arm in c.rows for c in found)}
        yield Table(
            title,
            note + " Every cell: device time / wall time, and the error against float64.",
            ("call", *shown.values(), "N"),
            [
                (
                    c.info["cell"],
                    *(" ".join(filter(None, (_time(c.rows.get(a)), _error(c.rows.get(a))))) for a in shown),
                    str(c.info["rounds"]),
                )
                for c in found
            ],
        )


def everything(results: Results) -> Iterable[Table]:
    """Yield the tables that there is data for."""
    designs = {"cublas": "cuBLAS alone", "D1": "D1", "D0": "D0", "D0-expand-first": "D0 expand first"}
    yield from _columns(
        results,
        "gpu-gemm",
        "GPU: Triton's product with LoRA inside (D1) beside the vendor's alone",
        "Forward with the shrink, and the gradient in x without it.",
        designs,
    )
    yield from _layers(results)
    for suite, what in (("gpu-cayley", "forward + backward"), ("gpu-cayley-forward", "forward")):
        note = f"The public function, {what}, with float32 parameters."
        title = "GPU: the Cayley transform" + ("" if suite == "gpu-cayley" else ", forward")
        yield from _columns(results, suite, title, note, ARMS)
    backends = {"native": "C++", "triton": "Triton", "torch": "torch"}
    yield from _columns(results, "gpu-kernels", "GPU: raw operators", "Kernels without the registry.", backends)
