// The CUDA module without a GPU: the loops of csrc/cuda/tiles over a group of ordinary threads, behind the module's own
// border. The number of a device is taken as the number of lanes, 1, 8 or 32.
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../csrc/cuda/tiles/cross_entropy_delta.inl.h"
#include "../csrc/cuda/tiles/decode_pixels.inl.h"
#include "../csrc/cuda/tiles/decode_tokens.inl.h"
#include "../csrc/cuda/tiles/noise.inl.h"
#include "../csrc/cuda/tiles/segment_sum.inl.h"
#include "../csrc/cuda/tiles/squared_error_delta.inl.h"
#include "../csrc/cuda/tiles/topk_merge.inl.h"

namespace finf::cuda {
namespace {

class Barrier {
  public:
    explicit Barrier(int lanes) : lanes_(lanes) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++arrived_ == lanes_) {
            arrived_ = 0;
            ++round_;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return round != round_; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_;
    int lanes_, arrived_ = 0, round_ = 0;
};

// One lane of LANES threads, with the order of sums of csrc/cuda/group.h.
template <int LANES>
struct Team {
    int lane;
    Barrier& barrier;
    double* room;  // LANES

    int rank() const { return lane; }
    static constexpr int size() { return LANES; }
    void sync() const { barrier.wait(); }

