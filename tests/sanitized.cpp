// Calls every compiled operation on buffers of exactly their size, on several threads at once, over every ragged edge
// of its loops. Built with sanitizers by test_isa.py: a read past an end, an overflow or a race ends the program.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/activation_delta.h"
#include "../csrc/cpu/attention_delta.h"
#include "../csrc/cpu/cross_entropy_delta.h"
#include "../csrc/cpu/group_norm_delta.h"
#include "../csrc/cpu/isa/kernels.h"
#include "../csrc/cpu/linear_cross_entropy_delta.h"
#include "../csrc/cpu/layer_norm_delta.h"
#include "../csrc/cpu/linear_delta.h"
#include "../csrc/cpu/noise.h"
#include "../csrc/cpu/rms_norm_delta.h"
#include "../csrc/cpu/segment_sum.h"
#include "../csrc/cpu/squared_error_delta.h"
#include "../csrc/cpu/topk_merge.h"
#include "../csrc/io/deliver.h"
#include "../csrc/io/held.h"
#include "../csrc/io/reader.h"

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

// A head with every kind of change, or with a soft cap and a change of its bias alone.
template <class T>
void heads(int64_t N, int64_t D, int64_t V, int64_t Q, float step, bool capped, finf::DType dtype, std::mt19937& draw) {
    const int64_t r = 3;
    const std::vector<T> x = normal<T>(N * D, 1, draw), W = normal<T>(V * D, 1, draw);
    const std::vector<T> dx = normal<T>(Q * N * D, step, draw), dW = normal<T>(Q * V * D, step, draw);
    const std::vector<T> U = normal<T>(Q * V * r, step, draw);
    const std::vector<float> R = normal<float>(Q * r * D, 1, draw), bias = normal<float>(V, 1, draw);
    const std::vector<float> db = normal<float>(Q * V, step, draw);
    std::vector<int64_t> target(N);
    for (int64_t& t : target) t = draw() % 5 ? static_cast<int64_t>(draw() % V) : -100;
    std::vector<float> base(N), delta(Q * N);
    finf::LinearCrossEntropyDelta op = {};
    op.dtype = op.dW_dtype = op.U_dtype = dtype;
    op.x = x.data(), op.x_stride = D, op.W = W.data(), op.W_stride = D, op.target = target.data();
    op.bias = bias.data(), op.db = db.data(), op.db_stride_q = V;
    if (!capped) {
        op.dx = dx.data(), op.dx_stride_q = N * D, op.dx_stride_n = D;
        op.dW = dW.data(), op.dW_stride_q = V * D, op.dW_stride_v = D;
        op.U = U.data(), op.U_stride_q = V * r, op.U_stride_v = r, op.R = R.data(), op.r = r;
    }
    op.base = base.data(), op.delta = delta.data(), op.delta_stride_q = N;
    op.N = N, op.D = D, op.V = V, op.Q = Q, op.ignore_index = -100, op.threads = THREADS;
    op.softcap = capped ? 20.0 : 0.0, op.label_smoothing = capped ? 0.1 : 0.0;
    finf::linear_cross_entropy_delta(op);
}

void every_head() {
    std::mt19937 draw(1);
    for (int64_t D : {1, 16, 33})
        for (int64_t V : {1, 13, 48, 97, 400, 4100})
            for (int64_t N : {1, 23})
                for (int64_t Q : {0, 1, 2})
                    for (float step : {1e-3f, 10.0f})
                        for (bool capped : {false, true}) {
                            heads<float>(N, D, V, Q, step, capped, finf::DType::f32, draw);
                            heads<finf::Bf16>(N, D, V, Q, step, capped, finf::DType::bf16, draw);
                        }
}

