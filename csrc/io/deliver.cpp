#include "deliver.h"

#include <errno.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "../check.h"
#include "../cpu/isa/kernels.h"
#include "../cpu/pages.h"
#include "../cpu/parallel.h"
#include "../cpu/past_cache.h"
#include "held.h"
#include "past.h"
#include "rescue.h"

namespace finf {
namespace {

// Bytes of the file that are converted at a time: read into memory that stays in a second-level cache of 512 KiB or
// more, with what they become. Of a mapping more, since each piece costs two calls that stop the other threads.
constexpr int64_t READ_PIECE = int64_t{1} << 17, MAP_PIECE = int64_t{1} << 21;
// Of the file for each thread: one that has gone to sleep takes longer to come than it takes to convert less.
constexpr int64_t WORTH_WAKING = 2 * READ_PIECE;
// Between two rows; what is less is read along with them, which costs less than another call.
constexpr int64_t MOST_GAP = 4096;
// A Zen 3 copies out of the page cache at a fifth of its speed (2.6 GB/s instead of 13) where memory lies 1 to 31 bytes
// further in its page than the bytes of the file do: the room of a piece lies as far behind a cache line as the piece.
constexpr int64_t LINE = 64;
constexpr int64_t STORED_BYTES[] = {1, 1, 2, 2, 4, 4, 8};

// Takes `count` items that begin at `from`; `place` is that of the first in the batch, (R, length) flattened.
using Take = std::function<void(const uint8_t* from, int64_t place, int64_t count)>;

// What the tasks share: rows that follow each other are one long row.
struct Work {
    FileRows rows;
    int64_t item, piece;
    const Take& take;

    Work(const FileRows& given, int64_t item, const Take& take)
        : rows(given), item(item), piece(READ_PIECE), take(take) {
        if (rows.file.map) piece = std::clamp(rows.R * rows.length * item / threads() + item, READ_PIECE, MAP_PIECE);
        piece -= piece % item;
        if (!rows.starts && !rows.lengths && rows.step == rows.length * item) {
            rows.length *= rows.R;
            rows.R = 1;
        }
    }

    int64_t start(int64_t r) const { return rows.starts ? rows.starts[r] : rows.first + r * rows.step; }
    int64_t bytes(int64_t r) const { return item * (rows.lengths ? rows.lengths[r] : rows.length); }

    // Tasks: a piece of a long row each, or some short rows.
    int64_t pieces() const { return std::max<int64_t>(1, (rows.length * item + piece - 1) / piece); }
    int64_t group() const { return std::max<int64_t>(1, piece / std::max<int64_t>(1, rows.length * item)); }
    int64_t tasks() const { return (rows.R + group() - 1) / group() * pieces(); }
    int64_t threads() const { return std::clamp<int64_t>(rows.R * rows.length * item / WORTH_WAKING, 1, rows.threads); }

