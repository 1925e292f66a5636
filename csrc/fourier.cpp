#include "fourier.h"

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "host.h"

namespace peftk {
namespace {

FourierParams check(const Tensor& from, const char* from_name, const Tensor& waves, Tensor& to, const char* to_name,
                    double first, double rest, bool add) {
  check_float(from, from_name);
  check_float(to, to_name);
  check_float(waves, "waves");
  STD_TORCH_CHECK(waves.dim() == 2 && waves.size(1) == 2, "waves: expected shape (b / 2, 2)");
  const int64_t size = 2 * waves.size(0);
  STD_TORCH_CHECK(size >= kFourierLeast && (size & (size - 1)) == 0, "waves: expected those of a power of two from ",
                  kFourierLeast, " on; got ", size);
  STD_TORCH_CHECK(from.numel() == to.numel() && from.numel() % size == 0, from_name, " and ", to_name,
                  ": expected as many elements, in whole blocks of ", size);
  return {floats(from),
          writable(to),
          floats(waves),
          from.numel() / size,
          size,
          static_cast<float>(first),
          static_cast<float>(rest),
          add};
}

int64_t groups(const FourierParams& p) { return (p.count + kFourierGroup - 1) / kFourierGroup; }

int64_t grain(const FourierParams& p) { return 1 + 16384 / (kFourierGroup * p.size); }

void fourier(const Tensor& x, const Tensor& waves, double first, double rest, Tensor& out) {
  const FourierParams p = check(x, "x", waves, out, "out", first, rest, false);
  parallel_for(0, groups(p), grain(p), [&](int64_t begin, int64_t end) { fourier_cpu(p, begin, end); });
}

void fourier_inverse(const Tensor& spectrum, const Tensor& waves, double first, double rest, bool add, Tensor& out) {
  const FourierParams p = check(spectrum, "spectrum", waves, out, "out", first, rest, add);
  parallel_for(0, groups(p), grain(p), [&](int64_t begin, int64_t end) { fourier_inverse_cpu(p, begin, end); });
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("fourier(Tensor x, Tensor waves, float first, float rest, Tensor(a!) out) -> ()");
  m.def("fourier_inverse(Tensor spectrum, Tensor waves, float first, float rest, bool add, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("fourier", TORCH_BOX(&peftk::fourier));
  m.impl("fourier_inverse", TORCH_BOX(&peftk::fourier_inverse));
}
