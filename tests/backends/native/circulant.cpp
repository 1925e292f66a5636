// Checks of the circular convolution between spectra and of the circulant weight, against naive sums in doubles.
#include "../../../csrc/cpu/circulant.cpp"
#include "harness.h"

namespace {

// The planes of a kernel as they act on a lane (re, im): the matrix {{a, s}, {-s, c}}.
struct Planes {
  double a, s, c;
};

template <typename T>
void check_mix(Level level, int64_t rows, int64_t out_blocks, int64_t in_blocks, int64_t lanes, bool adjoint) {
  const int64_t from = adjoint ? out_blocks : in_blocks, to = adjoint ? in_blocks : out_blocks;
  Heap<T> x(rows * from * 2 * lanes), out(rows * to * 2 * lanes - planted_write);
  Heap<float> kernel(out_blocks * in_blocks * 3 * lanes);
  fill(x);
  fill(kernel);
  const CirculantMixParams p{x.get(),   kernel.get(), out.get(), rows,         out_blocks,
                             in_blocks, lanes,        adjoint,   dtype_of<T>()};
  in_pieces((rows + kMixRows - 1) / kMixRows, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, circulant_mix_cpu)(p, begin, end); });
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t m = 0; m < to; ++m)
      for (int64_t f = 0; f < lanes; ++f) {
        double re = 0, im = 0, magnitude = 0;
        for (int64_t n = 0; n < from; ++n) {
          const float* at = kernel.get() + ((adjoint ? n : m) * in_blocks + (adjoint ? m : n)) * 3 * lanes + f;
          const Planes k{at[0], at[lanes], at[2 * lanes]};
          const double x_re = to_float(x[(t * from + n) * 2 * lanes + f]);
          const double x_im = to_float(x[((t * from + n) * 2 + 1) * lanes + f]);
          // The adjoint is the transposed matrix.
          re += k.a * x_re + (adjoint ? -k.s : k.s) * x_im;
          im += (adjoint ? k.s : -k.s) * x_re + k.c * x_im;
          magnitude += (std::abs(k.a) + std::abs(k.s) + std::abs(k.c)) * (std::abs(x_re) + std::abs(x_im));
        }
        const double operations = static_cast<double>(2 * from + 2);
        const std::string what = std::string("circulant_mix ") + name_of(level);
        expect(to_float(out[(t * to + m) * 2 * lanes + f]), re, magnitude, operations, output_unit<T>(), what);
        expect(to_float(out[((t * to + m) * 2 + 1) * lanes + f]), im, magnitude, operations, output_unit<T>(), what);
      }
}

template <typename T>
void check_contract(Level level, int64_t rows, int64_t out_blocks, int64_t in_blocks, int64_t lanes, int64_t chunks) {
  const int64_t sums = out_blocks * in_blocks * 3 * lanes;
  Heap<T> grad(rows * out_blocks * 2 * lanes), x(rows * in_blocks * 2 * lanes);
  Heap<float> partial(chunks * sums);
  fill(grad);
  fill(x);
  for (int64_t i = 0; i < partial.count(); ++i) partial[i] = 0.0f;
  const CirculantContractParams p{grad.get(), x.get(), partial.get(), rows,         out_blocks,
                                  in_blocks,  lanes,   chunks,        dtype_of<T>()};
  in_pieces(chunks, 2, [&](int64_t begin, int64_t end) { VARIANT(level, circulant_contract_cpu)(p, begin, end); });
  for (int64_t m = 0; m < out_blocks; ++m)
    for (int64_t n = 0; n < in_blocks; ++n)
      for (int64_t f = 0; f < lanes; ++f) {
        double found[3] = {}, truth[3] = {}, magnitude = 0;
        for (int64_t i = 0; i < 3; ++i)
          for (int64_t c = 0; c < chunks; ++c)
            found[i] += partial[c * sums + ((m * in_blocks + n) * 3 + i) * lanes + f];
        for (int64_t t = 0; t < rows; ++t) {
          const T* g = grad.get() + (t * out_blocks + m) * 2 * lanes + f;
          const T* v = x.get() + (t * in_blocks + n) * 2 * lanes + f;
          const double g_re = to_float(g[0]), g_im = to_float(g[lanes]), x_re = to_float(v[0]),
                       x_im = to_float(v[lanes]);
          truth[0] += g_re * x_re;
          truth[1] += g_re * x_im - g_im * x_re;
          truth[2] += g_im * x_im;
          magnitude += (std::abs(g_re) + std::abs(g_im)) * (std::abs(x_re) + std::abs(x_im));
        }
        for (int64_t i = 0; i < 3; ++i)
          expect(found[i], truth[i], magnitude, static_cast<double>(2 * rows + 2), 0,
                 std::string("circulant_contract ") + name_of(level));
      }
}

