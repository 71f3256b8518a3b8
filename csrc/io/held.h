// How much of mappings the process holds: not more than some megabytes, of all files together.
//
// A page that was looked at counts as the process's memory until it is let go of, which stops all its threads; so pages
// are let go of many at a time. Measured (Zen 3, a virtual machine, 768 KiB brought in by two threads): 48 us where
// each 120 KiB was let go of by itself, 14 us where all were together.
#pragma once

#include "file.h"

namespace finf {

// Bytes [first, first + bytes) of a mapping were looked at, and the copy of them is done. Every so often this lets go
// of all pages of all mappings: who looks at one meanwhile has it brought in again, watched over as before (rescue.h).
void looked_at(const OpenFile& file, int64_t first, int64_t bytes);

// A mapping is about to end.
void forget(const uint8_t* map);

}  // namespace finf
