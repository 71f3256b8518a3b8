// The loop of activation_delta, written once over Vec and included inside each instruction set's namespace.
//
// The numbers of a stack are taken in blocks: a block of values once, with what all its changes share left in buffers
// of the first-level cache, then the same block of every change.
#pragma once

#include "activations.inl.h"
#include "elements.inl.h"

// Numbers of a block: its six buffers are 24 KiB of a first-level cache of 32 or 48. The next block of every row is
// fetched meanwhile. Measured (Zen 5, 100 MB) against fetching those of the changes alone: 3 to 14 % faster, 35 %
// gated.
constexpr int64_t ACTIVATED = 1024;

struct ActivationBuffers {
    alignas(64) float f[ACTIVATED], c1[ACTIVATED], c2[ACTIVATED], c3[ACTIVATED], c4[ACTIVATED], bend[ACTIVATED];

    // As much as a change of F, and of a gate, reads.
    template <class F>
    FINF_MEMBER void keep(int64_t v, const Prepared& p, bool gated) {
        if (gated) store(f + v, p.f);
        store(c1 + v, p.c1);
        store(c2 + v, p.c2);
        if (F::TERMS > 2) store(c3 + v, p.c3);
        if (F::TERMS > 3) store(c4 + v, p.c4);
        if (F::BENDS) store(bend + v, p.bend);
    }
    FINF_MEMBER Prepared at(int64_t v) const {
        return {load(f + v), load(c1 + v), load(c2 + v), load(c3 + v), load(c4 + v), load(bend + v)};
    }
};

// Which rows a block of the gate brings: none, its value alone, or a change too.
enum class Gate { none, still, moves };

template <class T>
struct Block {
    const T *x0, *x, *gate0, *gate;  // value and change; null where there is none
    Result<T> y;
    int64_t count;
};

// In two passes: a processor sees only so many instructions ahead, and the chain from a number over its exponential to
// its series would leave it idle (Zen 5: 27 cycles a vector of silu instead of 40).
template <class F, class T>
FINF_INLINE void write_values(const Block<T>& block, ActivationBuffers& room) {
    each_vector(block.count, [&](int64_t v, int64_t count) FINF_LAMBDA {
        fetch(block.x0 + v, ACTIVATED);
        if (block.gate0) fetch(block.gate0 + v, ACTIVATED);
        const Core core = F::core(load_up_to(block.x0 + v, count, T{}));
        store(room.c1 + v, core.up);
        store(room.c2 + v, core.down);
    });
    each_vector(block.count, [&](int64_t v, int64_t count) FINF_LAMBDA {
        const Core core = {load(room.c1 + v), load(room.c2 + v)};
        const Prepared p = F::of(load_up_to(block.x0 + v, count, T{}), core);
        room.keep<F>(v, p, block.gate0 != nullptr);
        put(block.y, v, block.gate0 ? p.f * load_up_to(block.gate0 + v, count, T{}) : p.f, count);
    });
}

template <class F, Gate GATE, class T>
FINF_INLINE void write_changes(const Block<T>& block, const ActivationBuffers& room) {
    each_vector(block.count, [&](int64_t v, int64_t count) FINF_LAMBDA {
        fetch(block.x + v, ACTIVATED);
        if (GATE == Gate::moves) fetch(block.gate + v, ACTIVATED);
        const Prepared p = room.at(v);
        const Vec d = load_up_to(block.x + v, count, T{});
        Vec change = F::by_series(p, d);
        const Vec reach = F::BENDS ? abs(d) * p.bend : abs(d);
        if (!all_at_most(reach, Vec(F::REACH)))
            change = mended<F>(change, reach, load_up_to(block.x0 + v, count, T{}), d);
        const Vec after = p.f + change;
        if (GATE != Gate::none) change = change * load_up_to(block.gate0 + v, count, T{});
        if (GATE == Gate::moves) change = fma(after, load_up_to(block.gate + v, count, T{}), change);
        put(block.y, v, change, count);
    });
}

// Only the gate moves.
template <class T>
FINF_INLINE void write_gated(const Block<T>& block, const ActivationBuffers& room) {
    each_vector(block.count, [&](int64_t v, int64_t count) FINF_LAMBDA {
        fetch(block.gate + v, ACTIVATED);
        put(block.y, v, load(room.f + v) * load_up_to(block.gate + v, count, T{}), count);
    });
}

template <class T>
FINF_INLINE Block<T> block_of(const ActivationRows& op, int64_t k, int64_t begin, int64_t count) {
    const T *x = static_cast<const T*>(op.x) + begin, *gate = static_cast<const T*>(op.gate);
    return {x,
            k == 0 || op.x_moves ? x + k * op.x_stride_q : nullptr,
            gate ? gate + begin : nullptr,
            gate && op.gate_moves ? gate + k * op.gate_stride_q + begin : nullptr,
            {static_cast<T*>(op.y) + k * op.M + begin, op.past_cache},
            count};
}

// Numbers [begin, end) of every row.
template <class F, class T>
void activate(const ActivationRows& op, int64_t begin, int64_t end) {
    ActivationBuffers room;
    for (int64_t v = begin; v < end; v += ACTIVATED)
        for (int64_t k = 0; k <= op.Q; ++k) {
            const Block<T> block = block_of<T>(op, k, v, end - v < ACTIVATED ? end - v : ACTIVATED);
            if (k == 0) {
                write_values<F>(block, room);
            } else if (!block.x) {
                write_gated(block, room);
            } else if (block.gate) {
                write_changes<F, Gate::moves>(block, room);
            } else if (block.gate0) {
                write_changes<F, Gate::still>(block, room);
            } else {
                write_changes<F, Gate::none>(block, room);
            }
        }
    if (op.past_cache) fence();
}

// In the order of ACTIVATIONS in kernels.h.
template <class Half>
void (*const ACTIVATE[][2])(const ActivationRows&, int64_t, int64_t) = {
    {activate<Relu, float>, activate<Relu, Half>},
    {activate<Gelu<Digits::all>, float>, activate<Gelu<Digits::half>, Half>},
    {activate<Gated<GeluTanhGate, Digits::all>, float>, activate<Gated<GeluTanhGate, Digits::half>, Half>},
    {activate<Gated<SiluGate, Digits::all>, float>, activate<Gated<SiluGate, Digits::half>, Half>},
    {activate<Sigmoid<2, Digits::all>, float>, activate<Sigmoid<2, Digits::half>, Half>},
    {activate<Sigmoid<1, Digits::all>, float>, activate<Sigmoid<1, Digits::half>, Half>},
    {activate<Gated<QuickGeluGate, Digits::all>, float>, activate<Gated<QuickGeluGate, Digits::half>, Half>},
};
