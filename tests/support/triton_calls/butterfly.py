"""Full-size calls of butterflies and of the scale of channels, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

from . import BF16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(stages: int, size: int):
        group = size << (stages - 1)
        factors = meta(stages, WIDTH // size, size, size)
        yield "butterfly_compose", (factors,)
        yield "butterfly_compose_backward", (meta(WIDTH // group, group, group), factors)

    for stages, size in ((2, 4), (3, 2), (4, 8), (2, 32), (2, 128)):
        yield from sized(stages, size)
    x, factors = meta(TOKENS, WIDTH, dtype=BF16), meta(2, WIDTH // 4, 4, 4)
    yield "butterfly_multiply", (x, factors)
    yield "butterfly_multiply_backward", (x, x, factors, True, True)
    for dtype, shape, inner in ((BF16, (TOKENS, WIDTH), 1), (FP32, (TOKENS, WIDTH), 1), (BF16, (8, 320, 4096), 4096)):
        x, scale = meta(*shape, dtype=dtype), meta(shape[1])
        for bias in (meta(shape[1], dtype=dtype), None):
            yield "scale_channels", (x, scale, bias, inner)
            yield "scale_channels_backward", (x, x, scale, bias, inner, True, True, bias is not None)


LAUNCHES = {
    "butterfly_compose": ["butterfly_stage_kernel"],
    "butterfly_compose_backward": ["butterfly_stage_backward_kernel"],
    "butterfly_multiply": ["butterfly_stage_kernel", "block_rotate_kernel"],
    "butterfly_multiply_backward": [
        "butterfly_stage_kernel",
        "block_rotate_backward_kernel",
        "butterfly_stage_backward_kernel",
    ],
    "scale_channels": ["scale_channels_kernel"],
    "scale_channels_backward": ["scale_channels_backward_kernel"],
}

NARROW = {
    # Half-blocks of a few features.
    "_butterfly_stage_kernel": {"load", "store"},
    "_butterfly_stage_backward_kernel": {"load", "store"},
}
