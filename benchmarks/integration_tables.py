"""The tables of what `peftk.accelerate` makes of other libraries' layers and models."""

from __future__ import annotations

from collections.abc import Iterable

from .results import Comparison, Results
from .tables import Table, mib, samples


def _gain(found: dict) -> str:
    ratio = found.get("ratio")
    return "-" if not ratio else f"{1 / ratio:.2f} [{1 / found['ratio_q75']:.2f}, {1 / found['ratio_q25']:.2f}]"


def _ms(found: dict) -> str:
    return "-" if (t := found.get("median_us")) is None else f"{t / 1000:.2f}"


def _found(c: Comparison, *arms: str) -> list[dict]:
    return [c.rows[arm].found if arm in c.rows else {} for arm in arms]


def accelerated(results: Results) -> Iterable[Table]:
    """PEFT's layers and models, beside this package's own layers."""
    rows = []
    for c in results.of("accelerate"):
        mine, theirs, own = _found(c, "accelerated", "hf", "peftk")
        memory = f"{mib(mine.get('peak_bytes'))} / {mib(theirs.get('peak_bytes'))}"
        rows.append((c.info["cell"], *map(_ms, (mine, theirs, own)), _gain(mine), memory, samples(c)))
    if rows:
        yield Table(
            "PEFT's own layers and models, accelerated: milliseconds",
            "Forward and backward of PEFT's layer under `peftk.accelerate`, of the same layer as PEFT has it, and of "
            "peftk's own; and whole training steps of a small LLaMA (4 layers, hidden size 1024, 512 tokens, adapters "
            "on all linear layers) without the optimizer. Gain is PEFT's time over the accelerated one, "
            "with quartiles. "
            "Peak memory in MiB: accelerated / PEFT.",
            ("cell", "accelerated", "PEFT", "peftk's own", "gain", "peak memory", "N"),
            rows,
        )


def networks(results: Results) -> Iterable[Table]:
    """LyCORIS's modules and networks."""
    rows = []
    for c in results.of("lycoris"):
        mine, theirs = _found(c, "accelerated", "lycoris")
        memory = f"{mib(mine.get('peak_bytes'))} / {mib(theirs.get('peak_bytes'))}"
        rows.append((c.info["cell"], _ms(mine), _ms(theirs), _gain(mine), memory, samples(c)))
    if rows:
        yield Table(
            "LyCORIS's networks, accelerated: milliseconds",
            "Forward and backward of one layer behind a module of LyCORIS (512 rows of 1024 features, 256 of 4096, a "
            "convolution of 320 channels on 32 x 32 places), and of a block of Stable Diffusion's UNet (320 channels "
            "on 16 x 16 places, all linear layers and convolutions); inference is a forward pass that records "
            "nothing. Gain is LyCORIS's time over the accelerated one, with quartiles. Peak memory in MiB: "
            "accelerated / LyCORIS.",
            ("cell", "accelerated", "LyCORIS", "gain", "peak memory", "N"),
            rows,
        )


def everything(results: Results) -> list[Table]:
    """Return the tables in the order of the report."""
    return [*accelerated(results), *networks(results)]