    template <class Join>
    double joined(double x, Join join) const {
        room[lane] = x;
        sync();
        std::vector<double> part(room, room + LANES);
        for (int step = LANES / 2; step > 0; step /= 2)
            for (int i = 0; i < step; ++i) part[i] = join(part[i], part[i + step]);
        sync();
        return part[0];
    }
    double sum(double x) const {
        return joined(x, [](double a, double b) { return a + b; });
    }
    float max(float x) const {
        return static_cast<float>(joined(x, [](double a, double b) { return std::fmax(a, b); }));
    }
    bool any(bool x) const { return sum(x) > 0; }
    int before(int x, int& total) const {
        room[lane] = x;
        sync();
        double below = 0, all = 0;
        for (int i = 0; i < LANES; ++i) {
            below += i < lane ? room[i] : 0;
            all += room[i];
        }
        sync();
        total = static_cast<int>(all);
        return static_cast<int>(below);
    }
};

template <int LANES, class Work>
void run(const Work& work) {
    Barrier barrier(LANES);
    std::vector<double> room(LANES);
    std::vector<std::thread> threads;
    for (int lane = 0; lane < LANES; ++lane)
        threads.emplace_back([&, lane] { work(Team<LANES>{lane, barrier, room.data()}); });
    for (std::thread& thread : threads) thread.join();
}

template <class Work>
void run(const Place& place, const Work& work) {
    if (place.device == 1) return run<1>(work);
    if (place.device == 8) return run<8>(work);
    if (place.device == 32) return run<32>(work);
    reject("device", "1, 8 or 32 lanes", place.device);
}

// Work on row n and the queries from `first` on, QUERIES of them.
template <int QUERIES, class Row>
void rows(const Place& place, int64_t N, int64_t Q, const Row& row) {
    run(place, [&](const auto& group) {
        for (int64_t n = 0; n < N; ++n)
            for (int64_t first = 0; first == 0 || first < Q; first += QUERIES) row(group, n, first);
    });
}

template <int QUERIES, class Z, class D>
void score(const CrossEntropyDelta& op, const Place& place) {
    PartSums<QUERIES> sums;
    if (op.splits == 1)
        return rows<QUERIES>(place, op.N, op.Q, [&](const auto& group, int64_t n, int64_t first) {
            score_row<QUERIES, Z, D>(op, group, n, first, sums);
        });
    for (int64_t part = 0; part < op.splits; ++part)
        rows<QUERIES>(place, op.N, op.Q, [&](const auto& group, int64_t n, int64_t first) {
            sum_part<QUERIES, Z, D>(op, group, n, first, Part::of(part, op.splits));
        });
    rows<QUERIES>(place, op.N, op.Q, [&](const auto& group, int64_t n, int64_t first) {
        finish_row<QUERIES, Z, D>(op, group, n, first, sums);
    });
}

template <class Z, class D>
void score(const CrossEntropyDelta& op, const Place& place) {
    op.Q > 1 ? score<TOGETHER, Z, D>(op, place) : score<1, Z, D>(op, place);
}

template <class P, class Y, class T>
void square(const SquaredErrorDelta& op, const Place& place) {
    rows<TOGETHER>(place, op.N, op.Q, [&](const auto& group, int64_t n, int64_t first) {
        square_row<TOGETHER, P, Y, T>(op, group, n, first);
    });
}

template <class T>
void merge(const TopKMerge& op, const Place& place) {
    constexpr int MOST_ROOM = 2 * 32 * GLANCE;  // small, so that it fills
    std::vector<T> found(MOST_ROOM);
    std::vector<int64_t> found_at(MOST_ROOM);
    T* room = found.data();
    int64_t* room_at = found_at.data();
    run(place, [&](const auto& group) {
        constexpr int ROOM = 2 * GLANCE * std::decay_t<decltype(group)>::size();
        for (int64_t q = 0; q < op.Q; ++q) {
            for (int64_t part = 0; part < op.splits; ++part)
                merge_scores<T, ROOM>(op, group, q, Part::of(part, op.splits), room, room_at);
            if (op.splits > 1) merge_parts<T, ROOM>(op, group, q, room, room_at);
        }
    });
}

template <class T>
void sum_all(const SegmentSum& op) {
    run<SUMS>([&](const auto& group) {
        for (int64_t i = 0; i < op.Q * op.S; ++i) sum_segment<T>(op, group, i / op.S, i % op.S);
    });
}

}  // namespace

void cross_entropy_delta(const CrossEntropyDelta& op, const Place& place) {
    const bool z = op.z_dtype == DType::bf16, d = op.dz_dtype == DType::bf16;
    z   ? d ? score<Bf16, Bf16>(op, place) : score<Bf16, float>(op, place)
    : d ? score<float, Bf16>(op, place)
        : score<float, float>(op, place);
}

void squared_error_delta(const SquaredErrorDelta& op, const Place& place) {
    const bool p = op.p.dtype == DType::bf16, y = op.y.dtype == DType::bf16, d = op.dp.dtype == DType::bf16;
    p   ? y   ? d ? square<Bf16, Bf16, Bf16>(op, place) : square<Bf16, Bf16, float>(op, place)
          : d ? square<Bf16, float, Bf16>(op, place)
              : square<Bf16, float, float>(op, place)
    : y ? d ? square<float, Bf16, Bf16>(op, place) : square<float, Bf16, float>(op, place)
    : d ? square<float, float, Bf16>(op, place)
        : square<float, float, float>(op, place);
}

void segment_sum(const SegmentSum& op, const Place&) {
    op.dtype == DType::f64 ? sum_all<double>(op) : sum_all<float>(op);
}

void topk_merge(const TopKMerge& op, const Place& place) {
    if (op.K > 0) op.dtype == DType::f64 ? merge<double>(op, place) : merge<float>(op, place);
}

void decode_pixels(const DecodePixels& op, const Place&) {
    for (int64_t i = 0; i < (op.M + PIXELS - 1) / PIXELS; ++i)
        op.dtype == DType::bf16 ? decode_chunk<uint16_t>(op, i) : decode_chunk<uint32_t>(op, i);
}

void decode_tokens(const DecodeTokens& op, const Place&) {
    with_stored(op.stored, [&](auto number) {
        using T = decltype(number);
        for (int64_t i = 0; op.L > 0 && i < op.B * chunks_of<T>(op.L); ++i) decode_chunk<T>(op, i);
    });
}

void noise(const Noise& op, const Place&) {
    const int64_t blocks = (op.M + 3) / 4;
    for (int64_t i = 0; i < op.S * blocks; ++i) write_block(op, i, blocks);
}

}  // namespace finf::cuda
