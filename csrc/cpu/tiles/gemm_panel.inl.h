// Products of rows with packed panels, written once over Vec and included inside each instruction set's namespace.
//
// A panel is a row of strips of WIDTH columns; a strip holds for each unit of D the WIDTH units that meet it. A tile of
// rows times one strip stays in registers over the whole of D: every unit of the rows is then read once from the
// first-level cache and every unit of the panel once from the second for as many multiplications as there are rows.

// Sums of a tile: 24 of 32 registers, or 12 of 16; the strip's vectors and the row's unit need up to four more.
constexpr int TILE_VECS = 3, TILE_ROWS = Vec::W == 16 ? 8 : 4;
constexpr int64_t WIDTH = TILE_VECS * Vec::W;

// Rows of bfloat16 are read as units where they lie, at any even address.
typedef float Unit __attribute__((may_alias, aligned(1)));

// What a unit holds: how to read Vec::W of them from row p of D numbers, from unit k on, and how to multiply.
template <class T>
struct Single {
    typedef T Number, Loaded;
    static constexpr int64_t IN_UNIT = 1;
    static inline __attribute__((always_inline)) Vec units(const T* p, int64_t k, int64_t D) {
        return D - k >= Vec::W ? load(p + k) : load_first(p + k, D - k, T{});
    }
    // Of Vec::W columns of (D, n), `count` of which are there, what meets unit k.
    static inline __attribute__((always_inline)) Vec turned(const T* p, int64_t stride, int64_t k, int64_t,
                                                            int64_t count) {
        return load_up_to(p + k * stride, count, T{});
    }
    static inline __attribute__((always_inline)) Vec fma_of(Vec x, Vec w, Vec c) { return fma(x, w, c); }
};

#ifdef FINF_PAIRS
struct Pairs {
    typedef Bf16 Number;
    typedef float Loaded;
    static constexpr int64_t IN_UNIT = 2;
    static inline __attribute__((always_inline)) Vec units(const Bf16* p, int64_t k, int64_t D) {
        if (D - 2 * k >= 2 * Vec::W) return load(reinterpret_cast<const float*>(p + 2 * k));
        alignas(64) Bf16 last[2 * Vec::W] = {};
        __builtin_memcpy(last, p + 2 * k, static_cast<size_t>(D - 2 * k) * sizeof(Bf16));
        return load(reinterpret_cast<const float*>(last));
    }
    static inline __attribute__((always_inline)) Vec turned(const Bf16* p, int64_t stride, int64_t k, int64_t D,
                                                            int64_t count) {
        const Vec first = load_up_to(p + 2 * k * stride, count, Bf16{});
        return pair_of(first, 2 * k + 1 < D ? load_up_to(p + (2 * k + 1) * stride, count, Bf16{}) : Vec(0.0f));
    }
    static inline __attribute__((always_inline)) Vec fma_of(Vec x, Vec w, Vec c) { return fma_of_pairs(x, w, c); }
};
#endif

// Vec::W columns of a strip, from unit k on. Of the rows of W, those past n count as zero; WHOLE: there are none, and
// all units are there.
template <class Units, bool WHOLE>
FINF_INLINE void pack_square(const typename Units::Number* W, int64_t stride, int64_t n, int64_t k, int64_t D,
                             const float* centre, float* strip) {
    Vec square[Vec::W];
    const Vec shift = centre ? Single<float>::units(centre, k, D) : Vec(0.0f);
    const int64_t units = (D + Units::IN_UNIT - 1) / Units::IN_UNIT - k;
#pragma GCC unroll 16
    for (int i = 0; i < Vec::W; ++i) {
        square[i] = Vec(0.0f);
        if (WHOLE)
            square[i] = load(reinterpret_cast<const typename Units::Loaded*>(W + i * stride + k * Units::IN_UNIT));
        if (!WHOLE && i < n) square[i] = Units::units(W + i * stride, k, D);
        if (Units::IN_UNIT == 1 && (WHOLE || i < n)) square[i] = square[i] - shift;
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < Vec::W; ++i)
        if (WHOLE || i < units) store(strip + (k + i) * WIDTH, square[i]);
}

