"""What the predicates of the CUDA kernels refuse, and what they say: asked about shapes, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peftk.kernels import native as native_kernels

if native_kernels.unavailable() is not None:
    pytest.skip("peftk._C is not installed here", allow_module_level=True)

from peftk.kernels.native import _supports, block_diagonal, butterfly, cayley, circulant, hadamard, kronecker


class _Named(SimpleNamespace):
    def __len__(self) -> int:
        return self.shape[0]


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    device = torch.device("cuda", 0)
    return _Named(shape=torch.Size(shape), dtype=dtype, device=device, is_cpu=False, is_cuda=True)


@pytest.fixture
def build(monkeypatch):
    """Pretend what the extension was built for, and what GPU there is."""

    def pretend(architectures: list[str], capability: tuple[int, int]) -> None:
        info = {"cuda_architectures": architectures}
        monkeypatch.setattr(_supports, "_C", SimpleNamespace(build_info=lambda: info))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        _supports.cuda_reason.cache_clear()

    yield pretend
    _supports.cuda_reason.cache_clear()


@pytest.mark.parametrize(
    ("built", "runs", "refuses"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.0+PTX", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
    ],
)
def test_which_gpus_a_build_runs_on(built, runs, refuses):
    assert all(_supports.holds(built, capability) for capability in runs)
    assert not any(_supports.holds(built, capability) for capability in refuses)


def test_a_build_without_cuda_is_named(build):
    build([], (9, 0))
    assert block_diagonal.block_rotate_supports(on_cuda(4, 8), on_cuda(1, 8, 8), False) == (
        "peftk._C was built without CUDA"
    )
    assert cayley.cayley_supports(on_cuda(1, 6), 4, []) == "peftk._C was built without CUDA"


def test_an_architecture_that_is_not_in_the_build_is_named(build):
    build(["8.0", "10.0"], (9, 0))
    expected = "sm_90 is not in the build of peftk._C (it has 8.0, 10.0)"
    assert block_diagonal.block_rotate_supports(on_cuda(4, 8), on_cuda(1, 8, 8), False) == expected
    assert cayley.cayley_supports(on_cuda(1, 6), 4, []) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_what_is_taken(build, size, dtype):
    build(["8.0", "9.0a", "10.0+PTX"], (9, 0))
    x, blocks, weight = on_cuda(4, 4 * size, dtype=dtype), on_cuda(4, size, size), on_cuda(4, 4 * size)
    assert block_diagonal.block_rotate_supports(x, blocks, False) is None
    assert block_diagonal.block_rotate_backward_supports(x, x, blocks, False, True, True) is None
    assert block_diagonal.block_rotate_linear_supports(x, weight, None, blocks) is None
    assert block_diagonal.block_rotate_linear_backward_supports(x, x, weight, blocks, True, True, False) is None
    if size % 2 == 0:
        assert butterfly.butterfly_compose_supports(on_cuda(2, 2, size, size)) is None
        assert butterfly.butterfly_multiply_supports(x, on_cuda(1, 4, size, size)) is None
    assert cayley.cayley_supports(on_cuda(2, size * (size - 1) // 2), size, []) is None
    assert cayley.cayley_backward_supports(blocks, on_cuda(4, size * (size - 1) // 2), blocks, []) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_circular_convolution_is_taken_at_every_size(build, dtype):
    build(["9.0a"], (9, 0))
    for size in (1, 7, 128):
        x, kernel, weight = (
            on_cuda(4, 2 * size, dtype=dtype),
            on_cuda(3, 2, size),
            on_cuda(3 * size, 2 * size, dtype=dtype),
        )
        assert circulant.circular_conv_supports(x, kernel, 1.0) is None
        assert circulant.circular_conv_add_supports(x, x, kernel, 1.0) is None
        assert circulant.circulant_linear_supports(x, weight, None, kernel, 1.0) is None
        assert circulant.circulant_linear_backward_supports(x, x, weight, kernel, 1.0, True, True, True) is None
        assert circulant.circulant_weight_supports(weight, kernel, 1.0) is None
        assert circulant.circulant_weight_backward_supports(weight, kernel, 1.0) is None
    assert circulant.circular_conv_supports(on_cuda(4, 8, dtype=torch.float64), on_cuda(3, 2, 4), 1.0) == (
        "the CUDA kernels take float32, bfloat16 and float16; got torch.float64"
    )


def test_what_is_refused(build):
    build(["9.0a"], (9, 0))
    rotate = block_diagonal.block_rotate_supports
    assert rotate(on_cuda(4, 8, dtype=torch.float64), on_cuda(1, 8, 8), False) == (
        "the CUDA kernels take float32, bfloat16 and float16; got torch.float64"
    )
    for size in (1, 17, 32):
        expected = f"the CUDA kernels take blocks of 2 to 16; got {size}"
        assert rotate(on_cuda(4, size), on_cuda(1, size, size), False) == expected
    assert butterfly.butterfly_compose_supports(on_cuda(3, 8, 32, 32)) == (
        "the CUDA kernels take groups of up to 64 features; got 128"
    )
    assert "float32 factors" in butterfly.butterfly_compose_supports(on_cuda(1, 1, 4, 4, dtype=torch.float64))
    assert "blocks of 2 to 16; got 32" in butterfly.butterfly_multiply_supports(on_cuda(4, 32), on_cuda(2, 2, 16, 16))
    assert "CPU tensors" in butterfly.scale_channels_supports(on_cuda(4, 8))
    assert "Neumann series" in cayley.cayley_supports(on_cuda(1, 6), 4, [1.0, 2.0])
    assert "blocks up to 64" in cayley.cayley_supports(on_cuda(1, 65 * 32), 65, [])
    assert "float32 matrices" in cayley.cayley_supports(on_cuda(1, 6, dtype=torch.float64), 4, [])


def test_which_weights_of_loha_are_written(build):
    build(["9.0a"], (9, 0))
    factors = on_cuda(64, 100), on_cuda(100, 32), on_cuda(64, 100), on_cuda(100, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        large = on_cuda(64, 32, dtype=dtype)
        assert hadamard.hadamard_weight_supports(large, *factors, 1.0) is None
        assert hadamard.hadamard_weight_backward_supports(large, *factors, 1.0, True, True, True, True) is None
    refused = hadamard.hadamard_weight_supports(on_cuda(64, 32, dtype=torch.float64), *factors, 1.0)
    assert refused == "the CUDA kernels take float32, bfloat16 and float16; got torch.float64"
    double = on_cuda(64, 100, dtype=torch.float64)
    assert "factors of float32" in hadamard.hadamard_weight_supports(on_cuda(64, 32), double, *factors[1:], 1.0)
    assert "CPU tensors" in hadamard.khatri_rao_supports(*factors, None)
    build([], (9, 0))
    assert hadamard.hadamard_weight_supports(on_cuda(64, 32), *factors, 1.0) == "peftk._C was built without CUDA"


def test_what_the_weight_writer_takes(build):
    build(["9.0a"], (9, 0))
    w1, w2 = on_cuda(2, 3), on_cuda(4, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kronecker.kronecker_weight_supports(on_cuda(8, 15, dtype=dtype), w1, w2, 1.0) is None
        assert (
            kronecker.kronecker_weight_backward_supports(on_cuda(8, 15, dtype=dtype), w1, w2, 1.0, True, True) is None
        )
    assert "got torch.float64" in kronecker.kronecker_weight_supports(on_cuda(8, 15, dtype=torch.float64), w1, w2, 1.0)
    assert "a w2 of up to 65535 rows" in kronecker.kronecker_weight_supports(on_cuda(1, 1), w1, on_cuda(65_536, 5), 1.0)
    assert "CPU tensors" in kronecker.kronecker_linear_supports(on_cuda(4, 15))
