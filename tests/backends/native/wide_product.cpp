// Checks of products that are summed in float32, in plain loops and, where there are some, in matrix instructions.
#include "../../../csrc/cpu/wide_product.cpp"
#include "harness.h"

namespace {

// A matrix whose lines touch, or whose depth does, with more numbers between two rows than it uses.
template <typename T>
struct Operand {
  Operand(int64_t its_lines, int64_t its_depth, bool its_lines_touch)
      : lines(its_lines),
        depth(its_depth),
        lines_touch(its_lines_touch),
        ld((lines_touch ? lines : depth) + 3),
        numbers((lines_touch ? depth : lines) * ld - 3) {
    fill(numbers);
  }
  WideOperand view() { return {numbers.get(), lines, lines_touch ? 1 : ld, lines_touch ? ld : 1, dtype_of<T>()}; }
  double at(int64_t i, int64_t k) { return to_float(numbers[lines_touch ? k * ld + i : i * ld + k]); }

  int64_t lines, depth;
  bool lines_touch;
  int64_t ld;
  Heap<T> numbers;
};

template <typename L, typename R>
void check_product(Level level, int64_t rows, int64_t depth, int64_t columns, int layout, bool instructions) {
  Operand<L> left(rows, depth, layout & 1);
  Operand<R> right(columns, depth, layout & 2);
  const bool transposed = layout & 4;
  Heap<float> out(rows * columns - (planted_write ? 1 : 0));
  WideProductParams p{left.view(), right.view(), nullptr, out.get(), transposed ? 1 : columns, transposed ? rows : 1, 0,
                      0,           instructions};
  const int64_t blocks = tiles_of(rows, kTileLines);
  std::vector<TileRow> lines(p.left.words(blocks, kPackedDepth) / 16);
  for (; p.first < depth; p.first += kPackedDepth) {
    p.depth = depth - p.first < kPackedDepth ? depth - p.first : kPackedDepth;
    p.packed = lies_in_tiles(p.left, depth, columns) ? nullptr : lines[0].words;
    in_pieces(blocks, 3, [&](int64_t begin, int64_t end) {
      VARIANT(level, pack_wide_cpu)(p, true, lines[0].words + p.left.words(begin, p.depth), begin, end);
    });
    in_pieces(wide_tasks(p), 2, [&](int64_t begin, int64_t end) { VARIANT(level, wide_product_cpu)(p, begin, end); });
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < depth; ++k) {
        truth += left.at(i, k) * right.at(j, k);
        magnitude += std::abs(left.at(i, k) * right.at(j, k));
      }
      // The pieces of a float32 number are added one by one; rounding errors of sums grow with their number.
      expect(out[transposed ? j * rows + i : i * columns + j], truth, magnitude, static_cast<double>(3 * depth + 2), 0,
             std::string("wide_product ") + name_of(level) + (instructions ? " instructions" : " plain"));
    }
}

struct Shape {
  int64_t rows, depth, columns;
};

void run_wide_product(Level level) {
  for (const bool instructions : {false, true}) {
    if (instructions && !wide_instructions()) continue;
    for (const auto& [rows, depth, columns] : {Shape{1, 1, 1},
                                               {16, 32, 16},
                                               {32, 64, 40},
                                               {17, 31, 33},
                                               {5, 65, 70},
                                               {40, 2, 48},
                                               {3, kPackedDepth + 33, 20},
                                               {290, 33, 17},
                                               {18, 34, 530}})
      for (int layout = 0; layout < 8; ++layout) {
        check_product<BFloat16, BFloat16>(level, rows, depth, columns, layout, instructions);
        check_product<float, BFloat16>(level, rows, depth, columns, layout, instructions);
        check_product<BFloat16, float>(level, rows, depth, columns, layout, instructions);
      }
  }
}

// The three pieces of a float32 number are the number, but for what lies below the normal ones; of what is not finite,
// the first is.
void check_pieces() {
  float from[16];
  for (int round = 0; round < 4096; ++round) {
    for (float& value : from) {
      const auto bits = static_cast<uint32_t>(std::abs(uniform()) * 4294967295.0);
      std::memcpy(&value, &bits, sizeof value);
    }
    from[0] = std::numeric_limits<float>::infinity(), from[1] = std::numeric_limits<float>::max();
    from[2] = std::numeric_limits<float>::quiet_NaN();
    const Words pieces[3] = {load_piece<0>(from), load_piece<1>(from), load_piece<2>(from)};
    for (int i = 0; i < 16; ++i) {
      double sum = 0.0;
      for (const Words& piece : pieces) sum += to_float(BFloat16{static_cast<uint16_t>(piece[i])});
      const bool right = std::isnan(from[i])   ? std::isnan(sum)
                         : std::isinf(from[i]) ? sum == from[i]
                                               : std::abs(sum - from[i]) < std::numeric_limits<float>::min();
      expect(right, 1, 0, 0, 0, "pieces");
      if (std::abs(from[i]) > 1e-30f && std::isfinite(from[i])) expect(sum, from[i], 0, 0, 0, "exact pieces");
    }
  }
}

void run(Level level) {
  if (level == Level::base) check_pieces();
  run_wide_product(level);
}

const Family family("wide_product", run);

}  // namespace
