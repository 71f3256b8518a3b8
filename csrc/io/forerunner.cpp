#include "forerunner.h"

#if defined(__linux__)
#include <sys/uio.h>
#endif

#if defined(RWF_NOWAIT)  // without it nobody knows what is missing (file.cpp)

#include <errno.h>
#include <fcntl.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "../of_this_process.h"
#include "file.h"

namespace finf {
namespace {

// What is read at a time, and how far ahead. Measured on a disk of 2 GB/s: 4 MiB ahead are as good as none, 32 and 64
// alike; and so much still lies in a processor's last cache when the reader comes for it.
constexpr int64_t PIECE = int64_t{1} << 20, AHEAD = 32 * PIECE;
// Found in memory in a row, after which the thread leaves the file alone: the system keeps ahead of this reader.
constexpr int64_t NOT_NEEDED = 2 * AHEAD;
// No reader that goes on is so far behind: this one begins anew, and what is ahead of where it was is no use to it.
constexpr int64_t GONE_BACK = AHEAD + 2 * PIECE;
// Bytes that may have come with the last ones read.
constexpr int64_t SAME_PAGE = int64_t{1} << 16;
// Read at a time: more files than belong to one sample.
constexpr size_t STREAMS = 4;

// A file that a reader has open, whenever that closes it, and opened a second time: what the system remembers of a
// reader, so as to read ahead for it, belongs to the first opening. Opening may hang, on a network, where duplicating
// a descriptor does not; so the first is done by the thread that is there to wait.
class File {
  public:
    explicit File(int reader) : held_(fcntl(reader, F_DUPFD_CLOEXEC, 0)) {}
    ~File() {
        for (const int descriptor : {held_, own_}) {
            if (descriptor >= 0) close(descriptor);
        }
    }
    int descriptor() {
        if (own_ < 0) own_ = open(("/proc/self/fd/" + std::to_string(held_)).c_str(), O_RDONLY | O_CLOEXEC);
        return own_;
    }

    // Waits until these bytes are in memory; false where they do not come. Not a byte is copied: a pass over 80 MB took
    // 43 ms when they were read and thrown away, 39 so, as on a free machine the disk alone.
    bool bring(int64_t first, int64_t bytes) {
        static const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
        off_t at = static_cast<off_t>(first);
        const int64_t end = first + bytes;
        while (at < end) {
            if (sendfile(nowhere, descriptor(), &at, static_cast<size_t>(end - at)) <= 0) return false;
        }
        return true;
    }

  private:
    const int held_;
    int own_ = -1;
};

struct Stream {
    std::shared_ptr<File> file;  // none: the place is free
    int reader = -1;
    int64_t reached = 0, at = 0, end = 0, found = 0, call = 0;

    bool waiting() const { return file && at < std::min(end, reached + AHEAD); }
};

class Forerunner {
  public:
    const pid_t process = getpid();

    bool run(int reader, int64_t reached, int64_t end) {
        if (follow(reader, reached, end)) return true;
        if (!is_missing(reader, std::min(reached + SAME_PAGE, end - 1))) return false;
        start(reader, reached);
        return follow(reader, reached, end);
    }

    void stop(int reader) {
        std::lock_guard<std::mutex> lock(state_);
        if (Stream* const stream = of(reader)) *stream = {};
    }

  private:
    Stream* of(int reader) {
        const auto is_of = [=](const Stream& each) { return each.file && each.reader == reader; };
        Stream* const found = std::find_if(std::begin(streams_), std::end(streams_), is_of);
        return found == std::end(streams_) ? nullptr : found;
    }

    bool follow(int reader, int64_t reached, int64_t end) {
        std::lock_guard<std::mutex> lock(state_);
        Stream* const stream = of(reader);
        if (!stream) return false;
        if (stream->at - reached > GONE_BACK) {
            *stream = {};
            return false;
        }
        stream->reached = reached;
        stream->at = std::max(stream->at, reached);
        stream->end = end;
        stream->call = ++calls_;
        wake_.notify_one();
        return true;
    }

    // In the place whose reader has not been heard of for longest, if it has all it needs.
    void start(int reader, int64_t reached) {
        std::lock_guard<std::mutex> lock(state_);
        const auto earlier = [](const Stream& a, const Stream& b) { return a.call < b.call; };
        Stream* const oldest = std::min_element(std::begin(streams_), std::end(streams_), earlier);
        if (oldest->waiting() || of(reader) || !has_thread()) return;
        *oldest = {std::make_shared<File>(reader), reader, reached, reached, 0, 0, 0};
    }

    // A process that may have no more threads reads as fast as it can without.
    bool has_thread() {
        try {
            if (!working_) std::thread(&Forerunner::work, this).detach();
            working_ = true;
        } catch (const std::system_error&) {
        }
        return working_;
    }

    // The one whose reader is closest behind.
    Stream* next() {
        Stream* nearest = nullptr;
        for (Stream& stream : streams_) {
            if (!stream.waiting()) continue;
            if (!nearest || stream.at - stream.reached < nearest->at - nearest->reached) nearest = &stream;
        }
        return nearest;
    }

    void work() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            Stream* stream = nullptr;
            wake_.wait(lock, [&] { return (stream = next()) != nullptr; });
            const auto file = stream->file;  // held: `stop` may come while it is read
            const int64_t at = stream->at, bytes = std::min(PIECE, stream->end - at);
            lock.unlock();
            const bool missing = is_missing(file->descriptor(), at);
            const bool more = file->bring(at, bytes);  // an error is the reader's to meet, and to tell
            lock.lock();
            if (stream->file != file) continue;
            stream->at = std::max(stream->at, at + bytes);
            stream->found = missing ? 0 : stream->found + bytes;
            if (!more || stream->at >= stream->end || stream->found >= NOT_NEEDED) *stream = {};
        }
    }

    std::mutex state_;
    std::condition_variable wake_;
    Stream streams_[STREAMS];
    int64_t calls_ = 0;
    bool working_ = false;
};

std::atomic<Forerunner*> forerunner{nullptr};

}  // namespace

bool run_ahead(int descriptor, int64_t reached, int64_t end) {
    return reached < end && of_this_process(forerunner).run(descriptor, reached, end);
}

void stop_ahead(int descriptor) {
    const Forerunner* const there = forerunner.load();
    if (there && there->process == getpid()) of_this_process(forerunner).stop(descriptor);
}

}  // namespace finf

#else

namespace finf {

bool run_ahead(int, int64_t, int64_t) { return false; }
void stop_ahead(int) {}

}  // namespace finf

#endif
