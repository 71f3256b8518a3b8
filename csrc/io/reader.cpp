#include "reader.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "../check.h"
#include "../of_this_process.h"
#include "forerunner.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace finf {
namespace {

// Between the end of a reading and the next, for which that follows it (windows overlap by a token); and of one that is
// worth running ahead of: what is smaller, an index's piece above all, says little of what comes next.
constexpr int64_t NEXT = 4096, AHEAD_FROM = int64_t{1} << 17;

// Bytes of mappings that the process may hold, of all files together, before it lets go of them: what it holds shall
// not grow with the files, but each letting go stops all its threads, on a virtual machine for as long as 500 KiB take
// to convert.
constexpr int64_t HELD = int64_t{1} << 24;

// Whose pages are held. A forked child holds none of its parent's readings, but the lock as it was.
class Held {
  public:
    const pid_t process = getpid();

    void add(const Reader* reader, int64_t bytes) {
        std::lock_guard<std::mutex> lock(state_);
        readers_.insert(reader);
        bytes_ += bytes;
        if (bytes_ < HELD) return;
        for (const Reader* each : readers_) each->let_go();
        readers_.clear();
        bytes_ = 0;
    }

    void forget(const Reader* reader) {
        std::lock_guard<std::mutex> lock(state_);
        readers_.erase(reader);
    }

  private:
    std::mutex state_;
    std::unordered_set<const Reader*> readers_;
    int64_t bytes_ = 0;
};

std::atomic<Held*> held{nullptr};

}  // namespace

Reader::Reader(int descriptor, std::string path, int64_t size, bool numbered)
    : descriptor_(descriptor), path_(std::move(path)), size_(size), numbered_(numbered) {
    require_size("descriptor", descriptor);
    require_size("size", size);
}

Reader::~Reader() {
    stop_ahead(descriptor_);
#if defined(__linux__)
    if (const uint8_t* const map = map_) {
        of_this_process(held).forget(this);
        munmap(const_cast<uint8_t*>(map), static_cast<size_t>(size_));
    }
#endif
    close(descriptor_);
}

Told Reader::read(Span span, Way way, const Identity& known, const std::function<Outcome(const OpenFile&)>& deliver) {
    require_size("begin", span.begin);
    require_size("end", span.end, span.begin);
    const auto since = std::chrono::steady_clock::now();
    Told told;
    const bool ahead = follows(span) && run_ahead(descriptor_, span.begin, size_);
    told.from_disk = ahead || (way == Way::MAP_WHAT_IS_THERE && is_missing(descriptor_, span.end - 1));
    const bool mapped = way == Way::MAP || (way == Way::MAP_WHAT_IS_THERE && !told.from_disk);
    const uint8_t* const map = mapped ? mapping() : nullptr;
    told.mapped = map != nullptr;
    told.outcome = span.end > size_ || (map && !reaches(span.end)) ? Outcome{Outcome::ENDED, span.begin}
                                                                   : deliver({descriptor_, map, &spoilt_});
    if (ahead) run_ahead(descriptor_, span.end, size_);  // a reading may be longer than what is brought ahead
    if (map) of_this_process(held).add(this, span.end - span.begin);
    told.same = leads_to(path_.c_str(), known, numbered_);
    told.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
    return told;
}

void Reader::let_go() const {
#if defined(__linux__)
    // Refused, it changes nothing but what the process holds.
    madvise(const_cast<uint8_t*>(map_.load()), static_cast<size_t>(size_), MADV_DONTNEED);
#endif
}

bool Reader::follows(Span span) {
    return std::abs(span.begin - reached_.exchange(span.end)) <= NEXT && span.end - span.begin >= AHEAD_FROM;
}

bool Reader::reaches(int64_t end) const {
    struct stat now;
    return fstat(descriptor_, &now) == 0 && now.st_size >= end;
}

// Of the whole file, made when it is first asked for; null where there is none to be had, and the file is read.
const uint8_t* Reader::mapping() {
    const uint8_t* seen = map_;
#if defined(__linux__)
    if (seen || size_ == 0) return seen;
    const size_t bytes = static_cast<size_t>(size_);
    void* const fresh = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor_, 0);
    if (fresh == MAP_FAILED || map_.compare_exchange_strong(seen, static_cast<const uint8_t*>(fresh))) return map_;
    munmap(fresh, bytes);  // another thread was first
#endif
    return seen;
}

}  // namespace finf
