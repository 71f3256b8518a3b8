// From rows in a file to a batch in memory, in one pass: read in pieces that stay in the cache, converted on the way.
#pragma once

#include <cstdint>

#include "../check.h"
#include "file.h"
#include "shades.h"

namespace finf {

// R rows of items in a file. A row begins at any byte; rows may overlap, repeat and come in any order.
struct FileRows {
    OpenFile file;
    const int64_t* starts;  // (R) byte where each row begins, or null: first + r step
    int64_t first, step;
    const int64_t* lengths;  // (R) items of each row, at most `length`, or null: all `length`
    int64_t R, length;       // what is delivered: (R, length) items
    int64_t threads;
};

// Every item as int64, short rows filled up with `fill`: out (R, length). Throws std::invalid_argument for what cannot
// be asked; whatever the disk does is in the outcome, and `out` then holds no batch.
Outcome deliver_integers(const FileRows& rows, Stored stored, int64_t fill, int64_t* out);

// Items of `item` bytes as they are; where short rows are filled up, with the low bytes of `fill`, 1, 2, 4 or 8.
Outcome deliver_raw(const FileRows& rows, int64_t item, int64_t fill, uint8_t* out);

// out (R, length) words; a row is a whole number of rounds.
Outcome deliver_pixels(const FileRows& rows, const Shades& shades, void* out);

}  // namespace finf
