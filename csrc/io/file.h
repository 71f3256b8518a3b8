// Bytes of an open file: read with pread, or found in a mapping after its pages were brought in by a call that can
// fail.
#pragma once

#include <atomic>
#include <cstdint>

namespace finf {

// 1 from when on a mapping holds pages that are not the file's; lives as long as the mapping.
using Spoilt = std::atomic<int32_t>;

struct OpenFile {
    int descriptor;
    const uint8_t* map;  // of the whole file from its first byte, or null: it is read
    Spoilt* spoilt;      // of the mapping
    int64_t size;        // of the mapping
};

// How far it went. `error`: 0, an errno, or ENDED; `byte`: where in the file the first trouble was.
struct Outcome {
    static constexpr int ENDED = -1;  // the file ends before the bytes asked for do
    int error = 0;
    int64_t byte = 0;
};

// Bytes [first, first + bytes) into `to`, whatever signals or short reads come between.
Outcome read_at(int descriptor, uint8_t* to, int64_t first, int64_t bytes);

// Whether the disk has yet to bring a byte; no where the system cannot say.
bool is_missing(int descriptor, int64_t byte);

// Where bytes [first, first + bytes) can be seen: in the mapping, or in `room`, which holds as many.
struct Seen {
    const uint8_t* bytes;
    Outcome outcome;
};
Seen bring_in(const OpenFile& file, uint8_t* room, int64_t first, int64_t bytes);

// What stays the same of a file as long as nobody touches it.
struct Identity {
    uint64_t device, inode;
    int64_t size;
    // The last 64 bits of the times, which may lie before 1970 and after 2262; touched: also by a change of attributes.
    uint64_t changed_ns, touched_ns;
};

// Whether that is what the name leads to now; device and inode aside where the file system numbers its files anew.
bool leads_to(const char* path, const Identity& known, bool numbered);

// Whether the file lies behind a network, by what the system says of its file system; false where it says nothing.
bool on_network(int descriptor);

}  // namespace finf