// Asks memory for what is packed a few squares later: in the same rows, or in those of the next strip.
template <class Units>
FINF_INLINE void fetch_ahead(const typename Units::Number* W, int64_t stride, int64_t n, int64_t k, int64_t units) {
    constexpr int64_t AHEAD = 4 * Vec::W;
    if (k + AHEAD >= units) {
        W += WIDTH * stride;
        n -= WIDTH;
        k -= units;
    }
    for (int i = 0; i < Vec::W && i < n; ++i) __builtin_prefetch(W + i * stride + (k + AHEAD) * Units::IN_UNIT);
}

template <class Units>
void pack_panel(const void* W, int64_t stride, int64_t n, int64_t D, const float* centre, float* panel) {
    const typename Units::Number* from = static_cast<const typename Units::Number*>(W);
    const int64_t units = (D + Units::IN_UNIT - 1) / Units::IN_UNIT;
    for (int64_t column = 0; column < n; column += WIDTH)
        for (int64_t k = 0; k < units; k += Vec::W)
            for (int64_t j = column; j < column + WIDTH; j += Vec::W) {
                fetch_ahead<Units>(from + j * stride, stride, n - j, k, units);
                float* strip = panel + column * units + (j - column);
                if (n - j >= Vec::W && D - k * Units::IN_UNIT >= Vec::W * Units::IN_UNIT) {
                    pack_square<Units, true>(from + j * stride, stride, n - j, k, D, centre, strip);
                } else {
                    pack_square<Units, false>(from + j * stride, stride, n - j, k, D, centre, strip);
                }
            }
}

// Unit by unit over all strips, so that a row of W is read on.
template <class Units>
void pack_turned(const void* W, int64_t stride, int64_t n, int64_t D, float* panel) {
    const typename Units::Number* from = static_cast<const typename Units::Number*>(W);
    const int64_t units = (D + Units::IN_UNIT - 1) / Units::IN_UNIT, all = (n + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t k = 0; k < units; ++k)
        for (int64_t j = 0; j < all; j += Vec::W) {
            float* to = panel + j / WIDTH * WIDTH * units + k * WIDTH + j % WIDTH;
            store(to, n > j ? Units::turned(from + j, stride, k, D, n - j) : Vec(0.0f));
        }
}

template <class T>
void stage_row(const void* x, const void* dx, int64_t D, float* row) {
    for (int64_t k = 0; k < D; k += Vec::W) {
        Vec units = Single<T>::units(static_cast<const T*>(x), k, D);
        if (dx) units = units + Single<T>::units(static_cast<const T*>(dx), k, D);
        store(row + k, units);
    }
}

#ifdef FINF_PAIRS
void stage_pairs(const void* x, const void* dx, int64_t D, float* row) {
    Bf16* to = reinterpret_cast<Bf16*>(row);
    for (int64_t k = 0; k < D; k += Vec::W) {
        Vec sums = Single<Bf16>::units(static_cast<const Bf16*>(x), k, D);
        if (dx) sums = sums + Single<Bf16>::units(static_cast<const Bf16*>(dx), k, D);
        store_nearest(to + k, sums);
    }
}
#endif

// Units that are summed before the sum is added to those before: a single sum of 5,000 products is off by 3e-6.
constexpr int64_t SUMMED_UNITS = 512;

