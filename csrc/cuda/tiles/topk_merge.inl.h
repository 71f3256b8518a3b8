// One query's merge, written once over Group.
//
// Scores that may enter the list are gathered beside it, sorted when there is no room for more, and both are merged:
// an entry's new place is its old one plus the number of entries of the other list that come before it.
#pragma once

#include <cmath>

#include "../group.h"
#include "../topk_merge.h"

namespace finf::cuda {

// Scores that a lane looks at before all lanes agree on places for what they found.
constexpr int GLANCE = 4;

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

// ROOM, a power of two, is what can be gathered: at least twice what all lanes look at together.
template <class T, int ROOM, class Group>
struct Running {
    const Group& group;
    T* values;  // (K), of the list
    int64_t* indices;
    int64_t K;
    T* found;  // (ROOM), shared by the lanes, with their indices
    int64_t* found_at;
    int count = 0;

    FINF_ROW void add(const T* scores, int64_t S, int64_t start) {
        for (int64_t s = 0; s < S; s += group.size() * GLANCE) {
            if (count + group.size() * GLANCE > ROOM) merge();
            gather(scores, S, s, start);
        }
        merge();
    }

    // Neighbouring lanes read neighbours. A list's order does not depend on where an entry was gathered.
    FINF_ROW void gather(const T* scores, int64_t S, int64_t s, int64_t start) {
        const Entry<T> worst = {values[K - 1], indices[K - 1]};
        Entry<T> seen[GLANCE];
        int enter = 0, total = 0;
        FINF_UNROLL
        for (int i = 0; i < GLANCE; ++i) {
            const int64_t at = s + i * group.size() + group.rank();
            seen[i] = {at < S ? scores[at] : static_cast<T>(NAN), start + at};
            enter += wanted(seen[i], worst);
        }
        int place = count + group.before(enter, total);
        FINF_UNROLL
        for (int i = 0; i < GLANCE; ++i) {
            if (!wanted(seen[i], worst)) continue;
            found[place] = seen[i].value;
            found_at[place++] = seen[i].index;
        }
        count += total;
    }

    FINF_ROW static bool wanted(const Entry<T>& entry, const Entry<T>& worst) {
        return entry.value == entry.value && entry < worst;
    }

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

template <class T, int ROOM, class Group>
FINF_ROW void merge_query(const TopKMerge& op, const Group& group, int64_t q, T* found, int64_t* found_at) {
    Running<T, ROOM, Group> running = {
        group, static_cast<T*>(op.values) + q * op.K, op.indices + q * op.K, op.K, found, found_at};
    running.add(static_cast<const T*>(op.scores) + q * op.scores_stride_q, op.S, op.start);
}

}  // namespace finf::cuda
