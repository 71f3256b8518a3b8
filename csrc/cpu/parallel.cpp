#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "../of_this_process.h"

namespace finf {
namespace {

struct Job {
    Job(const std::function<void(int64_t)>& body, int64_t tasks) : body(body), tasks(tasks) {}

    const std::function<void(int64_t)>& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;

    void drain() {
        try {
            for (int64_t task = next++; task < tasks; task = next++) body(task);
        } catch (...) {
            next = tasks;
            std::lock_guard<std::mutex> lock(failing);
            if (!failure) failure = std::current_exception();
        }
    }
};

// Who is woken comes 10 to 20 us late, as long as it takes to convert 512 KiB: a reader of one batch after another is
// better off staying up for the next. Measured (Zen 5, 2 threads): batches of 2 MiB come 1.4 times as fast, of 8 MiB
// 1.15 times. It gives way to whoever wants the core meanwhile, and a sweep takes as long as before.
constexpr std::chrono::microseconds STAYS_UP(50);

// Returns with `ready`, and sleeps only after a while of looking.
template <class Ready>
void await(std::condition_variable& said, std::unique_lock<std::mutex>& lock, const Ready& ready) {
    lock.unlock();
    const auto end = std::chrono::steady_clock::now() + STAYS_UP;
    while (!ready() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    lock.lock();
    said.wait(lock, ready);
}

class Pool {
  public:
    const pid_t process = getpid();

    void run(Job& job, int64_t helpers) {
        std::lock_guard<std::mutex> one_job_at_a_time(entry_);
        for (; workers_ < helpers; ++workers_) std::thread(&Pool::work, this).detach();
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job;
            seats_ = helpers;
        }
        wake_.notify_all();
        job.drain();
        std::unique_lock<std::mutex> lock(state_);
        seats_ = 0;
        await(idle_, lock, [this] { return busy_ == 0; });
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            await(wake_, lock, [this] { return seats_ > 0; });
            --seats_;
            ++busy_;
            Job* job = job_;
            lock.unlock();
            job->drain();
            lock.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    std::mutex entry_, state_;
    std::condition_variable wake_, idle_;
    Job* job_ = nullptr;
    std::atomic<int64_t> seats_{0}, busy_{0};
    int64_t workers_ = 0;
};

std::atomic<Pool*> instead_of_torch{nullptr}, in_background{nullptr};

// How GCC's OpenMP begins a region: a function, what it is given, the number of threads, flags.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

const pid_t loaded_in = getpid();

// The OpenMP that torch loaded for everybody, and none in a forked child, where its threads are gone and a region that
// the parent's team once ran would wait for them for ever.
Region torch_team() {
    static const Region found = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == loaded_in ? found : nullptr;
}

}  // namespace

void parallel_for(int64_t tasks, int64_t threads, const std::function<void(int64_t)>& body) {
    const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
    Job job(body, tasks);
    const Region team = helpers > 0 ? torch_team() : nullptr;
    if (team) {
        team([](void* all) { static_cast<Job*>(all)->drain(); }, &job, static_cast<unsigned>(helpers + 1), 0);
    } else if (helpers > 0) {
        of_this_process(instead_of_torch).run(job, helpers);
    } else {
        job.drain();
    }
    if (job.failure) std::rethrow_exception(job.failure);
}

void background_for(int64_t tasks, int64_t threads, const std::function<void(int64_t)>& body) {
    const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
    Job job(body, tasks);
    if (helpers > 0) {
        of_this_process(in_background).run(job, helpers);
    } else {
        job.drain();
    }
    if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace finf
