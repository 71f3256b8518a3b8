// Memory of batches, used again: a slot comes back when the last that looks at it is gone, never before.
//
// A batch of many megabytes in new memory costs more for the system's zeroing of its pages than for its bytes.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace finf {

// The slots of one corpus. Not safe by itself: its callers hold the interpreter's lock.
class Slots {
  public:
    struct Free {
        void operator()(uint8_t* memory) const;
    };
    struct Slot {
        std::unique_ptr<uint8_t, Free> memory;  // from the start of a cache line on, of large slots of a large page
        int64_t bytes = 0;
    };

    // At most so many slots wait, and together so many bytes.
    Slots(int64_t kept, int64_t kept_bytes);
    // One that waits, large enough and not wastefully so, or a new one. Throws std::bad_alloc.
    Slot take(int64_t bytes);
    void give_back(Slot slot);
    std::vector<int64_t> waiting() const;

  private:
    const int64_t kept_, kept_bytes_;
    int64_t bytes_ = 0;
    std::deque<Slot> waiting_;
};

// A slot that is lent: its end is that of the last tensor that looks at it.
class Lease {
  public:
    Lease(std::shared_ptr<Slots> from, int64_t bytes) : from_(std::move(from)), slot_(from_->take(bytes)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { from_->give_back(std::move(slot_)); }
    uint8_t* first() const { return slot_.memory.get(); }
    int64_t bytes() const { return slot_.bytes; }

  private:
    const std::shared_ptr<Slots> from_;
    Slots::Slot slot_;
};

}  // namespace finf
