// Products of rows of pairs with packed panels by AMX, whose tiles hold sixteen rows of 64 bytes: sixteen units of
// sixteen rows, or of the strip's columns what meets sixteen units, as gemm_panel.inl.h packs them. Included after it.
//
// Two tiles of rows times two of columns: each that is loaded is multiplied twice, which is what the caches can bring.
// The instructions are written as bytes, for assemblers older than they; choose.cpp asks whether there are any.

constexpr int64_t TILE = 16, TILE_GROUP = 2 * TILE;
static_assert(TILE_GROUP <= finf::MOST_GROUP && TILE == Vec::W, "rows of a product, columns of a tile");

// Units after which the sums are put aside and those of the next columns taken up: the rows' part of so many stays in
// the first-level cache.
constexpr int64_t TILE_UNITS = 8 * TILE;

// What LDTILECFG takes: of each tile its rows, and the bytes of one.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    // A tile that has no row must have no byte.
    void set(int tile, int64_t count, int64_t units) {
        if (count == 0 || units == 0) return;
        rows[tile] = static_cast<uint8_t>(count);
        bytes[tile] = static_cast<uint16_t>(units * sizeof(float));
    }
};

// Sums are tiles 0 and 1 of the upper rows, 2 and 3 of the lower; rows 4 and 5; columns 6 and 7.
FINF_INLINE void shape_tiles(int64_t count, int64_t units) {
    const int64_t upper = count < TILE ? count : TILE, lower = count - upper;
    TileShapes shapes;
    for (int i = 0; i < 4; ++i) shapes.set(i, i < 2 ? upper : lower, TILE);
    for (int i = 4; i < 6; ++i) shapes.set(i, i < 5 ? upper : lower, units);
    for (int i = 6; i < 8; ++i) shapes.set(i, units, TILE);
    __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" : : "a"(&shapes), "m"(shapes));  // ldtilecfg (%rax)
}

FINF_INLINE void release_tiles() {
    __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0");  // tilerelease
}
template <int AT>
FINF_INLINE void tile_zero() {
    __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, %c0" : : "i"(0xc0 | AT << 3));  // tilezero
}
template <int AT>
FINF_INLINE void tile_load(const void* from, int64_t bytes) {  // tileloadd (%rax,%rcx)
    __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, %c2, 0x08"
                     :
                     : "a"(from), "c"(bytes), "i"(0x04 | AT << 3)
                     : "memory");
}
template <int AT>
FINF_INLINE void tile_store(float* to, int64_t bytes) {  // tilestored (%rax,%rcx)
    __asm__ volatile(".byte 0xc4, 0xe2, 0x7a, 0x4b, %c2, 0x08" : : "a"(to), "c"(bytes), "i"(0x04 | AT << 3) : "memory");
}
template <int SUMS, int ROWS, int COLUMNS>
FINF_INLINE void tile_multiply() {  // tdpbf16ps
    __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1"
                     :
                     : "i"((~COLUMNS & 15) << 3 | 2), "i"(0xc0 | SUMS << 3 | ROWS));
}

// A square of sums (rows, `bytes` from one to the next): one or two tiles of rows by one or two of columns.
template <bool LOWER, bool SECOND>
struct TileSquare {
    float* out;
    int64_t bytes;

    FINF_MEMBER float* below() const { return out + TILE * bytes / static_cast<int64_t>(sizeof(float)); }

    FINF_MEMBER void zero() const {
        tile_zero<0>();
        if (SECOND) tile_zero<1>();
        if (LOWER) tile_zero<2>();
        if (LOWER && SECOND) tile_zero<3>();
    }

    FINF_MEMBER void load() const {
        tile_load<0>(out, bytes);
        if (SECOND) tile_load<1>(out + TILE, bytes);
        if (LOWER) tile_load<2>(below(), bytes);
        if (LOWER && SECOND) tile_load<3>(below() + TILE, bytes);
    }

    // Rows of units, `apart` bytes from one to the next, times columns whose units are `strip` numbers apart.
    FINF_MEMBER void add(const char* rows, int64_t apart, const float* first, const float* second, int64_t strip,
                         int64_t units) const {
        constexpr int64_t UNIT = sizeof(float);
        for (int64_t k = 0; k < units; k += TILE) {
            tile_load<4>(rows + k * UNIT, apart);
            tile_load<6>(first + k * strip, strip * UNIT);
            tile_multiply<0, 4, 6>();
            if (SECOND) tile_load<7>(second + k * strip, strip * UNIT);
            if (SECOND) tile_multiply<1, 4, 7>();
            if (LOWER) tile_load<5>(rows + k * UNIT + TILE * apart, apart);
            if (LOWER) tile_multiply<2, 5, 6>();
            if (LOWER && SECOND) tile_multiply<3, 5, 7>();
        }
    }

