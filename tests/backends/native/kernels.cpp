// Runs every C++ kernel under the sanitizers against naive loops in double precision. A family's checks stand in the
// file of its name, which includes the kernels, so that the variants for each instruction set can be called by name
// (`VARIANT`), and ends in `run_<family>(level)`; to add a family, include its file and call that here. Every buffer
// has exactly the size that a kernel may touch. `planted-write` and `planted-shift` plant an error each, to show that
// it would be found.
#include "block_diagonal.cpp"
#include "butterfly.cpp"
#include "cayley.cpp"
#include "circulant.cpp"
#include "dora.cpp"
#include "fourier.cpp"
#include "hadamard.cpp"
#include "harness.h"
#include "kronecker.cpp"
#include "low_rank.cpp"

namespace {

void check_rounding() {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const BFloat16 value{static_cast<uint16_t>(bits)};
    BFloat16 back;
    from_float(to_float(value), back);
    const bool nan = std::isnan(to_float(value));
    expect(nan ? std::isnan(to_float(back)) : back.bits == value.bits, 1, 0, 0, 0, "bfloat16 round trip");
  }
}

void run(Level level) {
  run_block_diagonal(level);
  run_butterfly(level);
  run_cayley(level);
  run_circulant(level);
  run_dora(level);
  run_fourier(level);
  run_hadamard(level);
  run_kronecker(level);
  run_low_rank(level);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  planted_write = mode == "planted-write";
  if (mode == "planted-shift") std::printf("%d\n", 1 << (31 + argc));
  check_philox();
  check_rounding();
  for (const Level level : levels()) {
    run(level);
    std::printf("level %s\n", name_of(level));
  }
  std::printf("%lld checks\n", static_cast<long long>(checks));
  return 0;
}
