"""Calls every CUDA C++ kernel on small inputs: the program that compute-sanitizer watches.

Values come from the CPU and go back there, so that hardly a kernel of torch runs beside those under test. It ends with
an error if no kernel took a call, for then there was nothing to watch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from peftk.runtime import registry
from peftk.testing.calls import KINDS, Call

# Sizes that no tile divides, and enough rows for a reduction to be split.
TOKENS, FEATURES, OUT = 83, 192, 320
SIZES = {"block": (2, 4, 8, 16, 32), "rank": (3, 16), "factor": (2, 4)}
# Their products with the dense weight run in cuBLAS, which is not under test here.
LEFT_OUT = ("low_rank_add", "low_rank_linear", "block_rotate_linear", "dora_compose", "dora_norm")
# Their transforms run in cuBLAS, too. On Hopper it stores by bulk copies, which initcheck does not see: the result of a
# product of torch alone is reported as never written.
TRANSFORMED = ("circular_conv", "circular_conv_add", "circulant_linear")


def calls(transformed: bool = True) -> Iterator[Call]:
    """Yield calls of every operator, forward and backward; those of `TRANSFORMED` only if asked."""
    for operator in registry.OPERATORS:
        forward = operator.removesuffix("_backward")
        kind = KINDS[forward]
        if forward in LEFT_OUT or (forward in TRANSFORMED and not transformed):
            continue
        for size, dtype, variant in itertools.product(SIZES[kind.size], kind.dtypes, kind.variants):
            if kind.fits(FEATURES, OUT, size):
                yield Call(operator, TOKENS, FEATURES, OUT, size, dtype, variant)


def watch(device: str = "cuda", backend: str = "native", transformed: bool = True) -> tuple[list[Call], list[str]]:
    """Run what a backend takes; return the calls that ran, and what was wrong."""
    ran, wrong = [], []
    for call in calls(transformed):
        arguments = call.arguments()
        moved = tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)
        if call.reason(backend, moved) is not None:
            continue
        found = call.bind(backend, moved)()
        results = [r.cpu() for r in ((found,) if isinstance(found, Tensor) else found)]
        ran.append(call)
        error = call.error(tuple(results), call.truth(arguments))
        # `not <=`, so that a NaN is found too.
        if not error <= call.limit:
            wrong.append(f"{call} is wrong: expected an error of at most {call.limit:.1e}; got {error:.1e}")
    return ran, wrong


def main(arguments: list[str]) -> int:
    """Run all calls and return the exit status."""
    ran, wrong = watch(transformed="--without-transforms" not in arguments)
    torch.cuda.synchronize()
    print(f"{len(ran)} calls checked")
    print(*wrong, sep="\n")
    if not ran:
        print("no CUDA C++ kernel took a call: was the extension built with PEFTK_BUILD=cuda?")
    return int(bool(wrong) or not ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
