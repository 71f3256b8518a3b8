#include "reader.h"

#include <errno.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <utility>

#include "../check.h"
#include "forerunner.h"
#include "held.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace finf {
namespace {

// Between the end of a reading and the next, for which that follows it (windows overlap by a token); and of one that is
// worth running ahead of: what is smaller, an index's piece above all, says little of what comes next.
constexpr int64_t NEXT = 4096, AHEAD_FROM = int64_t{1} << 17;

}  // namespace

Reader::Reader(int descriptor, std::string path, int64_t size, bool numbered, int64_t reached)
    : descriptor_(descriptor), path_(std::move(path)), size_(size), numbered_(numbered), reached_(reached) {
    require_size("descriptor", descriptor);
    require_size("size", size);
}

Reader::~Reader() {
    stop_ahead(descriptor_);
#if defined(__linux__)
    if (const uint8_t* const map = map_) {
        forget(map);
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
    told.no_trial = ahead || (way == Way::MAP_WHAT_IS_THERE && is_missing(descriptor_, span.end - 1));
    const bool mapped = way == Way::MAP || (way == Way::MAP_WHAT_IS_THERE && !told.no_trial);
    errno = 0;
    const uint8_t* const map = mapped ? mapping() : nullptr;
    const int refused = way == Way::MAP && !map ? errno : 0;
    told.mapped = map != nullptr;
    told.no_trial |= told.mapped != mapped;
    told.outcome = refused            ? Outcome{refused, span.begin}
                   : span.end > size_ ? Outcome{Outcome::ENDED, size_}
                                      : deliver({descriptor_, map, &spoilt_, size_});
    if (ahead) run_ahead(descriptor_, span.end, size_);  // a reading may be longer than what is brought ahead
    told.same = leads_to(path_.c_str(), known, numbered_);
    told.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
    return told;
}

bool Reader::follows(Span span) {
    return std::abs(span.begin - reached_.exchange(span.end)) <= NEXT && span.end - span.begin >= AHEAD_FROM;
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
