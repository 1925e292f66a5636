#pragma once

#include "../../../csrc/cuda/kronecker.cu"
#include "checks.h"

namespace {

struct Sizes4 {
  int64_t left, middle, rows, columns, offset;  // elements that pointers are off from an aligned address

  int64_t entries() const { return left * middle; }
  int64_t count() const { return entries() * rows * columns; }
  std::string name(const char* what) const {
    return std::string(what) + " l " + std::to_string(left) + " m " + std::to_string(middle) + " k " +
           std::to_string(rows) + " n " + std::to_string(columns) + " offset " + std::to_string(offset);
  }
};

template <typename T>
void check_kronecker(const Sizes4& s, int64_t chunks) {
  const float scale = 1.5f;
  Heap<T> weight(s.count(), s.offset), out(s.count(), s.offset);
  Heap<float> w1(s.entries()), w2(s.rows * s.columns), dw1(s.entries()), dw2(s.rows * s.columns);
  Heap<float> partial(chunks * s.entries());
  fill(weight), fill(w1), fill(w2);
  w1[0] = 0.0f;
  from_float(-0.0f, weight[0]);
  kronecker_weight_cuda(
      {weight.get(), w1.get(), w2.get(), out.get(), s.left, s.middle, s.rows, s.columns, scale, kDtype<T>}, nullptr);
  kronecker_weight_backward_cuda({weight.get(), w1.get(), w2.get(), partial.get(), dw2.get(), s.left, s.middle, s.rows,
                                  s.columns, chunks, scale, kDtype<T>},
                                 dw1.get(), nullptr);
  const std::string what = s.name("kronecker_weight");
  expect(std::signbit(to_float(out[0])), 1, 0, 0, 0, what.c_str());
  std::vector<double> first(s.entries()), first_size(s.entries()), second(w2.count()), second_size(w2.count());
  for (int64_t l = 0; l < s.left; ++l)
    for (int64_t k = 0; k < s.rows; ++k)
      for (int64_t m = 0; m < s.middle; ++m)
        for (int64_t n = 0; n < s.columns; ++n) {
          const int64_t at = ((l * s.rows + k) * s.middle + m) * s.columns + n, i = l * s.middle + m,
                        j = k * s.columns + n;
          const double before = to_float(weight[at]), a = 1.5 * w1[i], b = w2[j];
          expect(to_float(out[at]), before + a * b, std::abs(before) + std::abs(a * b), 3, kUnit<T>, what.c_str());
          first[i] += 1.5 * before * b;
          first_size[i] += std::abs(1.5 * before * b);
          second[j] += before * a;
          second_size[j] += std::abs(before * a);
        }
  for (int64_t i = 0; i < s.entries(); ++i)
    expect(dw1[i], first[i], first_size[i], static_cast<double>(w2.count() + 2), kFloatUnit, what.c_str());
  for (int64_t j = 0; j < w2.count(); ++j)
    expect(dw2[j], second[j], second_size[j], static_cast<double>(s.entries() + 2), kFloatUnit, what.c_str());
  hash(out), hash(dw1), hash(dw2);
}

void run_kronecker(bool few) {
  for (const int64_t left : {1, 3, 8})
    for (const int64_t middle : {1, 4})
      for (const int64_t rows : {1, 5})
        for (const int64_t columns : {1, 8, 33, 40}) {
          if (few && (left != 3 || rows != 5 || columns < 33)) continue;
          check_kronecker<float>({left, middle, rows, columns, 0}, rows);
          check_kronecker<__nv_bfloat16>({left, middle, rows, columns, 0}, 1);
          check_kronecker<__half>({left, middle, rows, columns, few ? 0 : 1},
                                  kronecker_weight_chunks_cuda(left * middle, rows));
        }
}

}  // namespace
