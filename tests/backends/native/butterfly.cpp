// Checks of butterfly products and of the scale of channels.
#include "../../../csrc/cpu/butterfly.cpp"
#include "butterfly_dense.h"
#include "harness.h"

namespace {

void check_butterfly(Level level, int64_t stages, int64_t count, int64_t size) {
  const int64_t area = count * size * size, group = size << (stages - 1), groups = count >> (stages - 1);
  Heap<float> factors(stages * area), blocks(groups * group * group), grad(blocks.count()), dfactors(stages * area);
  fill(factors);
  fill(grad);
  const std::string what = "butterfly m " + std::to_string(stages) + " size " + std::to_string(size) + name_of(level);
  const ButterflyComposeParams p{factors.get(), blocks.get(), stages, count, size};
  in_pieces(groups, 2, [&](int64_t begin, int64_t end) { VARIANT(level, butterfly_compose_cpu)(p, begin, end); });
  const DenseButterfly dense{stages, count, size, doubles(factors)};
  const double operations = static_cast<double>(stages * (size + 2) + group);
  const DenseMatrix truth = dense.product(0, stages, false), magnitude = dense.product(0, stages, true);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < group; ++i)
      for (int64_t j = 0; j < group; ++j)
        expect(blocks[(g * group + i) * group + j], truth[dense.at(g, i, j)], magnitude[dense.at(g, i, j)], operations,
               kFloatUnit, what);
  const ButterflyComposeBackwardParams q{grad.get(), factors.get(), dfactors.get(), stages, count, size};
  in_pieces(groups, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, butterfly_compose_backward_cpu)(q, begin, end); });
  for (int64_t stage = 0; stage < stages; ++stage) {
    const std::vector<double> expected = dense.gradient(stage, doubles(grad), false);
    const std::vector<double> bound = dense.gradient(stage, doubles(grad), true);
    for (int64_t i = 0; i < area; ++i)
      expect(dfactors[stage * area + i], expected[i], bound[i], operations, kFloatUnit, what + " backward");
  }
}

template <typename T>
void check_scale(Level level, int64_t outer, int64_t channels, int64_t inner, bool with_bias, int64_t chunks) {
  const int64_t elements = outer * channels * inner;
  Heap<T> x(elements), y(elements), grad(elements), dx(elements);
  Heap<float> scale(channels), bias(channels), sums(chunks * 2 * channels);
  fill(x);
  fill(grad);
  fill(scale, 2.0);
  fill(bias);
  const std::string what = std::string("scale_channels ") + name_of(level);
  const float* shift = with_bias ? bias.get() : nullptr;
  const ScaleChannelsParams p{x.get(), scale.get(), shift, y.get(), outer, channels, inner, dtype_of<T>()};
  in_pieces(outer, 3, [&](int64_t begin, int64_t end) { VARIANT(level, scale_channels_cpu)(p, begin, end); });
  const ScaleChannelsBackwardParams q{grad.get(), x.get(),  scale.get(), shift,  dx.get(),     sums.get(),
                                      outer,      channels, inner,       chunks, dtype_of<T>()};
  in_pieces(chunks, 1, [&](int64_t begin, int64_t end) { VARIANT(level, scale_channels_backward_cpu)(q, begin, end); });
  std::vector<double> product(channels), products(channels), total(channels), totals(channels);
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t c = i / inner % channels;
    const double s = scale[c], b = with_bias ? bias[c] : 0.0f, value = to_float(x[i]), g = to_float(grad[i]);
    expect(to_float(y[i]), s * value + (1 - s) * b, std::abs(s * value) + std::abs((1 - s) * b), 3, output_unit<T>(),
           what);
    expect(to_float(dx[i]), g * s, std::abs(g * s), 1, output_unit<T>(), what + " backward");
    product[c] += g * (value - b);
    products[c] += std::abs(g) * (std::abs(value) + std::abs(b));
    total[c] += g;
    totals[c] += std::abs(g);
  }
  for (int64_t c = 0; c < channels; ++c) {
    double found = 0, plain = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      found += sums[chunk * 2 * channels + c];
      plain += sums[(chunk * 2 + 1) * channels + c];
    }
    const double operations = static_cast<double>(outer * inner + 3);
    expect(found, product[c], products[c], operations, kFloatUnit, what + " sums");
    expect(plain, total[c], totals[c], operations, kFloatUnit, what + " totals");
  }
}

void run_butterfly(Level level) {
  for (const int64_t size : {1, 3, 8}) check_butterfly(level, 1, 3, size);
  for (const int64_t size : {2, 4, 6, 16, 18})
    for (const int64_t count : {2, 6}) check_butterfly(level, 2, count, size);
  check_butterfly(level, 3, 4, 2);
  check_butterfly(level, 3, 12, 4);
  check_butterfly(level, 3, 4, 10);
  check_butterfly(level, 4, 16, 4);
  check_butterfly(level, 5, 16, 4);
  for (const bool bias : {false, true})
    for (const int64_t channels : {1, 5, 16, 513})
      for (const int64_t outer : {0, 1, 7, 40}) {
        check_scale<float>(level, outer, channels, 1, bias, outer > 7 ? 3 : 1);
        check_scale<BFloat16>(level, outer, channels, 1, bias, 1);
        if (channels > 16) continue;
        for (const int64_t inner : {3, 8, 21}) check_scale<float>(level, outer, channels, inner, bias, 1);
        check_scale<BFloat16>(level, outer, channels, 9, bias, outer > 7 ? 2 : 1);
      }
}

const Family family("butterfly", run_butterfly);

}  // namespace