    FINF_MEMBER void store() const {
        tile_store<0>(out, bytes);
        if (SECOND) tile_store<1>(out + TILE, bytes);
        if (LOWER) tile_store<2>(below(), bytes);
        if (LOWER && SECOND) tile_store<3>(below() + TILE, bytes);
    }
};

template <bool LOWER, bool SECOND>
FINF_INLINE void multiply_square(const char* rows, int64_t apart, int64_t units, const float* first,
                                 const float* second, float* out, int64_t stride, bool add) {
    const TileSquare<LOWER, SECOND> square = {out, stride * static_cast<int64_t>(sizeof(float))};
    if (add) {
        square.load();
    } else {
        square.zero();
    }
    square.add(rows, apart, first, second, WIDTH, units);
    square.store();
}

// Some units of all rows times these of all columns; `panel` lies at the first of them, and has `depth` units.
template <bool LOWER>
void multiply_tile_rows(const char* rows, int64_t apart, int64_t units, const float* panel, int64_t depth,
                        int64_t columns, float* out, int64_t stride, bool add) {
    const auto at = [&](int64_t column) { return panel + column / WIDTH * WIDTH * depth + column % WIDTH; };
    int64_t column = 0;
    for (; column + TILE < columns; column += 2 * TILE)
        multiply_square<LOWER, true>(rows, apart, units, at(column), at(column + TILE), out + column, stride, add);
    if (column < columns)
        multiply_square<LOWER, false>(rows, apart, units, at(column), nullptr, out + column, stride, add);
}

// Rows as far from one another each. The units that fill no tile come last, in tiles of their own shape.
void multiply_tiles(const float* const* rows, int64_t count, int64_t units, const float* panel, int64_t columns,
                    float* out, int64_t stride, bool add) {
    const char* first = reinterpret_cast<const char*>(rows[0]);
    const int64_t apart = count > 1 ? reinterpret_cast<const char*>(rows[1]) - first : 0;
    int64_t k = 0, shaped = -1;
    do {
        const int64_t left = units - k, some = left < TILE ? left : left < TILE_UNITS ? left / TILE * TILE : TILE_UNITS;
        const int64_t deep = some < TILE ? some : TILE;
        if (deep != shaped) shape_tiles(count, shaped = deep);
        const auto multiply = count > TILE ? multiply_tile_rows<true> : multiply_tile_rows<false>;
        multiply(first + k * static_cast<int64_t>(sizeof(float)), apart, some, panel + k * WIDTH, units, columns, out,
                 stride, add || k > 0);
        k += some;
    } while (k < units);
    release_tiles();  // other users of the thread's tiles find none configured
}

// As flops_of_fma, with products of tiles for those of pairs, of numbers as they come.
double flops_of_tiles(bool pairs, int64_t rounds) {
    if (!pairs) return flops_of_fma(false, rounds);
    uint16_t numbers[4 * TILE * TILE];
    for (uint32_t i = 0, bits = 1; i < 4 * TILE * TILE; ++i, bits = bits * 1664525u + 1013904223u)
        numbers[i] = static_cast<uint16_t>((bits >> 16 & 0x80ff) | 0x3f00);  // of either sign, 0.5 to 2
    constexpr int64_t LINE = TILE * sizeof(float);
    shape_tiles(TILE_GROUP, TILE);
    tile_load<4>(numbers, LINE);
    tile_load<5>(numbers + 16, LINE);
    tile_load<6>(numbers + 2 * TILE * TILE, LINE);
    tile_load<7>(numbers + TILE * TILE, LINE);
    const int64_t squares = rounds / 4;
    for (int64_t i = 0; i < squares; ++i) {
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 4, 7>();
        tile_multiply<2, 5, 6>();
        tile_multiply<3, 5, 7>();
    }
    release_tiles();
    return static_cast<double>(squares) * 4 * (TILE * TILE * TILE * 4);
}

const finf::PanelLoops TILE_PANELS = {WIDTH,
                                      2,
                                      TILE_GROUP,
                                      true,
                                      {nullptr, pack_panel<Pairs>},
                                      {nullptr, pack_turned<Pairs>},
                                      {nullptr, stage_pairs},
                                      multiply_tiles,
                                      {nullptr, finish_row<Bf16>}};
