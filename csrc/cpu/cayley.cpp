#include "../cayley.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

using Buffer = std::unique_ptr<float[]>;

// Numbers of one matrix in the source.
constexpr int64_t source_size(int64_t size, bool square) { return square ? size * size : size * (size - 1) / 2; }

// S, whose entries may be floats or doubles, with `diagonal` on its diagonal.
template <typename T>
PEFTK_INLINE void unpack_skew(const float* source, bool square, int64_t size, T diagonal, T* s, int64_t ld) {
  for (int64_t i = 0; i < size; ++i) {
    s[i * ld + i] = diagonal;
    for (int64_t j = size; j < ld; ++j) s[i * ld + j] = 0;
    for (int64_t j = i + 1; j < size; ++j) {
      const float value = square ? 0.5f * (source[i * size + j] - source[j * size + i]) : *source++;
      s[i * ld + j] = value;
      s[j * ld + i] = -static_cast<T>(value);
    }
  }
}

PEFTK_INLINE void pack_skew_gradient(const float* grad, int64_t size, int64_t ld, bool square, float* dsource) {
  for (int64_t i = 0; i < size; ++i) {
    if (square) dsource[i * size + i] = 0.0f;
    for (int64_t j = i + 1; j < size; ++j) {
      const float value = grad[i * ld + j] - grad[j * ld + i];
      if (square) {
        dsource[i * size + j] = 0.5f * value;
        dsource[j * size + i] = -0.5f * value;
      } else {
        *dsource++ = value;
      }
    }
  }
}

// R = 2 inv(I + S) - I. The symmetric part of I + S and of every Schur complement of it is at least I, so all
// pivots are at least 1 and none is looked for; doubles absorb the growth, which is at most 1 + |S|^2.
PEFTK_INLINE void invert(const float* source, bool square, int64_t n, double* a, float* out) {
  unpack_skew(source, square, n, 1.0, a, n);
  for (int64_t p = 0; p < n; ++p) {
    double* __restrict pivot = a + p * n;
    const double inverse = 1.0 / pivot[p];
    for (int64_t j = 0; j < n; ++j) pivot[j] *= inverse;
    pivot[p] = inverse;
    for (int64_t i = 0; i < n; ++i) {
      if (i == p) continue;
      double* __restrict row = a + i * n;
      const double factor = row[p];
      for (int64_t j = 0; j < n; ++j) row[j] -= factor * pivot[j];
      // Not a zero before the loop: a vector that is read right after one of its numbers was written must wait for it.
      row[p] = 0.0 - factor * inverse;
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) out[i * n + j] = static_cast<float>(2.0 * a[i * n + j] - (i == j));
}

// Horner's rule, stage[k] = stage[k + 1] S + c_k I, from stage[terms - 2] = c_(terms-1) S + c_(terms-2) I down to
// `lowest`. Stage k lies at stages + k * size * ld.
PEFTK_INLINE void horner(const float* s, const double* c, int64_t terms, int64_t size, int64_t ld, int64_t lowest,
                         float* stages) {
  for (int64_t k = terms - 2; k >= lowest; --k) {
    float* stage = stages + k * size * ld;
    if (k == terms - 2)
      for (int64_t i = 0; i < size * ld; ++i) stage[i] = static_cast<float>(c[terms - 1]) * s[i];
    else
      product({stage + size * ld, ld, 1}, s, ld, stage, ld, size, ld, size, false);
    for (int64_t i = 0; i < size; ++i) stage[i * ld + i] += static_cast<float>(c[k]);
  }
}

PEFTK_INLINE void cayley_cpu_body(const CayleyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.size, ld = padded(n), numbers = source_size(n, p.square);
  if (p.terms == 0) {
    const std::unique_ptr<double[]> a(new double[n * n]);
    for (int64_t i = begin; i < end; ++i) invert(p.source + i * numbers, p.square, n, a.get(), p.blocks + i * n * n);
    return;
  }
  const Buffer s(new float[n * ld]), stages(new float[(p.terms > 1 ? p.terms - 1 : 1) * n * ld]());
  for (int64_t i = begin; i < end; ++i) {
    if (p.terms == 1) {
      for (int64_t j = 0; j < n; ++j) stages[j * ld + j] = static_cast<float>(p.polynomial[0]);
    } else {
      unpack_skew(p.source + i * numbers, p.square, n, 0.0f, s.get(), ld);
      horner(s.get(), p.polynomial, p.terms, n, ld, 0, stages.get());
    }
    store_tile(stages.get(), ld, n, n, p.blocks + i * n * n, n);
  }
}

// dS = -(R + I)^T G (R + I)^T / 2, because inv(I + S) = (R + I) / 2: two products instead of a second inversion.
PEFTK_INLINE void exact_gradient(const float* grad, const float* blocks, int64_t n, int64_t ld, float* m, float* g,
                                 float* ds) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < ld; ++j) m[i * ld + j] = j < n ? blocks[j * n + i] + (i == j) : 0.0f;
  load_tile(grad, n, n, n, g, ld);
  product({m, ld, 1}, g, ld, ds, ld, n, ld, n, false);
  product({ds, ld, 1}, m, ld, g, ld, n, ld, n, false);
  for (int64_t i = 0; i < n * ld; ++i) ds[i] = -0.5f * g[i];
}

