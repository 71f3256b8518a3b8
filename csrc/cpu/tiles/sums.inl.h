// Sums along a row, several at a time. Included inside an instruction set's namespace.
#pragma once

// Numbers summed in float32, and partial sums side by side: they hide an addition's latency and shorten each sum.
constexpr int64_t SUMMED = 2048;
constexpr int SUMS = 4;

struct Totals {
    double a, b, c;
};

FINF_INLINE float joined(const Vec (&part)[SUMS]) { return sum((part[0] + part[1]) + (part[2] + part[3])); }

// Three sums over [0, D) at a time: add(v, count, a, b, c) adds to parts of them what the numbers from v on bring, a
// vector of which `count` are there.
template <class Add>
FINF_INLINE Totals sums(int64_t D, Add add) {
    Totals total = {0, 0, 0};
    for (int64_t start = 0; start < D; start += SUMMED) {
        const int64_t end = D - start < SUMMED ? D : start + SUMMED;
        Vec a[SUMS], b[SUMS], c[SUMS];
        for (int k = 0; k < SUMS; ++k) a[k] = b[k] = c[k] = Vec(0.0f);
        int64_t v = start;
        for (; v + SUMS * Vec::W <= end; v += SUMS * Vec::W)
            for (int k = 0; k < SUMS; ++k) add(v + k * Vec::W, int64_t{Vec::W}, a[k], b[k], c[k]);
        for (; v < end; v += Vec::W) add(v, end - v, a[0], b[0], c[0]);
        total = {total.a + joined(a), total.b + joined(b), total.c + joined(c)};
    }
    return total;
}
