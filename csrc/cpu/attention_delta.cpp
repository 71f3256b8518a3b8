#include "attention_delta.h"

#include <algorithm>

#include "parallel.h"
#include "scratch.h"

namespace finf {
namespace {

// Tasks a thread: blocks of a causal row of tasks differ in work, and a task's room has to be made first.
constexpr int64_t TASKS_A_THREAD = 4;

void check_stack(const char* name, const HeadStack& stack, bool used) {
    require_memory(name, stack.first, used);
    for (int64_t stride : {stack.stride_q, stack.stride_b, stack.stride_h, stack.stride_t}) require_size(name, stride);
}

void check_segments(const Attention& op) {
    if (!op.cu_seqlens) return;
    require_size("S", op.S, 1);
    require(op.T == op.Tk, "cu_seqlens", "as many keys as rows", op.Tk);
    require(op.cu_seqlens[0] == 0, "cu_seqlens", "0 at first", op.cu_seqlens[0]);
    for (int64_t i = 0; i < op.S; ++i)
        require(op.cu_seqlens[i] <= op.cu_seqlens[i + 1], "cu_seqlens", "no smaller number after a larger",
                op.cu_seqlens[i + 1]);
    require(op.cu_seqlens[op.S] == op.T, "cu_seqlens", "T at the end", op.cu_seqlens[op.S]);
}

void check(const Attention& op, int64_t threads) {
    require_size("Q", op.Q);
    require_size("B", op.B);
    require_size("H", op.H);
    require_size("Hk", op.Hk, op.H > 0 ? 1 : 0);
    require_size("T", op.T);
    require_size("Tk", op.Tk);
    require_size("E", op.E);
    require_size("Ev", op.Ev);
    require_size("threads", threads, 1);
    require(op.H == 0 || op.H % op.Hk == 0, "Hk", "a divisor of H", op.Hk);
    require(op.softcap >= 0, "softcap", "0 for none, or a number above 0", op.softcap);
    require(op.q.moves || op.k.moves || op.v.moves || op.Q == 0, "Q", "0 where nothing moves", op.Q);
    const bool rows = op.B * op.H * op.T > 0, keys = op.B * op.Hk * op.Tk > 0;
    check_stack("q", op.q, rows && op.E > 0);
    check_stack("k", op.k, keys && op.E > 0);
    check_stack("v", op.v, keys && op.Ev > 0);
    require_memory("y", op.y, rows && op.Ev > 0);
    check_segments(op);
}

}  // namespace

void attention_delta(const Attention& op, DType dtype, int64_t threads) {
    check(op, threads);
    const AttentionLoops& loops = kernels().attention_delta[static_cast<int>(dtype)];
    const int64_t blocks = op.Ev > 0 ? op.B * op.H * attention_blocks(op) : 0;
    const int64_t tasks = std::min(blocks, threads == 1 ? 1 : threads * TASKS_A_THREAD);
    parallel_for(tasks, threads, [&](int64_t task) {
        Scratch room(loops.room(op));
        loops.attend(op, blocks * task / tasks, blocks * (task + 1) / tasks, room.data());
    });
}

}  // namespace finf
