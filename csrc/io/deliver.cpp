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
        : rows(given), item(item), piece(given.file.map ? MAP_PIECE : READ_PIECE), take(take) {
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
    let_go(rows.file, from, end - from);
    return {};
}

Outcome Work::run(int64_t task, uint8_t* room) const {
    const int64_t in_piece = piece / item * item;
    if (pieces() > 1) {
        const int64_t row = task / pieces(), from = start(row) + task % pieces() * in_piece;
        const int64_t end = std::min(start(row) + bytes(row), from + in_piece);
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

// One channel after another, `run` pixels each, by table.
template <class Word>
void look_up(const uint8_t* from, int64_t count, const Word* tables, int64_t C, int64_t run, int64_t phase, Word* to) {
    int64_t c = phase / run, left = run - phase % run;
    for (int64_t i = 0; i < count; left = run, c = c + 1 < C ? c + 1 : 0) {
        const Word* table = tables + 256 * c;
        for (const int64_t end = std::min(count, i + left); i < end; ++i) to[i] = table[from[i]];
    }
}

void shade(const uint8_t* from, int64_t count, const PixelRule& rule, int64_t phase, uint32_t* to) {
    kernels().delivery->shade_f32(from, count, rule, phase, reinterpret_cast<float*>(to));
}
void shade(const uint8_t* from, int64_t count, const PixelRule& rule, int64_t phase, uint16_t* to) {
    kernels().delivery->shade_bf16(from, count, rule, phase, reinterpret_cast<Bf16*>(to));
}

// The arithmetic of channels [first, first + count) taking turns.
PixelRule rule_of(const Pixels& pixels, int64_t first, int64_t count) {
    PixelRule rule = {};
    rule.period = 16 * count;
    for (int64_t i = 0; i < PixelRule::SIZE; ++i) {
        const int64_t c = first + i % count;
        const double scale = 1.0 / 255.0, spread = 1.0 / static_cast<double>(pixels.std[c]);
        rule.gain[i] = static_cast<float>(scale * spread);
        rule.offset[i] = static_cast<float>(-static_cast<double>(pixels.mean[c]) * spread);
        rule.scale[i] = static_cast<float>(scale);
        rule.scale_rest[i] = static_cast<float>(scale - static_cast<double>(rule.scale[i]));
        rule.mean[i] = pixels.mean[c];
        rule.spread[i] = static_cast<float>(spread);
        rule.spread_rest[i] = static_cast<float>(spread - static_cast<double>(rule.spread[i]));
    }
    return rule;
}

// Whether the arithmetic gives what the table has, to the bit, for every pixel there can be.
template <class Word>
bool agrees(const PixelRule& rule, const Word* tables, int64_t channels) {
    uint8_t pixels[256 * PixelRule::MOST_CHANNELS];
    Word got[256 * PixelRule::MOST_CHANNELS];
    const int64_t count = 256 * channels;
    for (int64_t i = 0; i < count; ++i) pixels[i] = static_cast<uint8_t>(i / channels);
    shade(pixels, count, rule, 0, got);
    for (int64_t i = 0; i < count; ++i) {
        if (got[i] != tables[256 * (i % channels) + i / channels]) return false;
    }
    return true;
}

// Rules of what can be computed instead of looked up: channels that take turns, or each for itself; else none.
template <class Word>
std::vector<PixelRule> rules_of(const Pixels& pixels, const Word* tables) {
    std::vector<PixelRule> rules;
    const bool turns = pixels.run == 1 && pixels.C <= PixelRule::MOST_CHANNELS;
    if (!pixels.mean || !pixels.std || (pixels.run == 1 && !turns)) return rules;
    const int64_t together = turns ? pixels.C : 1;
    for (int64_t c = 0; c < pixels.C; c += together) {
        rules.push_back(rule_of(pixels, c, together));
        PixelRule& rule = rules.back();
        rule.one_step = true;
        if (agrees(rule, tables + 256 * c, together)) continue;
        rule.one_step = false;
        if (!agrees(rule, tables + 256 * c, together)) return {};
    }
    return rules;
}

template <class Word>
void compute(const uint8_t* from, int64_t count, const std::vector<PixelRule>& rules, int64_t run, int64_t phase,
             Word* to) {
    if (run == 1) return shade(from, count, rules[0], phase, to);
    size_t c = static_cast<size_t>(phase / run);
    int64_t left = run - phase % run;
    for (int64_t i = 0; i < count; left = run, c = c + 1 < rules.size() ? c + 1 : 0) {
        const int64_t here = std::min(count - i, left);
        shade(from + i, here, rules[c], 0, to + i);
        i += here;
    }
}

template <class Word>
Outcome deliver_words(const FileRows& rows, const Pixels& pixels, Word* out, bool past) {
    const Word* tables = static_cast<const Word*>(pixels.tables);
    const std::vector<PixelRule> rules = rules_of(pixels, tables);
    const int64_t C = pixels.C, run = pixels.run;
    return deliver(rows, 1, [&, out, past](const uint8_t* from, int64_t place, int64_t count) {
        convert(out + place, count, past, [&, from, place](int64_t first, int64_t n, Word* to) {
            const int64_t phase = (place + first) % (C * run);
            if (rules.empty()) return look_up(from + first, n, tables, C, run, phase, to);
            compute(from + first, n, rules, run, phase, to);
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

Outcome deliver_pixels(const FileRows& rows, const Pixels& pixels, void* out) {
    check(rows, 1, out);
    require(!rows.lengths, "lengths", "rows of one length", "others");
    require_size("C", pixels.C, 1);
    require_size("run", pixels.run, 1);
    require(rows.length % (pixels.C * pixels.run) == 0, "length", "a multiple of C run", rows.length);
    require(pixels.word == 2 || pixels.word == 4, "word", "2 or 4 bytes", pixels.word);
    require_memory("tables", pixels.tables, true);
    const int64_t row_bytes = rows.length * pixels.word;
    expect_writing(out, rows.R * row_bytes);
    const bool past = goes_past_cache(out, row_bytes, rows.R * row_bytes);
    if (pixels.word == 2) return deliver_words(rows, pixels, static_cast<uint16_t*>(out), past);
    return deliver_words(rows, pixels, static_cast<uint32_t*>(out), past);
}

}  // namespace finf
