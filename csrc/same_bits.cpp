#include "same_bits.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "few_rows.h"
#include "host.h"

namespace peftk {
namespace {

// Numbers that have a checksum of their own.
constexpr int64_t kPieceNumbers = 1024;

// Words of all checksums, and of the line behind them, which says how many numbers of which dtype there were.
int64_t words_for(int64_t count) { return (divide_up(count, kPieceNumbers) + 1) * kSumWords; }

void sum_pieces(const Tensor& t, Dtype dtype, uint32_t* to) {
  const char* from = static_cast<const char*>(t.const_data_ptr());
  const int64_t count = t.numel(), whole = count / kPieceNumbers, rest = count % kPieceNumbers;
  row_sums_cpu(from, kPieceNumbers, dtype, to, 0, whole);
  to += whole * kSumWords;
  if (rest > 0) {
    row_sums_cpu(from + whole * kPieceNumbers * t.element_size(), rest, dtype, to, 0, 1);
    to += kSumWords;
  }
  std::memset(to, 0, kSumWords * sizeof(uint32_t));
  to[0] = static_cast<uint32_t>(count);
  to[1] = static_cast<uint32_t>(static_cast<uint64_t>(count) >> 32);
  to[2] = static_cast<uint32_t>(dtype);
}

void piece_sums(const Tensor& t, Tensor& sums) {
  const Dtype dtype = check_dtype(t, "t");
  check_dense(sums, "sums");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Int && sums.numel() == words_for(t.numel()), "sums: expected ",
                  words_for(t.numel()), " words in int32");
  sum_pieces(t, dtype, static_cast<uint32_t*>(sums.mutable_data_ptr()));
}

}  // namespace

bool same_bits(const Tensor& source, const Tensor& kept) {
  if (!source.is_cpu() || !kept.is_cpu() || !source.is_contiguous() || !kept.is_contiguous()) return false;
  const ScalarType type = source.scalar_type();
  if (kept.scalar_type() == type)
    return source.numel() == kept.numel() &&
           std::memcmp(source.const_data_ptr(), kept.const_data_ptr(), source.numel() * source.element_size()) == 0;
  if (kept.scalar_type() != ScalarType::Int || (type != ScalarType::Float && type != ScalarType::BFloat16) ||
      kept.numel() != words_for(source.numel()))
    return false;
  std::vector<uint32_t> found(kept.numel());
  sum_pieces(source, check_dtype(source, "source"), found.data());
  return std::memcmp(found.data(), kept.const_data_ptr(), found.size() * sizeof(uint32_t)) == 0;
}

}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("same_bits(Tensor source, Tensor kept) -> bool");
  m.def("piece_sums(Tensor t, Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("same_bits", TORCH_BOX(&peftk::same_bits));
  m.impl("piece_sums", TORCH_BOX(&peftk::piece_sums));
}
