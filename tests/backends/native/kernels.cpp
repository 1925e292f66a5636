// Runs every C++ kernel under the sanitizers against naive loops in double precision. A family's checks stand in the
// file of its name, a translation unit of its own, which includes the kernels, so that the variants for each
// instruction set can be called by name (`VARIANT`), and ends in a `Family`, by which it is found here. Every buffer
// has exactly the size that a kernel may touch. `planted-write` and `planted-shift` plant an error each, to show that
// it would be found.
#include <algorithm>

#include "harness.h"

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

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  planted_write = mode == "planted-write";
  if (mode == "planted-shift") std::printf("%d\n", 1 << (31 + argc));
  check_rounding();
  // The linker's order is nobody's; the random numbers follow this one.
  std::vector<const Family*> families = Family::all();
  std::sort(families.begin(), families.end(),
            [](const Family* a, const Family* b) { return std::strcmp(a->name, b->name) < 0; });
  for (const Level level : levels()) {
    for (const Family* family : families) family->run(level);
    std::printf("level %s\n", name_of(level));
  }
  for (const Family* family : families) std::printf("family %s\n", family->name);
  std::printf("%lld checks\n", static_cast<long long>(checks));
  return 0;
}
