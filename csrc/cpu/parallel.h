// A small thread pool: not OpenMP, because torch carries a libgomp of its own and two of them fight over the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace finf {

// Calls body(0) ... body(tasks - 1), each once, on at most `threads` threads, the caller's among them, and returns when
// all are done. Which thread takes which task is not fixed, so a task must write only what is its own. The first
// exception stops the tasks not yet begun and is thrown here. Threads start at first use, and again after a fork.
void parallel_for(int64_t tasks, int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace finf
