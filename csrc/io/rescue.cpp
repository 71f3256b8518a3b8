#include "rescue.h"

#if defined(__linux__)

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>

namespace finf {
namespace {

static_assert(Spoilt::is_always_lock_free, "a signal's handler may take no lock");

struct Watched {
    uintptr_t begin, end, page;  // whole pages, of so many bytes; none: 0, 0
    Spoilt* spoilt;
};

// The signal comes to the thread that looked. Its constructor has touched this memory before, so it is there.
thread_local Watched watched = {0, 0, 0, nullptr};
// This thread is inside the handler that was there before ours; it has been there, at some time.
thread_local volatile sig_atomic_t passing = 0, passed = 0;
struct sigaction before;
std::mutex installing;
// A fork waits until nobody installs, or the child would find the lock held for good.
[[maybe_unused]] const int free_in_a_fork =
    pthread_atfork([] { installing.lock(); }, [] { installing.unlock(); }, [] { installing.unlock(); });

// The process ends, as it would have without us: by the instruction, which is tried again, or by the signal again where
// somebody sent it.
void end_process(int number, const siginfo_t* about) {
    signal(number, SIG_DFL);
    if (about->si_code <= 0) raise(number);
}

// What the process did about this signal before we came. A handler that we came after may come back to us: by calling
// us, or, as Python's faulthandler does when it has printed what it knows, by raising the signal again.
void pass_on(int number, siginfo_t* about, void* context) {
    const bool asks = before.sa_flags & SA_SIGINFO;
    const bool handles = asks || (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN);
    if (!handles || passing || (passed && about->si_code <= 0)) return end_process(number, about);
    passing = passed = 1;
    asks ? before.sa_sigaction(number, about, context) : before.sa_handler(number);
    passing = 0;
}

void on_bus_error(int number, siginfo_t* about, void* context) {
    const uintptr_t where = reinterpret_cast<uintptr_t>(about->si_addr);
    const bool mine = about->si_code > 0 && where >= watched.begin && where < watched.end;
    if (!mine) return pass_on(number, about, context);
    // Before the zeros are there for other threads to read, who look here afterwards.
    watched.spoilt->store(1);
    void* page = reinterpret_cast<void*>(where / watched.page * watched.page);
    // mmap is a plain system call, which a handler may make. Where it fails, so will the instruction.
    const void* zeros = mmap(page, watched.page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (zeros == MAP_FAILED) pass_on(number, about, context);
}

bool is_ours(const struct sigaction& action) {
    return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_bus_error;
}

}  // namespace

// Only where a mapping is read: elsewhere the process's signals stay untouched.
void Rescue::stand_by() {
    struct sigaction now;
    if (sigaction(SIGBUS, nullptr, &now) != 0 || is_ours(now)) return;
    const std::lock_guard<std::mutex> lock(installing);
    if (sigaction(SIGBUS, nullptr, &now) != 0 || is_ours(now)) return;
    before = now;
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, nullptr);
}

Rescue::Rescue(const uint8_t* first, int64_t bytes, Spoilt* spoilt) : spoilt_(first ? spoilt : nullptr) {
    if (!first) return;
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t from = reinterpret_cast<uintptr_t>(first), end = from + static_cast<uintptr_t>(bytes);
    watched = {from / page * page, (end + page - 1) / page * page, page, spoilt};
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

Rescue::~Rescue() { watched = {0, 0, 0, nullptr}; }

bool Rescue::needed() const {
    std::atomic_thread_fence(std::memory_order_acquire);  // after what was read, as zeros were there after the mark
    return spoilt_ && spoilt_->load();
}

}  // namespace finf

#else

namespace finf {

// Elsewhere nothing is read through a mapping (file.cpp).
void Rescue::stand_by() {}
Rescue::Rescue(const uint8_t*, int64_t, Spoilt*) : spoilt_(nullptr) {}
Rescue::~Rescue() {}
bool Rescue::needed() const { return spoilt_ && spoilt_->load(); }

}  // namespace finf

#endif
