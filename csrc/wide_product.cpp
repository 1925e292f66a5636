#include "wide_product.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "check.h"
#include "host.h"

namespace peftk {
namespace {

WideOperand operand(const Tensor& t, const char* name, int64_t lines_at) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, ": expected a CPU tensor of 2 dimensions");
  const bool single = t.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || t.scalar_type() == ScalarType::BFloat16, name, ": expected dtype float32 or bfloat16");
  const int64_t line = t.stride(lines_at), step = t.stride(1 - lines_at);
  STD_TORCH_CHECK(line == 1 || step == 1, name, ": expected a stride of 1; got ", t.stride(0), " and ", t.stride(1));
  return {t.const_data_ptr(), t.size(lines_at), line, step, single ? Dtype::float32 : Dtype::bfloat16};
}

// Lines that have to be transposed to be packed: those of the left operand that touch, and those of the right that do
// not.
int64_t transposed(const WideOperand& left, const WideOperand& right) {
  return (left.line == 1 ? left.lines : 0) + (right.line == 1 ? 0 : right.lines);
}

void wide_product(const Tensor& a, const Tensor& b, bool instructions, Tensor& out) {
  WideOperand left = operand(a, "a", 0), right = operand(b, "b", 1);
  const int64_t depth = a.size(1);
  STD_TORCH_CHECK(b.size(0) == depth, "b: expected ", depth, " rows, as a has columns; got ", b.size(0));
  STD_TORCH_CHECK(left.dtype == Dtype::bfloat16 || right.dtype == Dtype::bfloat16,
                  "a, b: expected one of them in bfloat16");
  STD_TORCH_CHECK(!instructions || wide_instructions(), "instructions: expected a CPU with AMX and bfloat16");
  check_float(out, "out");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == left.lines && out.size(1) == right.lines, "out: expected shape (",
                  left.lines, ", ", right.lines, ")");
  if (out.numel() == 0) return;
  WideProductParams p{left, right, nullptr, writable(out), right.lines, 1, 0, 0, instructions};
  if (depth == 0) return (void)std::fill_n(p.out, out.numel(), 0.0f);
  if (transposed(right, left) < transposed(left, right)) {
    // The transpose of the product, of the transposed operands.
    std::swap(p.left, p.right);
    std::swap(p.row, p.column);
  }
  const int64_t blocks = tiles_of(p.left.lines, kTileLines);
  const bool in_place = lies_in_tiles(p.left, depth, p.right.lines);
  const int64_t words = in_place ? 0 : p.left.words(blocks, std::min(depth, kPackedDepth));
  const std::unique_ptr<TileRow[]> lines(in_place ? nullptr : new TileRow[words / 16]);
  uint32_t* packed = in_place ? nullptr : lines[0].words;
  p.packed = packed;
  for (; p.first < depth; p.first += kPackedDepth) {
    p.depth = std::min(depth - p.first, kPackedDepth);
    if (packed)
      parallel_for(0, blocks, 1 + 65536 / (kTileLines * p.depth), [&](int64_t begin, int64_t end) {
        pack_wide_cpu(p, true, packed + p.left.words(begin, p.depth), begin, end);
      });
    parallel_for(0, wide_tasks(p), 1, [&](int64_t begin, int64_t end) { wide_product_cpu(p, begin, end); });
  }
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("wide_product(Tensor a, Tensor b, bool instructions, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) { m.impl("wide_product", TORCH_BOX(&peftk::wide_product)); }
