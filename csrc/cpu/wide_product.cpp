#include "../wide_product.h"

#include <memory>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (__GNUC__ >= 11 || defined(__clang__))
#define PEFTK_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftk {
namespace {

PEFTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sixteen words, floats or bfloat16 numbers.
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Line __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

// Transpose 16 x 16 words. Shuffling the rows like cards turns the eight bits of a place, (row, column), by one.
PEFTK_INLINE void transpose(uint32_t* words) {
  Words rows[kTileLines], mixed[kTileLines];
  for (int i = 0; i < 16; ++i) rows[i] = reinterpret_cast<const Words*>(words)[i];
  for (int turn = 0; turn < 4; ++turn) {
    for (int i = 0; i < 8; ++i) {
      const Words a = rows[i], b = rows[i + 8];
      mixed[2 * i] = PEFTK_SHUFFLE(Words, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] = PEFTK_SHUFFLE(Words, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < 16; ++i) reinterpret_cast<Words*>(words)[i] = rows[i];
}

PEFTK_INLINE Words even_of(Words a, Words b) {
  return PEFTK_SHUFFLE(Words, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

PEFTK_INLINE Words odd_of(Words a, Words b) {
  return PEFTK_SHUFFLE(Words, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// A piece of sixteen numbers, as bits of bfloat16 in the lower half of each word.
template <int kPiece>
PEFTK_INLINE Words load_piece(const BFloat16* from) {
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
}

// Each piece is what the one before has left, cut off after eight bits: three hold all 24. What is not finite is a
// first piece alone.
template <int kPiece>
PEFTK_INLINE Words load_piece(const float* from) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  Words bits = *reinterpret_cast<const Words*>(from);
  const Words magnitude = bits & 0x7fffffffu;
  // A NaN keeps its upper bits and stays a NaN.
  if constexpr (kPiece == 0) return bits >> 16 | ((Words)(magnitude > kInfinity) & 0x40u);
  const Words finite = (Words)(magnitude < kInfinity);
  for (int piece = 0; piece < kPiece; ++piece) bits = (Words)((Line)bits - (Line)(bits & 0xffff0000u));
  return bits >> 16 & finite;
}

// A piece of a whole tile. Where lines touch, a word of a row holds the two numbers of a line; else one of two lines.
template <int kPiece, typename T>
PEFTK_INLINE void pack_piece(const T* from, bool lines_touch, int64_t ld, bool left, uint32_t* to) {
  for (int64_t i = 0; i < 16; ++i) {
    const T* row = from + (lines_touch ? 2 * i : i) * ld;
    const Words a = load_piece<kPiece>(row), b = load_piece<kPiece>(row + (lines_touch ? ld : 16));
    reinterpret_cast<Words*>(to)[i] = lines_touch ? a | b << 16 : even_of(a, b) | odd_of(a, b) << 16;
  }
  if (lines_touch == left) transpose(to);
}

// Numbers beyond `lines` and `depth` are zeros.
template <typename T>
PEFTK_INLINE void pack_tile(const T* from, bool lines_touch, int64_t ld, int64_t lines, int64_t depth, bool left,
                            uint32_t* to) {
  T whole[kTileLines * kTileDepth];
  if (lines < kTileLines || depth < kTileDepth) {
    const int64_t rows = lines_touch ? depth : lines, columns = lines_touch ? lines : depth;
    const int64_t width = lines_touch ? kTileLines : kTileDepth;
    std::memset(static_cast<void*>(whole), 0, sizeof whole);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(whole + i * width, from + i * ld, columns * sizeof(T));
    from = whole, ld = width;
  }
  pack_piece<0>(from, lines_touch, ld, left, to);
  if constexpr (sizeof(T) == sizeof(float)) {
    pack_piece<1>(from, lines_touch, ld, left, to + kTileWords);
    pack_piece<2>(from, lines_touch, ld, left, to + 2 * kTileWords);
  }
}

// Some blocks of lines side by side: where lines touch, each row of them is read in one piece.
template <typename T, bool kLinesTouch>
PEFTK_INLINE void pack_blocks(const WideOperand& o, const WideProductParams& p, bool left, uint32_t* to, int64_t begin,
                              int64_t end) {
  const int64_t size = o.pieces() * kTileWords, ld = kLinesTouch ? o.step : o.line;
  for (int64_t group = begin; group < end; group += kTaskColumns)
    for (int64_t k = 0; k < p.depth; k += kTileDepth)
      for (int64_t block = group; block < smaller(group + kTaskColumns, end); ++block) {
        const int64_t lines = smaller(kTileLines, o.lines - block * kTileLines);
        const int64_t depth = smaller(kTileDepth, p.depth - k);
        const T* from = static_cast<const T*>(o.data) + block * kTileLines * o.line + (p.first + k) * o.step;
        uint32_t* tile = to + o.words(block - begin, p.depth) + k / kTileDepth * size;
        pack_tile(from, kLinesTouch, ld, lines, depth, left, tile);
      }
}

PEFTK_INLINE void pack_wide_cpu_body(const WideProductParams& p, bool left, uint32_t* to, int64_t begin, int64_t end) {
  const WideOperand& o = left ? p.left : p.right;
  if (o.dtype == Dtype::float32)
    o.line == 1 ? pack_blocks<float, true>(o, p, left, to, begin, end)
                : pack_blocks<float, false>(o, p, left, to, begin, end);
  else
    o.line == 1 ? pack_blocks<BFloat16, true>(o, p, left, to, begin, end)
                : pack_blocks<BFloat16, false>(o, p, left, to, begin, end);
}

// What is multiplied at once: up to two blocks of rows by two of columns. Steps are in bytes: those from a row of a
// tile to the next, from a tile to the next in depth, and from a block to the next.
struct Side {
  const char* data;
  int64_t row, tile, block, pieces;
};

struct Corner {
  Side left, right;
  int64_t depth_blocks;
};

constexpr int kCorner = 2;
constexpr int64_t kTileBytes = 4 * kTileWords;

// sums (kCorner, kCorner, 16, 16); blocks that are not there are left as they are.
PEFTK_INLINE void multiply_plain(const Corner& at, int64_t rows, int64_t columns, float* sums) {
  const auto& [left, right, depth_blocks] = at;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      float* sum = sums + (r * kCorner + c) * kTileWords;
      for (int64_t i = 0; i < kTileWords; ++i) sum[i] = 0.0f;
      for (int64_t step = 0; step < depth_blocks * left.pieces * right.pieces; ++step) {
        // At most one operand has several pieces, which lie behind one another as tiles do.
        const int64_t at_left = left.pieces > 1 ? step * kTileBytes : step / right.pieces * left.tile;
        const int64_t at_right = right.pieces > 1 ? step * kTileBytes : step / left.pieces * right.tile;
        const char* a = left.data + r * left.block + at_left;
        const uint32_t* b = reinterpret_cast<const uint32_t*>(right.data + c * right.block + at_right);
        for (int64_t i = 0; i < 16; ++i)
          for (int64_t pair = 0; pair < 16; ++pair) {
            BFloat16 numbers[2];
            std::memcpy(numbers, a + i * left.row + 4 * pair, sizeof numbers);
            const float even = to_float(numbers[0]), odd = to_float(numbers[1]);
            for (int64_t j = 0; j < 16; ++j) {
              const uint32_t word = b[16 * pair + j];
              sum[16 * i + j] += odd * to_float(BFloat16{static_cast<uint16_t>(word >> 16)});
              sum[16 * i + j] += even * to_float(BFloat16{static_cast<uint16_t>(word)});
            }
          }
      }
    }
}

#ifdef PEFTK_AMX
#define PEFTK_TILES __attribute__((target("amx-tile,amx-bf16")))

struct alignas(64) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Eight tiles of 16 rows of 64 bytes. A constant: a compiler may think that only a part of it is read.
constexpr TileConfig kTiles{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

PEFTK_TILES void open_tiles() { _tile_loadconfig(&kTiles); }

PEFTK_TILES void close_tiles() { _tile_release(); }

template <int kRows, int kColumns>
PEFTK_TILES void multiply_tiles(const Corner& at, float* sums) {
  constexpr int kLine = 64;
  _tile_zero(0);
  if constexpr (kColumns == 2) _tile_zero(1);
  if constexpr (kRows == 2) _tile_zero(2);
  if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  const auto& [left, right, depth_blocks] = at;
  // At most one operand has several pieces.
  const int64_t left_piece = left.pieces > 1 ? kTileBytes : 0, right_piece = right.pieces > 1 ? kTileBytes : 0;
  const char *a = left.data, *b = right.data;
  for (int64_t k = 0; k < depth_blocks; ++k, a += left.tile, b += right.tile)
    for (int64_t piece = 0; piece < left.pieces * right.pieces; ++piece) {
      const char *from_left = a + piece * left_piece, *from_right = b + piece * right_piece;
      const bool next = piece == 0 || right.pieces > 1;
      _tile_loadd(4, from_left, left.row);
      if (next) _tile_loadd(6, from_right, kLine);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns == 2) {
        if (next) _tile_loadd(7, from_right + right.block, kLine);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kRows == 2) {
        _tile_loadd(5, from_left + left.block, left.row);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, sums, kLine);
  if constexpr (kColumns == 2) _tile_stored(1, sums + kTileWords, kLine);
  if constexpr (kRows == 2) _tile_stored(2, sums + 2 * kTileWords, kLine);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, sums + 3 * kTileWords, kLine);
}

void multiply(const Corner& at, int64_t rows, int64_t columns, float* sums) {
  if (rows == 2)
    columns == 2 ? multiply_tiles<2, 2>(at, sums) : multiply_tiles<2, 1>(at, sums);
  else
    columns == 2 ? multiply_tiles<1, 2>(at, sums) : multiply_tiles<1, 1>(at, sums);
}
#else
void open_tiles() {}
void close_tiles() {}
void multiply(const Corner&, int64_t, int64_t, float*) {}
#endif

// Write a tile of sums, or add it onto what is there.
PEFTK_INLINE void write_tile(const WideProductParams& p, int64_t row, int64_t column, float* sums) {
  int64_t rows = smaller(kTileLines, p.left.lines - row), columns = smaller(kTileLines, p.right.lines - column);
  int64_t ld = p.row;
  const bool add = p.first > 0;
  float* to = p.out + row * p.row + column * p.column;
  if (p.column != 1) {
    transpose(reinterpret_cast<uint32_t*>(sums));
    const int64_t kept = rows;
    rows = columns, columns = kept, ld = p.column;
  }
  if (columns == kTileLines) {
    for (int64_t i = 0; i < rows; ++i) {
      const Line sum = reinterpret_cast<const Line*>(sums)[i];
      Line* line = reinterpret_cast<Line*>(to + i * ld);
      *line = add ? *line + sum : sum;
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * ld + j] = (add ? to[i * ld + j] : 0.0f) + sums[16 * i + j];
}

// A packed operand, or the left one as it lies.
PEFTK_INLINE Side side(const WideOperand& o, const WideProductParams& p, const uint32_t* packed) {
  const int64_t pieces = o.pieces();
  if (packed) return {reinterpret_cast<const char*>(packed), 64, pieces * kTileBytes, 4 * o.words(1, p.depth), pieces};
  return {static_cast<const char*>(o.data) + 2 * p.first, 2 * o.line, 2 * kTileDepth, 2 * kTileLines * o.line, 1};
}

PEFTK_INLINE void wide_product_cpu_body(const WideProductParams& p, int64_t begin, int64_t end) {
  alignas(64) float sums[kCorner * kCorner * kTileWords];
  const int64_t row_blocks = tiles_of(p.left.lines, kTileLines), column_blocks = tiles_of(p.right.lines, kTileLines);
  const int64_t wide = task_columns(p), across = tiles_of(column_blocks, wide);
  const std::unique_ptr<TileRow[]> lines(new TileRow[p.right.words(wide, p.depth) / 16]);
  uint32_t* packed = lines[0].words;
  const Side left = side(p.left, p, p.packed), right = side(p.right, p, packed);
  if (p.instructions) open_tiles();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t top = task / across * kTaskRows, bottom = smaller(top + kTaskRows, row_blocks);
    const int64_t start = task % across * wide, stop = smaller(start + wide, column_blocks);
    pack_wide_cpu(p, false, packed, start, stop);
    for (int64_t j = start; j < stop; j += kCorner)
      for (int64_t i = top; i < bottom; i += kCorner) {
        const int64_t rows = smaller(kCorner, bottom - i), columns = smaller(kCorner, stop - j);
        Corner at{left, right, tiles_of(p.depth, kTileDepth)};
        at.left.data += i * left.block;
        at.right.data += (j - start) * right.block;
        if (p.instructions)
          multiply(at, rows, columns, sums);
        else
          multiply_plain(at, rows, columns, sums);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c)
            write_tile(p, (i + r) * kTileLines, (j + c) * kTileLines, sums + (r * kCorner + c) * kTileWords);
      }
  }
  if (p.instructions) close_tiles();
}

}  // namespace

PEFTK_KERNEL(pack_wide_cpu, (const WideProductParams& p, bool left, uint32_t* to, int64_t begin, int64_t end),
             (p, left, to, begin, end))
PEFTK_KERNEL(wide_product_cpu, (const WideProductParams& p, int64_t begin, int64_t end), (p, begin, end))

bool wide_instructions() {
#ifdef PEFTK_AMX
  static const bool found = [] {
    constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kAskForState = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
    // Linux keeps the tiles of a process that has asked for them, as torch does before its own products.
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace peftk