// A layer with both forms of a changed weight, or with an input that stands still.
template <class T>
void layers(int64_t N, int64_t D, int64_t V, int64_t Q, bool turned, finf::DType dtype, std::mt19937& draw) {
    const int64_t r = 3;
    const std::vector<T> x = normal<T>((turned ? 1 : 1 + Q) * N * D, 1, draw), W = normal<T>(V * D, 1, draw);
    const std::vector<T> dW = normal<T>(Q * V * D, 1, draw), U = normal<T>(Q * V * r, 1, draw);
    const std::vector<T> R = normal<T>(Q * r * D, 1, draw);
    const std::vector<float> bias = normal<float>(V, 1, draw), db = normal<float>(Q * V, 1, draw);
    std::vector<T> y((1 + Q) * N * V);
    finf::linear_delta({dtype,  x.data(),    N * D,     D,         !turned,  W.data(), turned ? V : D,
                        turned, bias.data(), db.data(), dW.data(), U.data(), R.data(), y.data(),
                        N,      D,           V,         Q,         r,        THREADS});
}

void every_layer() {
    std::mt19937 draw(5);
    for (int64_t D : {1, 16, 33})
        for (int64_t V : {1, 13, 48, 97, 400})
            for (int64_t N : {1, 23, 600})
                for (int64_t Q : {0, 2})
                    for (bool turned : {false, true}) {
                        layers<float>(N, D, V, Q, turned, finf::DType::f32, draw);
                        layers<finf::Bf16>(N, D, V, Q, turned, finf::DType::bf16, draw);
                    }
}

// Norms with every parameter and with none, with and without a residual; N rows of D numbers, `run` to a parameter.
template <class T>
void norms(int64_t N, int64_t D, int64_t Q, int64_t run, finf::DType dtype, std::mt19937& draw) {
    const std::vector<T> x = normal<T>((1 + Q) * N * D, 1, draw), residual = normal<T>(N * D, 1, draw);
    const std::vector<float> weight = normal<float>(D / run, 1, draw), change = normal<float>(Q * D / run, 1, draw);
    std::vector<T> y((1 + Q) * N * D), sum((1 + Q) * N * D);
    finf::NormRows rows = {};
    rows.x = x.data();
    rows.x_stride_q = N * D;
    rows.x_stride_n = rows.residual_stride_n = D;
    rows.x_moves = Q > 0;
    rows.y = y.data();
    rows.N = N;
    rows.D = D;
    rows.Q = Q;
    rows.groups = 1;
    rows.run = run;
    rows.eps = 1e-5;
    finf::group_norm_delta(rows, dtype, THREADS);
    finf::rms_norm_delta(rows, dtype, THREADS);
    rows.weight = rows.bias = weight.data();
    rows.dweight = rows.dbias = Q > 0 ? change.data() : nullptr;
    finf::group_norm_delta(rows, dtype, THREADS);
    if (run > 1) return;
    rows.residual = residual.data();
    rows.sum = sum.data();
    finf::layer_norm_delta(rows, dtype, THREADS);
}

template <class T>
void activations(int64_t M, int64_t Q, float step, finf::DType dtype, std::mt19937& draw) {
    const std::vector<T> x = normal<T>((1 + Q) * M, step, draw), gate = normal<T>(M, 1, draw);
    std::vector<T> y((1 + Q) * M);
    for (const char* kind : finf::ACTIVATIONS) {
        finf::activation_delta(kind, {x.data(), M, Q > 0, nullptr, 0, false, y.data(), M, Q, false}, dtype, THREADS);
        finf::activation_delta(kind, {x.data(), M, Q > 0, gate.data(), 0, false, y.data(), M, Q, false}, dtype,
                               THREADS);
    }
}

template <class P, class Y>
void errors(int64_t N, int64_t D, int64_t Q, finf::DType p_dtype, finf::DType y_dtype, std::mt19937& draw) {
    const std::vector<P> p = normal<P>(N * D, 1, draw), dp = normal<P>(Q * N * D, 1, draw);
    const std::vector<Y> y = normal<Y>(N * D, 1, draw);
    std::vector<float> base(N), delta(Q * N);
    finf::squared_error_delta({{p.data(), p_dtype, 0, D},
                               {dp.data(), p_dtype, N * D, D},
                               {y.data(), y_dtype, 0, D},
                               base.data(),
                               delta.data(),
                               N,
                               N,
                               D,
                               Q,
                               THREADS});
}

