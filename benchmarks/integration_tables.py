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


def steps(results: Results) -> Iterable[Table]:
    """Whole training steps of models of several shapes, by every library."""
    rows = []
    for c in results.of("steps"):
        names = ("frozen", "peftk", "accelerated", "hf", "lycoris", "compile")
        found = dict(zip(names, _found(c, *names), strict=True))
        gains = [_gain(found[name]) for name in ("peftk", "accelerated")]
        memory = " / ".join(mib(found[name].get("peak_bytes")) for name in ("frozen", "peftk", "accelerated", "hf"))
        median = found["peftk"].get("median_us")
        speed = "-" if not median else f"{1e6 * c.info['tokens'] / median:,.0f}"
        rows.append((c.info["cell"], *map(_ms, found.values()), *gains, speed, memory, samples(c)))
    if rows:
        yield Table(
            "Whole training steps: milliseconds",
            "Forward and backward of small models without the optimizer: a LLaMA (4 layers, hidden size 512, 512 "
            "tokens, adapters on all linear layers), a ViT (4 layers, 512, two pictures of 257 tokens, likewise) and a "
            "block of Stable Diffusion's UNet (adapters on the layers of attention). The frozen model passes gradients "
            "down to its first layer. Gain is PEFT's time over that of peftk's own layers, and of its own accelerated, "
            "with quartiles; then tokens a second with peftk's layers, and peak memory in MiB: frozen / peftk / "
            "accelerated / PEFT.",
            (
                *("cell", "frozen", "peftk", "accelerated", "PEFT", "LyCORIS", "compiled"),
                *("gain", "gain, accelerated", "tokens/s", "memory", "N"),
            ),
            rows,
        )


def everything(results: Results) -> list[Table]:
    """Return the tables in the order of the report."""
    return [*accelerated(results), *networks(results), *steps(results)]
