#include "file.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#endif

namespace finf {
namespace {

// Linux takes no more than 2 GiB less a page in one call.
constexpr int64_t MOST_BYTES = int64_t{1} << 30;

#if defined(__linux__)
constexpr int POPULATE_READ = 22;  // MADV_POPULATE_READ of Linux 5.14, which older headers do not name

// The error with which the pages of a mapping could not be brought in, or 0.
int populate(const uint8_t* map, int64_t first, int64_t bytes) {
    static const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t from = first / page * page;
    while (madvise(const_cast<uint8_t*>(map) + from, static_cast<size_t>(first - from + bytes), POPULATE_READ) != 0) {
        if (errno != EINTR && errno != EAGAIN) return errno;
    }
    return 0;
}
#endif

}  // namespace

Outcome read_at(int descriptor, uint8_t* to, int64_t first, int64_t bytes) {
    const int64_t end = first + bytes;
    while (first < end) {
        const size_t wanted = static_cast<size_t>(std::min(end - first, MOST_BYTES));
        const ssize_t got = pread(descriptor, to, wanted, static_cast<off_t>(first));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return {got < 0 ? errno : Outcome::ENDED, first};
        to += got;
        first += got;
    }
    return {};
}

bool is_missing(int descriptor, int64_t byte) {
#if defined(RWF_NOWAIT)  // since glibc 2.27, and not in every other C library
    char room;
    const struct iovec one = {&room, 1};
    return preadv2(descriptor, &one, 1, static_cast<off_t>(byte), RWF_NOWAIT) < 0 && errno == EAGAIN;
#else
    static_cast<void>(descriptor), static_cast<void>(byte);
    return false;
#endif
}

Seen bring_in(const OpenFile& file, uint8_t* room, int64_t first, int64_t bytes) {
#if defined(__linux__)
    if (file.map) {
        const int error = populate(file.map, first, bytes);
        // EINVAL: a kernel before 5.14. Looking at the mapping unasked could end the process, so the file is read.
        if (error != EINVAL) return {file.map + first, {error, first}};
    }
#endif
    return {room, read_at(file.descriptor, room, first, bytes)};
}

bool leads_to(const char* path, const Identity& known, bool numbered) {
#if defined(__linux__)
    struct stat now;
    if (stat(path, &now) != 0) return false;
    const auto nanoseconds = [](const timespec& at) {
        return static_cast<uint64_t>(at.tv_sec) * 1000000000 + static_cast<uint64_t>(at.tv_nsec);
    };
    const bool same = now.st_dev == known.device && now.st_ino == known.inode;
    return (same || !numbered) && now.st_size == known.size && nanoseconds(now.st_mtim) == known.changed_ns &&
           nanoseconds(now.st_ctim) == known.touched_ns;
#else
    static_cast<void>(path), static_cast<void>(known), static_cast<void>(numbered);
    return false;  // the caller asks Python
#endif
}

bool on_network(int descriptor) {
#if defined(__linux__)
    // statfs(2): NFS, SMB, SMB2, CIFS, FUSE (sshfs, s3fs and their like), 9p, Ceph, Lustre, GPFS, BeeGFS, OrangeFS,
    // AFS.
    constexpr uint32_t NETWORKS[] = {0x6969,     0x517B,     0xFE534D42, 0xFF534D42, 0x65735546, 0x01021997,
                                     0x00C36400, 0x0BD00BD0, 0x47504653, 0x19830326, 0x20030528, 0x5346414F};
    struct statfs about;
    if (fstatfs(descriptor, &about) != 0) return false;
    const uint32_t kind = static_cast<uint32_t>(about.f_type);
    return std::find(std::begin(NETWORKS), std::end(NETWORKS), kind) != std::end(NETWORKS);
#else
    static_cast<void>(descriptor);
    return false;
#endif
}

}  // namespace finf
