// A mapped file can shrink, or its disk fail, between the check of a page and its use; the system then sends SIGBUS,
// which ends the process. While a Rescue lives, its thread finds zeros there instead, and is told.
#pragma once

#include <cstdint>

#include "file.h"

namespace finf {

class Rescue {
  public:
    // Before the first of a row of them: makes this process's handler of the signal ours, again if it is another by now
    // (Python's faulthandler, once it is enabled).
    static void stand_by();

    // Of bytes [first, first + bytes) of a mapping; a null first asks for nothing. One at a time in a thread.
    Rescue(const uint8_t* first, int64_t bytes, Spoilt* spoilt);
    ~Rescue();
    Rescue(const Rescue&) = delete;
    Rescue& operator=(const Rescue&) = delete;

    // Whether what was read may be zeros that are not the file's: this thread was rescued, or another was in the same
    // mapping, whose pages are everybody's.
    bool needed() const;

  private:
    const Spoilt* spoilt_;
};

}  // namespace finf
