#include "noise.h"

#include <algorithm>

#include "../check.h"
#include "isa/kernels.h"
#include "pages.h"
#include "parallel.h"

namespace finf {
namespace {

// Numbers of a task, about 30 microseconds; a whole number of blocks of four.
constexpr int64_t TASK_NUMBERS = 1 << 15;
// Positions that a block's 31 bits can count.
constexpr int64_t MOST_NUMBERS = int64_t{1} << 33;

void check(const Noise& op) {
    require_size("S", op.S);
    require_size("M", op.M);
    require(op.M <= MOST_NUMBERS, "M", "at most 2^33", op.M);
    require_size("threads", op.threads, 1);
    require_memory("samples", op.samples, op.S > 0);
    require_memory("out", op.out, op.S > 0 && op.M > 0);
}

}  // namespace

void noise(const Noise& op) {
    check(op);
    expect_writing(op.out, op.S * op.M * static_cast<int64_t>(sizeof(float)));
    const int64_t pieces = (op.M + TASK_NUMBERS - 1) / TASK_NUMBERS;  // of a sample, or some samples of one piece
    const int64_t rows = pieces > 1 ? 1 : TASK_NUMBERS / std::max<int64_t>(1, op.M);
    const int64_t groups = (op.S + rows - 1) / rows;
    parallel_for(groups * pieces, op.threads, [&](int64_t task) {
        const int64_t first = task / pieces * rows, begin = task % pieces * TASK_NUMBERS;
        const int64_t count = std::min(TASK_NUMBERS, op.M - begin);
        for (int64_t s = first; s < std::min(op.S, first + rows); ++s) {
            const uint64_t sample = static_cast<uint64_t>(op.samples[s]);
            kernels().noise_row(op.seed, sample, op.draw, begin / 4, count, op.out + s * op.M + begin);
        }
    });
}

}  // namespace finf