template <class Units, int VECS, int ROWS>
FINF_INLINE void multiply_some(const float* const* from, int64_t begin, int64_t end, const float* strip, float* out,
                               int64_t stride, bool add) {
    const Unit* rows[ROWS];
    Vec sums[ROWS][VECS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
        rows[i] = from[i];
#pragma GCC unroll 3
        for (int j = 0; j < VECS; ++j) sums[i][j] = Vec(0.0f);
    }
    for (int64_t k = begin; k < end; ++k) {
        Vec w[VECS];
#pragma GCC unroll 3
        for (int j = 0; j < VECS; ++j) w[j] = load(strip + k * WIDTH + j * Vec::W);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vec x(rows[i][k]);
#pragma GCC unroll 3
            for (int j = 0; j < VECS; ++j) sums[i][j] = Units::fma_of(x, w[j], sums[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < VECS; ++j) {
            float* to = out + i * stride + j * Vec::W;
            store(to, add ? load(to) + sums[i][j] : sums[i][j]);
        }
}

template <class Units, int VECS, int ROWS>
FINF_INLINE void multiply_tile(const float* const* rows, int64_t units, const float* strip, float* out, int64_t stride,
                               bool add) {
    int64_t k = 0;
    do {
        const int64_t end = units - k < 2 * SUMMED_UNITS ? units : k + SUMMED_UNITS;
        multiply_some<Units, VECS, ROWS>(rows, k, end, strip, out, stride, add || k > 0);
        k = end;
    } while (k < units);
}

// All rows by one strip: as many whole tiles as there are, then what is left of them by halves.
template <class Units, int VECS, int ROWS>
FINF_INLINE void multiply_strip(const float* const* rows, int64_t count, int64_t units, const float* strip, float* out,
                                int64_t stride, bool add) {
    for (; count >= ROWS; count -= ROWS, rows += ROWS, out += ROWS * stride)
        multiply_tile<Units, VECS, ROWS>(rows, units, strip, out, stride, add);
    if constexpr (ROWS > 1) multiply_strip<Units, VECS, ROWS / 2>(rows, count, units, strip, out, stride, add);
}

// The last strip by as many vectors as it has columns for.
template <class Units, int VECS = TILE_VECS>
void multiply_panel(const float* const* rows, int64_t count, int64_t units, const float* panel, int64_t columns,
                    float* out, int64_t stride, bool add) {
    int64_t column = 0;
    for (; column + (VECS - 1) * Vec::W < columns; column += WIDTH)
        multiply_strip<Units, VECS, TILE_ROWS>(rows, count, units, panel + column * units, out + column, stride, add);
    if constexpr (VECS > 1)
        if (column < columns)
            multiply_panel<Units, VECS - 1>(rows, count, units, panel + column * units, columns - column, out + column,
                                            stride, add);
}

template <class T>
void finish_row(const float* row, const float* shift, int64_t n, void* to) {
    each_vector(n, [&](int64_t v, int64_t count) FINF_LAMBDA {
        const Vec x = load(row + v);
        store_up_to(static_cast<T*>(to) + v, shift ? x + load_up_to(shift + v, count, 0.0f) : x, count);
    });
}

// Rows that share a strip in the first-level cache, whose logits then do too.
constexpr int64_t PANEL_GROUP = 8;

const finf::PanelLoops PANELS = {WIDTH,
                                 1,
                                 PANEL_GROUP,
                                 false,
                                 {pack_panel<Single<float>>, pack_panel<Single<Bf16>>},
                                 {pack_turned<Single<float>>, pack_turned<Single<Bf16>>},
                                 {stage_row<float>, stage_row<Bf16>},
                                 multiply_panel<Single<float>>,
                                 {finish_row<float>, finish_row<Bf16>}};
#ifdef FINF_PAIRS
const finf::PanelLoops PAIR_PANELS = {WIDTH,
                                      2,
                                      PANEL_GROUP,
                                      false,
                                      {nullptr, pack_panel<Pairs>},
                                      {nullptr, pack_turned<Pairs>},
                                      {nullptr, stage_pairs},
                                      multiply_panel<Pairs>,
                                      {nullptr, finish_row<Bf16>}};
#endif