    Outcome run(int64_t task, uint8_t* room) const;
    Outcome bring(int64_t row, int64_t last, int64_t from, int64_t end, uint8_t* room) const;
};

// Rows [row, last) lie inside [from, end) of the file, in this order; of a long row only that part is meant.
Outcome Work::bring(int64_t row, int64_t last, int64_t from, int64_t end, uint8_t* room) const {
    room += from % LINE;
    const Seen seen = bring_in(rows.file, room, from, end - from);
    if (seen.outcome.error) return seen.outcome;
    const Rescue rescue(seen.bytes == room ? nullptr : seen.bytes, end - from, rows.file.spoilt);
    for (; row < last; ++row) {
        const int64_t begin = std::max(from, start(row)), stop = std::min(end, start(row) + bytes(row));
        take(seen.bytes + (begin - from), row * rows.length + (begin - start(row)) / item, (stop - begin) / item);
    }
    if (rescue.needed()) return {EFAULT, from};
    if (seen.bytes != room) looked_at(rows.file, from, end - from);
    return {};
}

Outcome Work::run(int64_t task, uint8_t* room) const {
    if (pieces() > 1) {
        const int64_t row = task / pieces(), from = start(row) + task % pieces() * piece;
        const int64_t end = std::min(start(row) + bytes(row), from + piece);
        return from < end ? bring(row, row + 1, from, end, room) : Outcome{};
    }
    int64_t row = task * group();
    const int64_t stop = std::min(rows.R, row + group());
    while (row < stop) {
        int64_t last = row + 1, end = start(row) + bytes(row);
        while (last < stop && start(last) >= start(last - 1) && start(last) - end <= MOST_GAP &&
               start(last) + bytes(last) - start(row) <= piece) {
            end = std::max(end, start(last) + bytes(last));
            ++last;
        }
        if (end > start(row)) {
            const Outcome outcome = bring(row, last, start(row), end, room);
            if (outcome.error) return outcome;
        }
        row = last;
    }
    return {};
}

void check(const FileRows& rows, int64_t item, const void* out) {
    require_size("R", rows.R);
    require_size("length", rows.length);
    require_size("threads", rows.threads, 1);
    require_size("item", item, 1);
    require(item <= READ_PIECE, "item", "at most 131072 bytes", item);
    require_memory("out", out, rows.R > 0 && rows.length > 0);
    require_memory("spoilt", rows.file.spoilt, rows.file.map != nullptr);
    for (int64_t r = 0; r < rows.R; ++r) {
        require_size("starts", rows.starts ? rows.starts[r] : rows.first + r * rows.step);
        if (!rows.lengths) continue;
        require_size("lengths", rows.lengths[r]);
        require(rows.lengths[r] <= rows.length, "lengths", "at most `length`", rows.lengths[r]);
    }
}

// A thread keeps its room: a piece of a file, from the start of a cache line on, and as far behind it again as its
// first byte in the file is. Pieces of a mapping come here too where the system cannot bring them in (file.cpp); until
// then nothing is written beyond READ_PIECE, and no memory taken.
uint8_t* room_of_thread() {
    static thread_local std::unique_ptr<uint8_t[]> room(new uint8_t[std::max(READ_PIECE, MAP_PIECE) + 2 * LINE]);
    return room.get() + (LINE - reinterpret_cast<uintptr_t>(room.get()) % LINE) % LINE;
}

Outcome deliver(const FileRows& rows, int64_t item, const Take& take) {
    const Work work(rows, item, take);
    if (rows.file.map) Rescue::stand_by();
    Outcome first;
    std::mutex failing;
    background_for(work.tasks(), work.threads(), [&](int64_t task) {
        const Outcome outcome = work.run(task, room_of_thread());
        if (!outcome.error) return;
        std::lock_guard<std::mutex> lock(failing);
        if (!first.error || outcome.byte < first.byte) first = outcome;
    });
    return first;
}

template <class Word>
void fill_up(const FileRows& rows, int64_t fill, Word* out) {
    for (int64_t r = 0; rows.lengths && r < rows.R; ++r) {
        std::fill(out + r * rows.length + rows.lengths[r], out + (r + 1) * rows.length, static_cast<Word>(fill));
    }
}

void fill_up(const FileRows& rows, int64_t item, int64_t fill, uint8_t* out) {
    if (!rows.lengths) return;
    switch (item) {
        case 1:
            return fill_up(rows, fill, out);
        case 2:
            return fill_up(rows, fill, reinterpret_cast<uint16_t*>(out));
        case 4:
            return fill_up(rows, fill, reinterpret_cast<uint32_t*>(out));
        case 8:
            return fill_up(rows, fill, reinterpret_cast<uint64_t*>(out));
        default:
            reject("item", "1, 2, 4 or 8 bytes where rows are filled up", item);
    }
}

template <class Word>
Outcome deliver_words(const FileRows& rows, const Shades& shades, Word* out, bool past) {
    return deliver(rows, 1, [&, out, past](const uint8_t* from, int64_t place, int64_t count) {
        convert(out + place, count, past, [&, from, place](int64_t first, int64_t n, Word* to) {
            shades.apply(from + first, n, place + first, to);
        });
    });
}

}  // namespace

Outcome deliver_integers(const FileRows& rows, Stored stored, int64_t fill, int64_t* out) {
    check(rows, 1, out);
    const int64_t row_bytes = rows.length * 8;
    expect_writing(out, rows.R * row_bytes);
    const bool past = goes_past_cache(out, row_bytes, rows.R * row_bytes);
    fill_up(rows, fill, out);
    const auto widen = kernels().delivery->widen[static_cast<int>(stored)];
    const int64_t item = STORED_BYTES[static_cast<int>(stored)];
    return deliver(rows, item, [=](const uint8_t* from, int64_t place, int64_t count) {
        convert(out + place, count, past,
                [=](int64_t first, int64_t n, int64_t* to) { widen(from + first * item, n, to); });
    });
}

Outcome deliver_raw(const FileRows& rows, int64_t item, int64_t fill, uint8_t* out) {
    check(rows, item, out);
    const int64_t row_bytes = rows.length * item;
    expect_writing(out, rows.R * row_bytes);
    const bool past = goes_past_cache(out, row_bytes, rows.R * row_bytes);
    fill_up(rows, item, fill, out);
    return deliver(rows, item, [=](const uint8_t* from, int64_t place, int64_t count) {
        copy(out + place * item, from, count * item, past);
    });
}

Outcome deliver_pixels(const FileRows& rows, const Shades& shades, void* out) {
    check(rows, 1, out);
    require(!rows.lengths, "lengths", "rows of one length", "others");
    require(rows.length % shades.round() == 0, "length", "a multiple of C run", rows.length);
    const int64_t row_bytes = rows.length * shades.word();
    expect_writing(out, rows.R * row_bytes);
    const bool past = goes_past_cache(out, row_bytes, rows.R * row_bytes);
    if (shades.word() == 2) return deliver_words(rows, shades, static_cast<uint16_t*>(out), past);
    return deliver_words(rows, shades, static_cast<uint32_t*>(out), past);
}

}  // namespace finf
