// Room for a loop's buffers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace finf {

// Float32 zeros from the start of a cache line on: a vector that lies across two lines costs twice as much.
class Scratch {
  public:
    explicit Scratch(int64_t count) : room_(static_cast<size_t>(count) + LINE) {
        const uintptr_t past = reinterpret_cast<uintptr_t>(room_.data()) / sizeof(float) % LINE;
        first_ = room_.data() + (LINE - past) % LINE;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* data() { return first_; }

  private:
    static constexpr size_t LINE = 16;  // numbers of a line of 64 bytes
    std::vector<float> room_;
    float* first_;
};

// Uninitialized numbers on a cache line's border.
class Buffer {
  public:
    explicit Buffer(int64_t count) : memory_(new float[static_cast<size_t>(count) + LINE]) {}

    float* get() const {
        const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
        return memory_.get() + (LINE - address / sizeof(float) % LINE) % LINE;
    }

  private:
    static constexpr size_t LINE = 16;
    std::unique_ptr<float[]> memory_;
};

}  // namespace finf
