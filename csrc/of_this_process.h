// What has threads, in a process that may be forked: they do not survive it, and a mutex may be forked while held.
#pragma once

#include <unistd.h>

#include <atomic>

namespace finf {

// The one of this process, made when it is first asked for; T has the `pid_t process` it was made in. A child leaves
// its parent's untouched and makes its own. None is ever destroyed: its threads may be waiting when the process ends.
template <class T>
T& of_this_process(std::atomic<T*>& current) {
    T* seen = current.load();
    if (seen && seen->process == getpid()) return *seen;
    T* fresh = new T;
    if (current.compare_exchange_strong(seen, fresh)) return *fresh;
    delete fresh;
    return *current.load();
}

}  // namespace finf
