#include "slots.h"

#include <cstdlib>
#include <new>
#include <utility>

#include "../check.h"

namespace finf {
namespace {

// A cache line, and the widest vector; a page as large as the system has where a slot fills one, for its own would be
// looked up five hundred times.
constexpr int64_t LINE = 64, LARGE_PAGE = int64_t{1} << 21;
// A slot this many times larger than what is asked for is left for who needs it.
constexpr int64_t WASTEFUL = 4;

uint8_t* allocate(int64_t bytes) {
    const int64_t alignment = bytes >= LARGE_PAGE ? LARGE_PAGE : LINE;
    void* memory = nullptr;
    if (posix_memalign(&memory, static_cast<size_t>(alignment), static_cast<size_t>(bytes)) != 0)
        throw std::bad_alloc();
    return static_cast<uint8_t*>(memory);
}

}  // namespace

void Slots::Free::operator()(uint8_t* memory) const { std::free(memory); }

Slots::Slots(int64_t kept, int64_t kept_bytes) : kept_(kept), kept_bytes_(kept_bytes) {
    require_size("kept", kept);
    require_size("kept_bytes", kept_bytes);
}

Slots::Slot Slots::take(int64_t bytes) {
    require_size("bytes", bytes, 1);
    for (auto slot = waiting_.begin(); slot != waiting_.end(); ++slot) {
        if (slot->bytes < bytes || slot->bytes / WASTEFUL > bytes) continue;
        Slot found = std::move(*slot);
        waiting_.erase(slot);
        bytes_ -= found.bytes;
        return found;
    }
    return {std::unique_ptr<uint8_t, Free>(allocate(bytes)), bytes};
}

void Slots::give_back(Slot slot) {
    if (slot.bytes > kept_bytes_) return;
    bytes_ += slot.bytes;
    waiting_.push_back(std::move(slot));
    while (static_cast<int64_t>(waiting_.size()) > kept_ || bytes_ > kept_bytes_) {
        bytes_ -= waiting_.front().bytes;
        waiting_.pop_front();
    }
}

std::vector<int64_t> Slots::waiting() const {
    std::vector<int64_t> sizes;
    for (const Slot& slot : waiting_) sizes.push_back(slot.bytes);
    return sizes;
}

}  // namespace finf
