// Work shared among threads. Those of torch's own OpenMP, where it is there to be asked: they spin for milliseconds
// after each of torch's operations, and any other thread would wait for a core meanwhile (a layer of 3.6 ms took 7.7).
// A second OpenMP linked into this module would do the same harm, so the one that is loaded is called by its symbol.
// Where there is none, and in a forked child, a small pool takes its place.
#pragma once

#include <cstdint>
#include <functional>

namespace finf {

// Calls body(0) ... body(tasks - 1), each once, on at most `threads` threads, the caller's among them, and returns when
// all are done. Which thread takes which task is not fixed, so a task must write only what is its own. The first
// exception stops the tasks not yet begun and is thrown here. The pool starts at first use, and again after a fork.
void parallel_for(int64_t tasks, int64_t threads, const std::function<void(int64_t)>& body);

// The same on threads of this module's own, which sleep while there is nothing to do, never on torch's: for what runs
// beside a model. A second caller of torch's OpenMP would have a second team made, and the two would fight for cores.
void background_for(int64_t tasks, int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace finf
