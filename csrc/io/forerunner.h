// A thread that reads a file ahead of its reader, so that the disk goes on while what it brought is converted.
//
// The system reads ahead by itself, but only when it is asked for more: while a batch is converted and handed over
// nobody asks, and a fast disk has soon nothing left to do. The thread has bytes brought into the page cache, where the
// reader finds them, and copies none. It does so only where the reader has to wait for them.
#pragma once

#include <cstdint>

namespace finf {

// Says that whoever reads this descriptor from front to back has got to byte `reached`, and will go on up to `end`.
// Returns at once, and whether a thread now runs ahead of it: not while the system has the next bytes in memory
// already, or cannot say whether it has.
bool run_ahead(int descriptor, int64_t reached, int64_t end);

// Says that the descriptor is about to be closed, or read elsewhere.
void stop_ahead(int descriptor);

}  // namespace finf
