// Checks of the Fourier transform of blocks and of its transpose, against sums of waves in doubles.
#include "../../../csrc/cpu/fourier.cpp"
#include "harness.h"

namespace {

// What lane k of a plane (0: real, 1: imaginary) takes of number n.
double wave_of(int64_t size, int64_t plane, int64_t k, int64_t n, float first, float rest) {
  if (k == 0) return first * (plane == 1 && n % 2 == 1 ? -1.0 : 1.0);
  const double angle = 2 * std::acos(-1.0) * static_cast<double>(k * n % size) / static_cast<double>(size);
  return rest * (plane == 0 ? std::cos(angle) : std::sin(angle));
}

void check_fourier(Level level, int64_t count, int64_t size, bool add) {
  const float first = 0.25f, rest = -1.5f;
  const int64_t lanes = size / 2;
  Heap<float> x(count * size), spectrum(count * size - planted_write), waves(size), back(count * size);
  fill(x);
  fill(back);
  for (int64_t k = 0; k < lanes; ++k) {
    const double angle = 2 * std::acos(-1.0) * static_cast<double>(k) / static_cast<double>(size);
    waves[2 * k] = static_cast<float>(std::cos(angle));
    waves[2 * k + 1] = static_cast<float>(std::sin(angle));
  }
  const std::vector<double> before = doubles(back);
  const int64_t groups = (count + kFourierGroup - 1) / kFourierGroup;
  const FourierParams p{x.get(), spectrum.get(), waves.get(), count, size, first, rest, false};
  in_pieces(groups, 2, [&](int64_t begin, int64_t end) { VARIANT(level, fourier_cpu)(p, begin, end); });
  // Every halving rounds a few times, and so do the waves.
  const double operations = 8 * std::log2(static_cast<double>(size));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t plane = 0; plane < 2; ++plane)
      for (int64_t k = 0; k < lanes; ++k) {
        double truth = 0, magnitude = 0;
        for (int64_t n = 0; n < size; ++n) {
          truth += x[i * size + n] * wave_of(size, plane, k, n, first, rest);
          magnitude += std::abs(static_cast<double>(x[i * size + n]) * rest);
        }
        expect(spectrum[(i * 2 + plane) * lanes + k], truth, magnitude, operations, kFloatUnit,
               std::string("fourier ") + name_of(level));
      }
  const FourierParams q{spectrum.get(), back.get(), waves.get(), count, size, first, rest, add};
  in_pieces(groups, 2, [&](int64_t begin, int64_t end) { VARIANT(level, fourier_inverse_cpu)(q, begin, end); });
  for (int64_t i = 0; i < count; ++i)
    for (int64_t n = 0; n < size; ++n) {
      double truth = add ? before[i * size + n] : 0.0, magnitude = std::abs(truth);
      for (int64_t plane = 0; plane < 2; ++plane)
        for (int64_t k = 0; k < lanes; ++k) {
          const double value = spectrum[(i * 2 + plane) * lanes + k];
          truth += value * wave_of(size, plane, k, n, first, rest);
          magnitude += std::abs(value * rest);
        }
      expect(back[i * size + n], truth, magnitude, operations, kFloatUnit,
             std::string("fourier_inverse ") + name_of(level));
    }
}

void run_fourier(Level level) {
  for (const int64_t size : {16, 32, 64, 512})
    for (const int64_t count : {0, 1, 7, 8, 17}) {
      if (planted_write && count == 0) continue;
      for (const bool add : {false, true}) check_fourier(level, count, size, add);
    }
}

const Family family("fourier", run_fourier);

}  // namespace
