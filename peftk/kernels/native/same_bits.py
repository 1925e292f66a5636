"""Whether two tensors hold the same bits: some microseconds for what an adapter has, where ``torch.equal`` takes ten
times as long.
"""

from __future__ import annotations

import torch

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native

same_bits = torch.ops.peftk_native.same_bits.default
"""``same_bits(a, b)`` of two contiguous CPU tensors of one dtype."""
