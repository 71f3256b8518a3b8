// A product of matrices that lie in cache, its sums in registers. Included inside an instruction set's namespace.
//
//     out(i, lane) = sum over the terms and their k of a(i, k) b(k, lane)
//
// A lane is a column of b and of `out`, whose rows are `ld` numbers apart, a whole number of vectors; a is spread over
// the lanes number by number, so that it may lie as it comes.
#pragma once

// Rows and vectors of the sums held at a time. Sixteen sums hide an FMA's latency, eight are what sixteen registers
// leave room for; each number of a serves WIDE sums and each vector of b TALL of them.
constexpr int TALL = 4, WIDE = Vec::W == 16 ? 4 : 2;

struct Term {
    const float *a, *b;
    int64_t count;  // of k
};

// How a lies: a(i, k) is a[i lda + k], or a[k lda + i].
enum class Lies { rows, columns };

template <Lies A, int VECTORS>
FINF_INLINE void add_term(const Term& term, int64_t lda, int64_t ld, Vec (&sums)[TALL][VECTORS]) {
    const float *a = term.a, *b = term.b;
    for (int64_t k = 0; k < term.count; ++k, b += ld, a += A == Lies::rows ? 1 : lda) {
        Vec x[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) x[j] = load(b + j * Vec::W);
#pragma GCC unroll 4
        for (int i = 0; i < TALL; ++i) {
            const Vec y(A == Lies::rows ? a[i * lda] : a[i]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) sums[i][j] = fma(y, x[j], sums[i][j]);
        }
    }
}

// TALL rows of `out` by VECTORS vectors; ADD adds to what is there, in one addition, which keeps long sums exact.
template <Lies A, bool ADD, int VECTORS>
void product_tile(const Term* terms, int count, int64_t lda, int64_t ld, float* out) {
    Vec sums[TALL][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sums[i][j] = Vec(0.0f);
    for (int t = 0; t < count; ++t) add_term<A>(terms[t], lda, ld, sums);
#pragma GCC unroll 4
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            float* at = out + i * ld + j * Vec::W;
            store(at, ADD ? load(at) + sums[i][j] : sums[i][j]);
        }
}

// TALL rows of `out`, lanes [begin, end).
template <Lies A, bool ADD>
FINF_INLINE void product_rows(const Term* terms, int count, int64_t lda, int64_t ld, int64_t begin, int64_t end,
                              float* out) {
    for (int64_t lane = begin; lane < end;) {
        Term at[2];
        for (int t = 0; t < count; ++t) at[t] = {terms[t].a, terms[t].b + lane, terms[t].count};
        const int64_t left = (end - lane) / Vec::W;
        if (left >= WIDE) {
            product_tile<A, ADD, WIDE>(at, count, lda, ld, out + lane);
            lane += WIDE * Vec::W;
        } else if (left >= 2) {
            product_tile<A, ADD, 2>(at, count, lda, ld, out + lane);
            lane += 2 * Vec::W;
        } else {
            product_tile<A, ADD, 1>(at, count, lda, ld, out + lane);
            lane += Vec::W;
        }
    }
}
