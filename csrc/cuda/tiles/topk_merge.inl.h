// One query's merge, written once over Group.
//
// Scores that may enter the list are gathered beside it, sorted when there is no room for more, and both are merged:
// an entry's new place is its old one plus the number of entries of the other list that come before it. Blocks that
// share a query keep a list each, of scores that would enter the query's, which then takes in theirs: the order is
// total, so the list is the same however the scores were cut.
#pragma once

#include <cmath>

#include "../elements.h"
#include "../group.h"
#include "../splits.h"
#include "../topk_merge.h"

namespace finf::cuda {

// Threads of a block.
constexpr int MERGE_THREADS = 256;
// Entries that a lane may add before all lanes agree on places for them.
constexpr int GLANCE = 4;
// 16-byte loads that a lane has under way, and looks at together: if none of all lanes' may enter, they are passed
// over.
constexpr int PACKETS = 4;

template <class T>
struct alignas(16) Packet {
    static constexpr int SIZE = 16 / sizeof(T);
    T score[SIZE];
};

template <class T>
struct Entry {
    T value;
    int64_t index;

    // An empty place has index -1, the largest unsigned one, and so comes after a real score of -inf.
    FINF_ROW bool operator<(const Entry& other) const {
        if (value != other.value) return value > other.value;
        return static_cast<uint64_t>(index) < static_cast<uint64_t>(other.index);
    }
};

// Entries of `list` that come before `entry`.
template <class T>
FINF_ROW int64_t count_before(const T* values, const int64_t* indices, int64_t count, const Entry<T>& entry) {
    int64_t low = 0;
    while (low < count) {
        const int64_t middle = low + (count - low) / 2;
        const bool before = Entry<T>{values[middle], indices[middle]} < entry;
        low = before ? middle + 1 : low;
        count = before ? count : middle;
    }
    return low;
}

// ROOM, a power of two, is what can be gathered: at least twice what all lanes add together.
template <class T, int ROOM, class Group>
struct Running {
    static constexpr int SIZE = Packet<T>::SIZE;
    const Group& group;
    T* values;  // (K), of the list
    int64_t* indices;
    int64_t K;
    T* found;  // (ROOM), shared by the lanes, with their indices
    int64_t* found_at;
    Entry<T> bar;  // entries have to come before it, and before the list's last
    Entry<T> worst = bar;
    int count = 0;

    FINF_ROW void clear() {
        for (int64_t k = group.rank(); k < K; k += group.size()) {
            values[k] = static_cast<T>(-HUGE_VAL);
            indices[k] = -1;
        }
        group.sync();
    }

    FINF_ROW void add(const T* scores, int64_t S, int64_t start, Part part) {
        const int64_t round = int64_t{group.size()} * PACKETS * SIZE, step = part.size * round;
        int64_t s = part.rank * round - phase(scores);
        Packet<T> ahead[PACKETS];
        look(scores, S, s, ahead);
        for (; s < S; s += step) {
            Packet<T> seen[PACKETS];
            FINF_UNROLL
            for (int i = 0; i < PACKETS; ++i) seen[i] = ahead[i];
            look(scores, S, s + step, ahead);
            take(seen, s, start);
        }
        merge();
    }

    // Neighbouring lanes read neighbours: packet i of this lane begins so far after the round's first score.
    FINF_ROW int64_t offset(int i) const { return (i * group.size() + group.rank()) * int64_t{SIZE}; }

    // NaN, which never enters, where there is no score.
    FINF_ROW void look(const T* scores, int64_t S, int64_t s, Packet<T> (&packets)[PACKETS]) const {
        FINF_UNROLL
        for (int i = 0; i < PACKETS; ++i) {
            const int64_t at = s + offset(i);
            if (at >= 0 && at + SIZE <= S) {
                packets[i] = *reinterpret_cast<const Packet<T>*>(scores + at);
            } else {
                for (int j = 0; j < SIZE; ++j)
                    packets[i].score[j] = at + j >= 0 && at + j < S ? scores[at + j] : static_cast<T>(NAN);
            }
        }
    }

    FINF_ROW void take(const Packet<T> (&seen)[PACKETS], int64_t s, int64_t start) {
        bool enter = false;
        FINF_UNROLL
        for (int i = 0; i < PACKETS; ++i)
            for (int j = 0; j < SIZE; ++j) enter = enter || seen[i].score[j] >= worst.value;
        if (!group.any(enter)) return;
        FINF_UNROLL
        for (int i = 0; i < PACKETS; ++i) {
            Entry<T> entries[SIZE];
            for (int j = 0; j < SIZE; ++j) entries[j] = {seen[i].score[j], start + s + offset(i) + j};
            gather(entries);
        }
    }

    // Entries of another list, or of several.
    FINF_ROW void add_list(const T* others, const int64_t* their_indices, int64_t size) {
        for (int64_t k = 0; k < size; k += group.size()) {
            const int64_t at = k + group.rank();
            const Entry<T> entry[1] = {at < size ? Entry<T>{others[at], their_indices[at]} : bar};
            gather(entry);
        }
        merge();
    }

    // A list's order does not depend on where an entry was gathered.
    template <int COUNT>
    FINF_ROW void gather(const Entry<T> (&entries)[COUNT]) {
        if (count + group.size() * COUNT > ROOM) merge();
        int enter = 0, total = 0;
        FINF_UNROLL
        for (int i = 0; i < COUNT; ++i) enter += wanted(entries[i]);
        int place = count + group.before(enter, total);
        FINF_UNROLL
        for (int i = 0; i < COUNT; ++i) {
            if (!wanted(entries[i])) continue;
            found[place] = entries[i].value;
            found_at[place++] = entries[i].index;
        }
        count += total;
    }

