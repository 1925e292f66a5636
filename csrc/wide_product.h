// Products of bfloat16 matrices whose sums stay float32: gradients of float32 parameters, summed over tokens.
//
// Matrix instructions (AMX) take tiles: 16 lines of 16 pairs of bfloat16 numbers that follow one another in depth. Both
// operands are packed into tiles, a part of the depth at a time. A float32 number becomes three bfloat16 numbers whose
// sum it is, so that nothing is rounded before it is added. Numbers below the normal ones count as zero.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace peftk {

constexpr int64_t kTileLines = 16, kTileDepth = 32, kTileWords = 256;

// Depth that is packed at a time: the tiles of two blocks of lines fit the first-level cache.
constexpr int64_t kPackedDepth = 512;

// Blocks of 16 rows and columns of a task, which packs its columns for itself: few where a product has few.
constexpr int64_t kTaskRows = 16, kTaskColumns = 8, kTaskFewColumns = 2;

// What tiles are packed into: a row of one lies in one line of the cache.
struct alignas(64) TileRow {
  uint32_t words[16];
};

constexpr int64_t tiles_of(int64_t n, int64_t edge) { return (n + edge - 1) / edge; }

// The rows of the left operand, or the columns of the right one.
struct WideOperand {
  const void* data;  // number k of line i at i * line + k * step; one of the two is 1
  int64_t lines, line, step;
  Dtype dtype;  // float32 or bfloat16

  constexpr int64_t pieces() const { return dtype == Dtype::float32 ? 3 : 1; }
  // Words that blocks of so much depth fill.
  constexpr int64_t words(int64_t blocks, int64_t depth) const {
    return blocks * tiles_of(depth, kTileDepth) * pieces() * kTileWords;
  }
};

struct WideProductParams {
  WideOperand left, right;
  const uint32_t*
      packed;  // of the left: (blocks of rows, blocks of depth, pieces, kTileWords); null: see `lies_in_tiles`
  float* out;  // (rows, columns); element (i, j) at i * row + j * column, one of which is 1
  int64_t row, column;
  int64_t first, depth;  // what is multiplied of the depth, where there is more it is added onto the sums before
  bool instructions;     // whether to use AMX, which must be there: see `wide_instructions`
};

constexpr int64_t task_columns(const WideProductParams& p) {
  return p.right.lines < 4 * kTaskColumns * kTileLines ? kTaskFewColumns : kTaskColumns;
}

constexpr int64_t wide_tasks(const WideProductParams& p) {
  return tiles_of(p.left.lines, kTaskRows * kTileLines) * tiles_of(p.right.lines, task_columns(p) * kTileLines);
}

// Whether the left operand can be read in place: whole tiles, whose rows lie in their lines. Where they are read for
// few columns only; for many, lines a power of two apart would evict each other from the cache again and again.
constexpr bool lies_in_tiles(const WideOperand& left, int64_t depth, int64_t columns) {
  return left.dtype == Dtype::bfloat16 && left.step == 1 && left.lines % kTileLines == 0 && depth % kTileDepth == 0 &&
         columns <= 4 * kTileLines;
}

// Whether this CPU multiplies tiles of bfloat16 numbers and the system lets this process do so: it is asked once.
bool wide_instructions();
// Pack the blocks begin to end of an operand. A tile of the left one has a line in each row, and one of the right one a
// line in each column.
void pack_wide_cpu(const WideProductParams& p, bool left, uint32_t* packed, int64_t begin, int64_t end);
// Tasks begin to end. Every sum is one task's, so that the number of threads changes no bit.
void wide_product_cpu(const WideProductParams& p, int64_t begin, int64_t end);

}  // namespace peftk
