// Memory that is about to be written for the first time.
#pragma once

#include <cstdint>

namespace finf {

// Asks the system for large pages where a result of this size is new: its first touch, page by page, can cost several
// times the writing (measured in a virtual machine: 1.9 microseconds for 4 KiB, so 2 GB/s; 20 GB/s with large pages).
// A hint, kept by the memory until it is given back; elsewhere than on Linux nothing happens.
void expect_writing(void* first, int64_t bytes);

}  // namespace finf
