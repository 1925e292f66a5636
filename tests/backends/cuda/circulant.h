// Checks of the circular convolution between spectra and of the circulant weight.
#pragma once
#include "../../../csrc/cuda/circulant.cu"
#include "checks.h"

namespace {

struct Mix {
  int64_t rows, out_blocks, in_blocks, lanes;
};

template <typename T>
void check_mix(const Mix& s, bool adjoint) {
  const int64_t from = adjoint ? s.out_blocks : s.in_blocks, to = adjoint ? s.in_blocks : s.out_blocks;
  Heap<T> x(s.rows * from * 2 * s.lanes), out(s.rows * to * 2 * s.lanes);
  Heap<float> kernel(s.out_blocks * s.in_blocks * 3 * s.lanes);
  fill(x);
  fill(kernel);
  circulant_mix_cuda({x.get(), kernel.get(), out.get(), s.rows, s.out_blocks, s.in_blocks, s.lanes, adjoint, kDtype<T>},
                     nullptr);
  for (int64_t t = 0; t < s.rows; ++t)
    for (int64_t m = 0; m < to; ++m)
      for (int64_t f = 0; f < s.lanes; ++f) {
        double re = 0, im = 0, magnitude = 0;
        for (int64_t n = 0; n < from; ++n) {
          const float* k = kernel.get() + ((adjoint ? n : m) * s.in_blocks + (adjoint ? m : n)) * 3 * s.lanes + f;
          const double x_re = to_float(x[(t * from + n) * 2 * s.lanes + f]);
          const double x_im = to_float(x[((t * from + n) * 2 + 1) * s.lanes + f]);
          const double turn = adjoint ? -k[s.lanes] : k[s.lanes];
          re += k[0] * x_re + turn * x_im;
          im += k[2 * s.lanes] * x_im - turn * x_re;
          magnitude += 3 * (std::abs(x_re) + std::abs(x_im));
        }
        const double operations = static_cast<double>(2 * from + 1);
        expect(to_float(out[(t * to + m) * 2 * s.lanes + f]), re, magnitude, operations, kUnit<T>, "circulant_mix");
        expect(to_float(out[((t * to + m) * 2 + 1) * s.lanes + f]), im, magnitude, operations, kUnit<T>,
               "circulant_mix");
      }
  hash(out);
}

template <typename T>
void check_contract(const Mix& s, int64_t chunks) {
  const int64_t sums = s.out_blocks * s.in_blocks * 3 * s.lanes;
  Heap<T> grad(s.rows * s.out_blocks * 2 * s.lanes), x(s.rows * s.in_blocks * 2 * s.lanes);
  Heap<float> partial(chunks * sums), out(sums);
  fill(grad);
  fill(x);
  circulant_contract_cuda(
      {grad.get(), x.get(), partial.get(), s.rows, s.out_blocks, s.in_blocks, s.lanes, chunks, kDtype<T>}, out.get(),
      nullptr);
  for (int64_t m = 0; m < s.out_blocks; ++m)
    for (int64_t n = 0; n < s.in_blocks; ++n)
      for (int64_t f = 0; f < s.lanes; ++f) {
        double truth[3] = {}, magnitude = 0;
        for (int64_t t = 0; t < s.rows; ++t) {
          const int64_t g = (t * s.out_blocks + m) * 2 * s.lanes + f, v = (t * s.in_blocks + n) * 2 * s.lanes + f;
          const double g_re = to_float(grad[g]), g_im = to_float(grad[g + s.lanes]);
          const double x_re = to_float(x[v]), x_im = to_float(x[v + s.lanes]);
          truth[0] += g_re * x_re;
          truth[1] += g_re * x_im - g_im * x_re;
          truth[2] += g_im * x_im;
          magnitude += (std::abs(g_re) + std::abs(g_im)) * (std::abs(x_re) + std::abs(x_im));
        }
        for (int64_t i = 0; i < 3; ++i)
          expect(out[((m * s.in_blocks + n) * 3 + i) * s.lanes + f], truth[i], magnitude,
                 static_cast<double>(2 * s.rows + chunks), kFloatUnit, "circulant_contract");
      }
  hash(out);
}

template <typename T>
void check_weight(int64_t out_blocks, int64_t in_blocks, int64_t b, bool given) {
  const float scale = -0.75f;
  const int64_t features = in_blocks * b, elements = out_blocks * b * features;
  Heap<T> weight(given ? elements : 0), out(elements);
  Heap<float> kernel(out_blocks * in_blocks * b), dkernel(out_blocks * in_blocks * b);
  fill(weight);
  fill(kernel);
  circulant_weight_cuda(
      {given ? weight.get() : nullptr, kernel.get(), out.get(), out_blocks, in_blocks, b, scale, kDtype<T>}, nullptr);
  for (int64_t row = 0; row < out_blocks * b; ++row)
    for (int64_t col = 0; col < features; ++col) {
      const double value = static_cast<double>(kernel[(row / b * in_blocks + col / b) * b + (col - row % b + b) % b]);
      const double base = given ? to_float(weight[row * features + col]) : 0.0;
      expect(to_float(out[row * features + col]), base + value * scale, std::abs(base) + std::abs(value), 1, kUnit<T>,
             "circulant_weight");
    }
  circulant_weight_backward_cuda({out.get(), dkernel.get(), out_blocks, in_blocks, b, scale, kDtype<T>}, nullptr);
  for (int64_t m = 0; m < out_blocks; ++m)
    for (int64_t n = 0; n < in_blocks; ++n)
      for (int64_t l = 0; l < b; ++l) {
        double truth = 0, magnitude = 0;
        for (int64_t row = 0; row < b; ++row) {
          const double term = to_float(out[(m * b + row) * features + n * b + (row + l) % b]);
          truth += term * scale;
          magnitude += std::abs(term);
        }
        expect(dkernel[(m * in_blocks + n) * b + l], truth, magnitude, static_cast<double>(b + 1), kFloatUnit,
               "circulant_weight_backward");
      }
  hash(out);
  hash(dkernel);
}

template <typename T>
void check_circulant(bool few) {
  for (const int64_t rows : {0, 1, 4, 9})
    for (const int64_t lanes : {8, 72}) {
      if (few && (rows != 9 || lanes != 8)) continue;
      const Mix sizes{rows, 5, 2, lanes};
      check_mix<T>(sizes, false);
      check_mix<T>(sizes, true);
      check_contract<T>(sizes, rows == 9 ? 3 : 1);
    }
  for (const int64_t size : {1, 2, 7, 48})
    for (const bool given : {false, true})
      if (!few || size == 7) check_weight<T>(2, 3, size, given);
}

void run_circulant(bool few) {
  for (const int64_t turns : {int64_t{2}, int64_t{4096}}) {
    most_circulant_turns = turns;
    check_circulant<float>(few);
    check_circulant<__nv_bfloat16>(few);
    check_circulant<__half>(few);
  }
}

}  // namespace