template <typename T>
void check_weight(Level level, int64_t out_blocks, int64_t in_blocks, int64_t b, bool given) {
  const float scale = -0.75f;
  const int64_t features = in_blocks * b, elements = out_blocks * b * features;
  Heap<T> weight(given ? elements : 0), out(elements);
  Heap<float> kernel(out_blocks * in_blocks * b), dkernel(out_blocks * in_blocks * b);
  fill(weight);
  fill(kernel);
  const CirculantWeightParams p{
      given ? weight.get() : nullptr, kernel.get(), out.get(), out_blocks, in_blocks, b, scale, dtype_of<T>()};
  in_pieces(out_blocks, 2, [&](int64_t begin, int64_t end) { VARIANT(level, circulant_weight_cpu)(p, begin, end); });
  for (int64_t row = 0; row < out_blocks * b; ++row)
    for (int64_t col = 0; col < features; ++col) {
      const int64_t place = (col % b - row % b + b) % b;
      const double value = static_cast<double>(kernel[(row / b * in_blocks + col / b) * b + place]) * scale;
      const double base = given ? to_float(weight[row * features + col]) : 0.0;
      expect(to_float(out[row * features + col]), base + value, std::abs(base) + std::abs(value), 2, output_unit<T>(),
             std::string("circulant_weight ") + name_of(level));
    }
  const CirculantWeightBackwardParams q{out.get(), dkernel.get(), out_blocks, in_blocks, b, scale, dtype_of<T>()};
  in_pieces(out_blocks, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, circulant_weight_backward_cpu)(q, begin, end); });
  for (int64_t m = 0; m < out_blocks; ++m)
    for (int64_t n = 0; n < in_blocks; ++n)
      for (int64_t l = 0; l < b; ++l) {
        double truth = 0, magnitude = 0;
        for (int64_t row = 0; row < b; ++row) {
          const double term =
              static_cast<double>(to_float(out[(m * b + row) * features + n * b + (row + l) % b])) * scale;
          truth += term;
          magnitude += std::abs(term);
        }
        expect(dkernel[(m * in_blocks + n) * b + l], truth, magnitude, static_cast<double>(b + 2), kFloatUnit,
               std::string("circulant_weight_backward ") + name_of(level));
      }
}

void check_few(Level level, int64_t rows, int64_t out_blocks, int64_t in_blocks, int64_t size) {
  const float scale = 1.5f;
  const int64_t features = in_blocks * size, columns = out_blocks * size;
  Heap<float> x(rows * features), kernel(out_blocks * in_blocks * size), out(rows * columns);
  fill(x);
  fill(kernel);
  const CirculantFewParams p{x.get(), kernel.get(), out.get(), rows, out_blocks, in_blocks, size, scale};
  in_pieces(out_blocks, 2, [&](int64_t begin, int64_t end) { VARIANT(level, circulant_few_cpu)(p, begin, end); });
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < columns; ++c) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t n = 0; n < in_blocks; ++n)
        for (int64_t q = 0; q < size; ++q) {
          const int64_t at = (q - c % size + size) % size;
          const double term = static_cast<double>(x[t * features + n * size + q]) *
                              kernel[(c / size * in_blocks + n) * size + at] * scale;
          truth += term;
          magnitude += std::abs(term);
        }
      expect(out[t * columns + c], truth, magnitude, static_cast<double>(features + 3), kFloatUnit,
             std::string("circulant_few ") + name_of(level));
    }
}

void run_circulant(Level level) {
  for (const int64_t rows : {0, 1, 3, 4, 9})
    for (const int64_t lanes : {8, 24})
      for (const int64_t out_blocks : {1, 3})
        for (const int64_t in_blocks : {1, 2}) {
          if (planted_write && rows == 0) continue;
          for (const bool adjoint : {false, true}) {
            check_mix<float>(level, rows, out_blocks, in_blocks, lanes, adjoint);
            check_mix<BFloat16>(level, rows, out_blocks, in_blocks, lanes, adjoint);
          }
          for (const int64_t chunks : {1, 3}) {
            check_contract<float>(level, rows, out_blocks, in_blocks, lanes, chunks);
            check_contract<BFloat16>(level, rows, out_blocks, in_blocks, lanes, chunks);
          }
        }
  for (const int64_t size : kSizes)
    for (const bool given : {false, true}) {
      check_weight<float>(level, 3, 2, size, given);
      check_weight<BFloat16>(level, 1, 3, size, given);
    }
  for (const int64_t size : kSizes)
    for (const int64_t rows : {1, 3}) check_few(level, rows, 3, 2, size);
}

const Family family("circulant", run_circulant);

}  // namespace
