"""The host functions of the C++ kernels: what a task on a thread throws, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import peftk
from peftk import functional as F
from peftk.kernels import native as native_kernels

pytestmark = pytest.mark.skipif(native_kernels.unavailable() is not None, reason=str(native_kernels.unavailable()))

# The workspace of a task of this rank is 384 MiB, and what stands before it 160 MiB.
WITHOUT_MEMORY = """
import resource, sys, torch
from peftk import _C
torch.set_num_threads(int(sys.argv[1]))
torch.randn(512, 512) @ torch.randn(512, 512)
rank, rows = 1 << 22, 2 * int(sys.argv[1])
arguments = [torch.randn(rows, 1), torch.randn(rank, 1), torch.randn(1, rank), None, 1.0, torch.zeros(rows, 1)]
hidden = torch.empty(rows, rank)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.ops.peftk_native.low_rank(*arguments, hidden)
except MemoryError as error:
    print("MemoryError", error)
small = [torch.ones(4, 3), torch.ones(2, 3), torch.ones(3, 2), None, 1.0, torch.zeros(4, 3), torch.empty(4, 2)]
torch.ops.peftk_native.low_rank(*small)
print(small[5].unique().tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_that_finds_no_memory_says_so_and_leaves_the_threads_alive(threads):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, str(threads)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["MemoryError std::bad_alloc", "[6.0]"]


def test_large_blocks_are_left_to_torch():
    blocks = torch.randn(1, 257, 257)
    x = torch.randn(3, 257)
    with pytest.raises(RuntimeError, match="blocks: expected a block size of at most 256; got 257"):
        torch.ops.peftk_native.block_rotate(x, blocks, False, torch.empty_like(x))
    with peftk.use_backend("native"), pytest.raises(RuntimeError, match="blocks of at most 256; got 257"):
        F.block_rotate(x, blocks)
    torch.testing.assert_close(F.block_rotate(x, blocks), x @ blocks[0])