// The reverse of Horner's rule: dS += stage[k + 1]^T G_k and G_(k+1) = G_k S^T = -G_k S.
PEFTK_INLINE void polynomial_gradient(const CayleyBackwardParams& p, const float* grad, const float* source, int64_t ld,
                                      float* s, float* stages, float* g, float* next, float* ds) {
  const int64_t n = p.size;
  unpack_skew(source, p.square, n, 0.0f, s, ld);
  horner(s, p.polynomial, p.terms, n, ld, 1, stages);
  load_tile(grad, n, n, n, g, ld);
  for (int64_t i = 0; i < n * ld; ++i) ds[i] = 0.0f;
  float sign = 1.0f;
  for (int64_t k = 0; k + 2 < p.terms; ++k) {
    product({stages + (k + 1) * n * ld, 1, ld}, g, ld, next, ld, n, ld, n, false);
    for (int64_t i = 0; i < n * ld; ++i) ds[i] += sign * next[i];
    product({g, ld, 1}, s, ld, next, ld, n, ld, n, false);
    float* swap = g;
    g = next;
    next = swap;
    sign = -sign;
  }
  const float last = sign * static_cast<float>(p.polynomial[p.terms - 1]);
  for (int64_t i = 0; i < n * ld; ++i) ds[i] += last * g[i];
}

PEFTK_INLINE void cayley_backward_cpu_body(const CayleyBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.size, ld = padded(n), area = n * ld, numbers = source_size(n, p.square);
  const Buffer ds(new float[area]()), g(new float[area]), next(new float[area]), s(new float[area]);
  const Buffer stages(new float[(p.terms > 1 ? p.terms - 1 : 1) * area]);
  for (int64_t i = begin; i < end; ++i) {
    const float* grad = p.grad + i * n * n;
    if (p.terms == 0)
      exact_gradient(grad, p.blocks + i * n * n, n, ld, s.get(), g.get(), ds.get());
    else if (p.terms > 1)
      polynomial_gradient(p, grad, p.source + i * numbers, ld, s.get(), stages.get(), g.get(), next.get(), ds.get());
    pack_skew_gradient(ds.get(), n, ld, p.square, p.dsource + i * numbers);
  }
}

}  // namespace

PEFTK_KERNEL(cayley_cpu, (const CayleyParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(cayley_backward_cpu, (const CayleyBackwardParams& p, int64_t begin, int64_t end), (p, begin, end))

}  // namespace peftk
