// Calls every compiled operation on buffers of exactly their size, on several threads at once, over every ragged edge
// of its loops. Built with sanitizers by test_isa.py: a read past an end, an overflow or a race ends the program.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/cpu/attention_delta.h"
#include "../csrc/cpu/cross_entropy_delta.h"
#include "../csrc/cpu/isa/kernels.h"
#include "../csrc/cpu/segment_sum.h"
#include "../csrc/cpu/topk_merge.h"

namespace {

constexpr int64_t THREADS = 3;

void convert(float x, float& to) { to = x; }
void convert(float x, finf::Bf16& to) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    to.bits = static_cast<uint16_t>(bits >> 16);
}

template <class T>
std::vector<T> normal(int64_t count, float width, std::mt19937& draw) {
    std::normal_distribution<float> values(0, width);
    std::vector<T> x(count);
    for (T& one : x) convert(values(draw), one);
    return x;
}

template <class T>
std::vector<float> changes(int64_t N, int64_t V, int64_t Q, float step, finf::DType dtype, std::mt19937& draw) {
    const std::vector<T> z = normal<T>(N * V, 2, draw), dz = normal<T>(Q * N * V, step, draw);
    std::vector<int64_t> target(N);
    for (int64_t& t : target) t = draw() % 5 ? static_cast<int64_t>(draw() % V) : -100;
    std::vector<float> base(N), delta(Q * N);
    const double smoothing = draw() % 2 ? 0.1 : 0.0;
    finf::cross_entropy_delta({z.data(), dtype, V, dz.data(), dtype, N * V, V, target.data(), base.data(), delta.data(),
                               N, N, V, Q, -100, smoothing, THREADS});
    return delta;
}

void sum_and_rank(const std::vector<float>& delta, int64_t N, int64_t Q, std::mt19937& draw) {
    std::vector<int64_t> offsets = {0};
    while (offsets.back() < N) offsets.push_back(std::min<int64_t>(N, offsets.back() + draw() % 20));
    const int64_t S = static_cast<int64_t>(offsets.size()) - 1, K = 1 + draw() % 30;
    std::vector<float> sums(Q * S), best(Q * K, -INFINITY);
    std::vector<int64_t> indices(Q * K, -1);
    finf::segment_sum({delta.data(), finf::DType::f32, N, offsets.data(), sums.data(), S, Q, N, S, THREADS});
    for (int64_t start : {int64_t{0}, N}) {
        finf::topk_merge({best.data(), indices.data(), delta.data(), finf::DType::f32, N, start, Q, K, N, THREADS});
    }
}

// Heads beside each other in a row, as in (1+Q, B, T, H, E) transposed.
finf::HeadStack heads(const void* first, int64_t B, int64_t T, int64_t H, int64_t E) {
    return {first, B * T * H * E, T * H * E, E, H * E, true};
}

template <class T>
void attend(int64_t rows, int64_t keys, int64_t E, int64_t Ev, float step, finf::DType dtype, std::mt19937& draw) {
    constexpr int64_t B = 2, H = 2, Q = 2;
    const std::vector<T> q = normal<T>((1 + Q) * B * rows * H * E, step, draw),
                         k = normal<T>((1 + Q) * B * keys * E, step, draw),
                         v = normal<T>((1 + Q) * B * keys * Ev, step, draw);
    std::vector<uint8_t> seen(B * keys);
    for (uint8_t& one : seen) one = draw() % 4 != 0;
    const std::vector<float> added = normal<float>(rows * keys, 1, draw);
    std::vector<T> y((1 + Q) * B * H * rows * Ev);
    const finf::AttentionMask masks[] = {
        {nullptr, false, 0, 0, 0, 0}, {seen.data(), true, keys, 0, 0, 1}, {added.data(), false, 0, 0, keys, 1}};
    for (const finf::AttentionMask& mask : masks)
        finf::attention_delta(
            {heads(q.data(), B, rows, H, E), heads(k.data(), B, keys, 1, E), heads(v.data(), B, keys, 1, Ev), mask,
             y.data(), Q, B, H, 1, rows, keys, E, Ev, 1.0f, draw() % 2 ? 5.0f : 0.0f, draw() % 2 == 0},
            dtype, THREADS);
}

void attend_everywhere(std::mt19937& draw) {
    for (int64_t rows : {1, 17, 63, 64, 65, 130})
        for (int64_t keys : {1, 63, 64, 65, 130})
            for (int64_t E : {1, 16, 33})
                for (float step : {1e-2f, 1.0f, 10.0f}) {
                    attend<float>(rows, keys, E, 34 - E, step, finf::DType::f32, draw);
                    attend<finf::Bf16>(rows, keys, E, 34 - E, step, finf::DType::bf16, draw);
                }
}

void everything() {
    std::mt19937 draw(0);
    attend_everywhere(draw);
    for (int64_t V : {1, 2, 15, 16, 17, 63, 64, 65, 100, 2047, 2048, 2049, 4100})
        for (int64_t N : {1, 3, 70})
            for (int64_t Q : {0, 1, 3})
                for (float step : {1e-3f, 1.0f, 100.0f}) {
                    sum_and_rank(changes<float>(N, V, Q, step, finf::DType::f32, draw), N, Q, draw);
                    sum_and_rank(changes<finf::Bf16>(N, V, Q, step, finf::DType::bf16, draw), N, Q, draw);
                }
}

}  // namespace

int main() {
    std::thread other(everything);
    everything();
    other.join();
    std::puts(finf::kernels().name);
}
