#include "held.h"

#if defined(__linux__)

#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <unordered_map>

#include "../of_this_process.h"

namespace finf {
namespace {

constexpr int64_t MOST = int64_t{1} << 24;

// A forked child has its own, and of its parent's mappings those that it looks at itself.
class Held {
  public:
    const pid_t process = getpid();

    void add(const OpenFile& file, int64_t bytes) {
        std::lock_guard<std::mutex> lock(state_);
        sizes_[file.map] = file.size;
        bytes_ += bytes;
        if (bytes_ < MOST) return;
        // Refused, it changes nothing but what the process holds.
        for (const auto& [map, size] : sizes_)
            madvise(const_cast<uint8_t*>(map), static_cast<size_t>(size), MADV_DONTNEED);
        sizes_.clear();
        bytes_ = 0;
    }

    void forget(const uint8_t* map) {
        std::lock_guard<std::mutex> lock(state_);
        sizes_.erase(map);
    }

  private:
    std::mutex state_;
    std::unordered_map<const uint8_t*, int64_t> sizes_;
    int64_t bytes_ = 0;
};

std::atomic<Held*> held{nullptr};

}  // namespace

void looked_at(const OpenFile& file, int64_t first, int64_t bytes) {
    static const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t pages = (first + bytes + page - 1) / page - first / page;
    of_this_process(held).add(file, pages * page);
}

void forget(const uint8_t* map) { of_this_process(held).forget(map); }

}  // namespace finf

#else

namespace finf {

// Elsewhere nothing is read through a mapping (file.cpp).
void looked_at(const OpenFile&, int64_t, int64_t) {}
void forget(const uint8_t*) {}

}  // namespace finf

#endif