    FINF_ROW bool wanted(const Entry<T>& entry) const { return entry.value == entry.value && entry < worst; }

    FINF_ROW void merge() {
        if (count == 0) return;
        sort();
        constexpr int64_t NOWHERE = -1;
        int64_t place[ROOM_OF_LANE];
        FINF_UNROLL
        for (int i = 0; i < ROOM_OF_LANE; ++i) {
            const int j = i * group.size() + group.rank();
            const Entry<T> entry = {found[j], found_at[j]};
            place[i] = j < count ? j + count_before(values, indices, K, entry) : NOWHERE;
        }
        group.sync();
        make_way();
        FINF_UNROLL
        for (int i = 0; i < ROOM_OF_LANE; ++i) {
            const int j = i * group.size() + group.rank();
            if (place[i] == NOWHERE || place[i] >= K) continue;
            values[place[i]] = found[j];
            indices[place[i]] = found_at[j];
        }
        count = 0;
        group.sync();
        const Entry<T> last = {values[K - 1], indices[K - 1]};
        worst = last < bar ? last : bar;
    }

    // Entries of the list only move back, so stretches of it move from the end on.
    FINF_ROW void make_way() {
        const int64_t stretches = (K + group.size() - 1) / group.size();
        for (int64_t stretch = stretches - 1; stretch >= 0; --stretch) {
            const int64_t k = stretch * group.size() + group.rank();
            Entry<T> entry = {};
            if (k < K) entry = {values[k], indices[k]};
            const int64_t place = k < K ? k + count_before(found, found_at, count, entry) : K;
            group.sync();
            if (place < K) {
                values[place] = entry.value;
                indices[place] = entry.index;
            }
            group.sync();
        }
    }

    // Bitonic, of the power of two that holds what was gathered, filled up with empty places, which come last.
    FINF_ROW void sort() {
        int size = 1;
        while (size < count) size *= 2;
        for (int j = count + group.rank(); j < size; j += group.size()) {
            found[j] = static_cast<T>(-HUGE_VAL);
            found_at[j] = -1;
        }
        group.sync();
        for (int run = 2; run <= size; run *= 2)
            for (int apart = run / 2; apart > 0; apart /= 2) {
                for (int i = group.rank(); i < size / 2; i += group.size()) order(i, run, apart);
                group.sync();
            }
    }

    // Pair i of those that lie `apart`; runs turn downwards and upwards by turns.
    FINF_ROW void order(int i, int run, int apart) {
        const int low = i / apart * 2 * apart + i % apart, high = low + apart;
        const Entry<T> a = {found[low], found_at[low]}, b = {found[high], found_at[high]};
        const bool downwards = (low & run) != 0;
        if (downwards ? !(a < b) : !(b < a)) return;
        found[low] = b.value;
        found_at[low] = b.index;
        found[high] = a.value;
        found_at[high] = a.index;
    }

    static constexpr int ROOM_OF_LANE = ROOM / Group::size();
};

// Scores that a part of a query should have, and for each place of its list: with fewer, joining lists costs more than
// looking at scores.
constexpr int64_t LEAST_SCORES = 1 << 14, LEAST_SCORES_OF_PLACE = 8;

inline Splits topk_merge_splits(int64_t multiprocessors, int64_t Q, int64_t K, int64_t S, DType dtype) {
    const int64_t entry = sizeof(int64_t) + (dtype == DType::f64 ? sizeof(double) : sizeof(float));
    const int64_t most =
        K > 0 && K <= S / LEAST_SCORES_OF_PLACE ? S / std::max(LEAST_SCORES, LEAST_SCORES_OF_PLACE * K) : 1;
    return splits_of(Q, most, multiprocessors, K * entry);
}

// The lists of a query's parts: all parts' indices lie before all values.
template <class T>
struct PartLists {
    int64_t* indices;
    T* values;

    FINF_ROW static PartLists of(const TopKMerge& op, int64_t list) {
        int64_t* indices = static_cast<int64_t*>(op.parts);
        return {indices + list * op.K, reinterpret_cast<T*>(indices + op.Q * op.splits * op.K) + list * op.K};
    }
};

// The running list of a query. `found` and `found_at` are shared by the lanes.
template <class T, int ROOM, class Group>
FINF_ROW Running<T, ROOM, Group> running_list(const TopKMerge& op, const Group& group, int64_t q, T* found,
                                              int64_t* found_at) {
    T* values = static_cast<T*>(op.values) + q * op.K;
    int64_t* indices = op.indices + q * op.K;
    return {group, values, indices, op.K, found, found_at, {values[op.K - 1], indices[op.K - 1]}};
}

// A part's scores into the query's list, or where it is one of several into a list of its own.
template <class T, int ROOM, class Group>
FINF_ROW void merge_scores(const TopKMerge& op, const Group& group, int64_t q, Part part, T* found, int64_t* found_at) {
    auto running = running_list<T, ROOM>(op, group, q, found, found_at);
    if (part.size > 1) {
        const auto lists = PartLists<T>::of(op, q * op.splits + part.rank);
        running.values = lists.values;
        running.indices = lists.indices;
        running.clear();
    }
    running.add(static_cast<const T*>(op.scores) + q * op.scores_stride_q, op.S, op.start, part);
}

// The lists of a query's parts into its own.
template <class T, int ROOM, class Group>
FINF_ROW void merge_parts(const TopKMerge& op, const Group& group, int64_t q, T* found, int64_t* found_at) {
    const auto lists = PartLists<T>::of(op, q * op.splits);
    running_list<T, ROOM>(op, group, q, found, found_at).add_list(lists.values, lists.indices, op.splits * op.K);
}

}  // namespace finf::cuda