template <class T>
void row_operations(finf::DType dtype, std::mt19937& draw) {
    for (int64_t D : {1, 3, 15, 16, 17, 64, 65, 1025, 2051})
        for (int64_t Q : {0, 2}) {
            for (int64_t run : {int64_t{1}, D}) norms<T>(70, D, Q, run, dtype, draw);
            for (float step : {1e-3f, 10.0f}) activations<T>(D, Q, step, dtype, draw);
            errors<T, float>(5, D, Q, dtype, finf::DType::f32, draw);
            errors<T, finf::Bf16>(5, D, Q, dtype, finf::DType::bf16, draw);
        }
    activations<T>(140000, 1, 0.1f, dtype, draw);
}

void noises() {
    const std::vector<int64_t> samples = {0, -1, int64_t{1} << 40};
    for (int64_t M : {0, 1, 5, 255, 257, 40001}) {
        std::vector<float> out(3 * M);
        finf::noise({~uint64_t{0}, samples.data(), 0xffffffffu, out.data(), 3, M, THREADS});
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
    for (const finf::AttentionMask& mask : masks) {
        const bool segmented = rows == keys && draw() % 2 == 0;
        std::vector<int64_t> cu_seqlens = {0, 0, rows / 3, rows / 2, rows};
        finf::attention_delta(
            {heads(q.data(), B, rows, H, E), heads(k.data(), B, keys, 1, E), heads(v.data(), B, keys, 1, Ev), mask,
             segmented ? cu_seqlens.data() : nullptr, static_cast<int64_t>(cu_seqlens.size()) - 1, y.data(), Q, B, H, 1,
             rows, keys, E, Ev, 1.0f, draw() % 2 ? 5.0f : 0.0f, draw() % 2 == 0},
            dtype, THREADS);
    }
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

// A file of its own for every delivery, whole, in strides and in any order, by both ways of reading.
void deliver_from(const finf::OpenFile& file, const std::vector<uint16_t>& stored, std::mt19937& draw) {
    const int64_t count = static_cast<int64_t>(stored.size());
    for (int64_t length : {int64_t{1}, int64_t{100}, int64_t{1024}, count})
        for (int64_t step : {length, length / 2 + 1, 3 * length}) {
            const int64_t R = (count - length) / step + 1;
            std::vector<int64_t> out(R * length), starts(R), lengths(R);
            finf::deliver_integers({file, nullptr, 0, 2 * step, nullptr, R, length, THREADS}, finf::Stored::u16, 0,
                                   out.data());
            if (out.back() != stored[(R - 1) * step + length - 1]) std::abort();
            for (int64_t r = 0; r < R; ++r) {
                starts[r] = 2 * static_cast<int64_t>(draw() % (count - length + 1));
                lengths[r] = static_cast<int64_t>(draw() % (length + 1));
            }
            finf::deliver_integers({file, starts.data(), 0, 0, lengths.data(), R, length, THREADS}, finf::Stored::u16,
                                   -100, out.data());
            std::vector<uint8_t> raw(2 * R * length);
            finf::deliver_raw({file, starts.data(), 0, 0, nullptr, R, length, THREADS}, 2, 0, raw.data());
            finf::deliver_raw({file, starts.data(), 0, 0, lengths.data(), R, length, THREADS}, 2, -100, raw.data());
        }
    const float mean[] = {0.4f, 0.5f, 0.6f}, spread[] = {0.2f, 0.3f, 0.25f};
    std::vector<float> tables(3 * 256), pixels(30 * 300);
    for (int c = 0; c < 3; ++c)
        for (int x = 0; x < 256; ++x) tables[256 * c + x] = (static_cast<float>(x) / 255.0f - mean[c]) / spread[c];
    std::vector<finf::Bf16> narrow(tables.size());
    for (size_t i = 0; i < narrow.size(); ++i) convert(tables[i], narrow[i]);
    for (int64_t run : {1, 4, 100})
        for (const float* means : {mean, static_cast<const float*>(nullptr)}) {
            const finf::FileRows rows = {file, nullptr, 5, 301, nullptr, 30, 300, THREADS};
            finf::deliver_pixels(rows, finf::Shades(tables.data(), 4, 3, run, means, spread), pixels.data());
            finf::deliver_pixels(rows, finf::Shades(narrow.data(), 2, 3, run, means, spread), pixels.data());
        }
    // Twice the same row: no reading may be asked for past the end of what is mapped.
    std::vector<uint8_t> twice(4 * count);
    finf::deliver_raw({file, nullptr, 0, 0, nullptr, 2, count, THREADS}, 2, 0, twice.data());
}

// Two threads at one reader, by all ways, through a file larger than what is held of mappings.
void readers() {
    constexpr int64_t BYTES = int64_t{40} << 20, SPAN = int64_t{1} << 20;
    std::string path = P_tmpdir "/finf_fast_XXXXXX";
    const int descriptor = mkstemp(path.data());
    if (descriptor < 0 || ftruncate(descriptor, BYTES) != 0) std::abort();
    struct stat is;
    if (fstat(descriptor, &is) != 0) std::abort();
    const auto nanoseconds = [](const timespec& at) {
        return static_cast<uint64_t>(at.tv_sec) * 1000000000 + static_cast<uint64_t>(at.tv_nsec);
    };
    const finf::Identity known = {is.st_dev, is.st_ino, BYTES, nanoseconds(is.st_mtim), nanoseconds(is.st_ctim)};
    {
        finf::Reader reader(descriptor, path, BYTES, true, 0);
        const auto pass = [&] {
            std::vector<uint8_t> out(SPAN, 1);
            for (int64_t at = 0, turn = 0; at < BYTES; at += SPAN, ++turn) {
                const auto told = reader.read(
                    {at, at + SPAN}, static_cast<finf::Way>(turn % 3), known, [&](const finf::OpenFile& file) {
                        return finf::deliver_raw({file, nullptr, at, SPAN, nullptr, 1, SPAN, THREADS}, 1, 0,
                                                 out.data());
                    });
                if (told.outcome.error || !told.same || out[0] || out[SPAN - 1]) std::abort();
            }
        };
        std::thread other(pass);
        pass();
        other.join();
    }
    unlink(path.c_str());
}

void deliveries() {
    std::mt19937 draw(7);
    std::vector<uint16_t> stored(900'001);
    for (uint16_t& one : stored) one = static_cast<uint16_t>(draw());
    std::FILE* file = std::tmpfile();
    const size_t bytes = 2 * stored.size();
    if (!file || std::fwrite(stored.data(), 1, bytes, file) != bytes || std::fflush(file) != 0) std::abort();
    finf::Spoilt spoilt{0};
    void* map = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fileno(file), 0);
    if (map == MAP_FAILED) std::abort();
    for (const uint8_t* from : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(map)})
        deliver_from({fileno(file), from, &spoilt, static_cast<int64_t>(bytes)}, stored, draw);
    if (spoilt) std::abort();
    finf::forget(static_cast<const uint8_t*>(map));
    munmap(map, bytes);
    std::fclose(file);
}

void everything() {
    every_head();
    deliveries();
    readers();
    every_layer();
    std::mt19937 draw(0);
    attend_everywhere(draw);
    row_operations<float>(finf::DType::f32, draw);
    row_operations<finf::Bf16>(finf::DType::bf16, draw);
    noises();
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
