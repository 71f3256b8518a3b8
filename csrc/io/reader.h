// One opening of a file, read again and again: around each reading what belongs to it besides its bytes, so that the
// caller comes here once. Between two batches Python finds the processor's caches full of pixels: what it did there in
// four calls and twenty functions took as long as half the conversion.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "file.h"

namespace finf {

// `MAP_WHAT_IS_THERE`: through a mapping unless the disk still has to bring it, since of one the system reads less
// ahead.
enum class Way : int { READ = 0, MAP = 1, MAP_WHAT_IS_THERE = 2 };

// Bytes [begin, end) that a reading lies in.
struct Span {
    int64_t begin, end;
};

// How a reading went. `mapped`: through the mapping; `no_trial`: what it took says nothing of either way, since a disk
// had to bring it, or no mapping was to be had; `same`: the name still leads to this file, and it is as it was.
struct Told {
    Outcome outcome;
    bool mapped = false, no_trial = false, same = true;
    double seconds = 0;
};

class Reader {
  public:
    // Owns the descriptor. `size`: that of the file when it was opened; `reached`: where an earlier opening was read
    // to.
    Reader(int descriptor, std::string path, int64_t size, bool numbered, int64_t reached);
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;
    ~Reader();

    // `known`: what the file was, or is if others changed its attributes. Safe to use from several threads, and without
    // a lock: a child forked meanwhile would find it held for ever. What ends too early is found before a mapping of it
    // is looked at.
    Told read(Span span, Way way, const Identity& known, const std::function<Outcome(const OpenFile&)>& deliver);

  private:
    bool follows(Span span);
    const uint8_t* mapping();

    const int descriptor_;
    const std::string path_;
    const int64_t size_;
    const bool numbered_;
    std::atomic<const uint8_t*> map_{nullptr};
    Spoilt spoilt_{0};
    std::atomic<int64_t> reached_;  // where the last reading ended
};

}  // namespace finf
