// Put before the C library with LD_PRELOAD, this makes a disk fail on purpose. FAULT_AT names the file, FAULT_KIND what
// happens to it: "eio" reading from byte FAULT_FROM on is an input/output error; "shreds" a reading returns at most 7
// bytes, and every other one is interrupted; "cut" the file is cut to FAULT_FROM bytes right after pages of its mapping
// were brought in; "torn" the first page that was brought in is unreadable after all, of the first such call and of
// every FAULT_FROM-th after it; "full" writing in the folder FAULT_AT fails after FAULT_FROM calls, for want of room;
// "old" the system does not know how to bring in the pages of a mapping, as Linux before 5.14.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_kind(const char* kind) {
    const char* set = getenv("FAULT_KIND");
    return set && strcmp(set, kind) == 0;
}

static long from(void) { return atol(getenv("FAULT_FROM")); }

static int is_meant(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, getenv("FAULT_AT"), strlen(getenv("FAULT_AT"))) == 0;
}

static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

// Bytes that may be read now, or -1 with errno set.
static ssize_t allowed(int descriptor, size_t wanted, off_t at) {
    static __thread int turn;
    if (is_kind("eio") && is_meant(descriptor) && at + (off_t)wanted > from()) {
        errno = EIO;
        if (at >= from()) return -1;
        return from() - at;
    }
    if (is_kind("shreds") && is_meant(descriptor)) {
        errno = EINTR;
        if (turn++ % 2) return -1;
        return wanted < 7 ? wanted : 7;
    }
    return wanted;
}

static ssize_t read_some(const char* name, int descriptor, void* to, size_t wanted, off_t at) {
    const ssize_t count = allowed(descriptor, wanted, at);
    return count < 0 ? -1 : ((ssize_t (*)(int, void*, size_t, off_t))real(name))(descriptor, to, count, at);
}

ssize_t pread(int descriptor, void* to, size_t wanted, off_t at) {
    return read_some("pread", descriptor, to, wanted, at);
}
ssize_t pread64(int descriptor, void* to, size_t wanted, off_t at) {
    return read_some("pread64", descriptor, to, wanted, at);
}
// Python gives one piece.
ssize_t preadv(int descriptor, const struct iovec* to, int pieces, off_t at) {
    return pieces == 1 ? pread(descriptor, to->iov_base, to->iov_len, at) : -1;
}
ssize_t preadv64(int descriptor, const struct iovec* to, int pieces, off_t at) {
    return preadv(descriptor, to, pieces, at);
}

// Where the next bytes come from is the descriptor's own business.
ssize_t read(int descriptor, void* to, size_t wanted) {
    const ssize_t count = allowed(descriptor, wanted, lseek(descriptor, 0, SEEK_CUR));
    return count < 0 ? -1 : ((ssize_t (*)(int, void*, size_t))real("read"))(descriptor, to, count);
}
// What `read` is compiled to where the room behind the pointer is known.
ssize_t __read_chk(int descriptor, void* to, size_t wanted, size_t room) {
    if (wanted > room) abort();
    return read(descriptor, to, wanted);
}

static ssize_t write_some(const char* name, int descriptor, const void* data, size_t count, off_t at) {
    static int calls;
    if (is_kind("full") && is_meant(descriptor) && ++calls > from()) {
        errno = ENOSPC;
        return -1;
    }
    return ((ssize_t (*)(int, const void*, size_t, off_t))real(name))(descriptor, data, count, at);
}

ssize_t pwrite(int descriptor, const void* data, size_t count, off_t at) {
    return write_some("pwrite", descriptor, data, count, at);
}
ssize_t pwrite64(int descriptor, const void* data, size_t count, off_t at) {
    return write_some("pwrite64", descriptor, data, count, at);
}

// The page of a file that has none: to look there is the signal that a failed reading is.
static void tear(void* page) {
    const int nothing = memfd_create("nothing", 0);
    if (mmap(page, sysconf(_SC_PAGESIZE), PROT_READ, MAP_SHARED | MAP_FIXED, nothing, 0) == MAP_FAILED) abort();
    close(nothing);
}

int madvise(void* first, size_t bytes, int advice) {
    // 22: MADV_POPULATE_READ
    if (is_kind("old") && advice == 22) {
        errno = EINVAL;
        return -1;
    }
    const int done = ((int (*)(void*, size_t, int))real("madvise"))(first, bytes, advice);
    if (is_kind("cut") && advice == 22 && truncate(getenv("FAULT_AT"), from()) != 0) abort();
    static atomic_long calls;
    if (is_kind("torn") && advice == 22 && atomic_fetch_add(&calls, 1) % from() == 0) tear(first);
    return done;
}
