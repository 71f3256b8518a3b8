"""A file system that a process serves, as network disks are: one folder's files by Linux's FUSE protocol, spoken here.

`python served_disk.py SOURCE PLACE COMMAND...` mounts SOURCE's files at PLACE, runs the command, ends with its status.
While SOURCE holds a file named `fails`, what is read breaks off with an input/output error, also what the kernel had
kept. Every look at a name finds it under another number, as some network file systems have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import struct
import subprocess
import sys
import threading

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, BATCH_FORGET = 1, 2, 3, 14, 15, 17, 18, 25, 26, 42
INVALIDATE = 2  # what the server tells of its own accord
ROOT, DIRECTORY = 1, 0o040755


class Server:
    """Answers the kernel's requests on one descriptor, until it is unmounted."""

    def __init__(self, source: str, descriptor: int):
        self.source, self.descriptor = source, descriptor
        self.names, self.numbers, self.failing = {}, itertools.count(ROOT + 1), False

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.descriptor, 1 << 18)
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.EBADF):
                    return
                continue
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            if opcode in (FORGET, BATCH_FORGET):
                continue
            try:
                answer, status = self.answer(opcode, node, request[40:]), 0
            except OSError as error:
                answer, status = b"", -error.errno
            os.write(self.descriptor, struct.pack("<IiQ", 16 + len(answer), status, unique) + answer)

    def answer(self, opcode: int, node: int, body: bytes) -> bytes:
        if opcode == INIT:
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, 1 << 17, 0, 12, 9, 1 << 17, 1, 0, 0, *(0,) * 8)
        if opcode == LOOKUP:
            name = body.rstrip(b"\0").decode()
            os.stat(f"{self.source}/{name}")
            self.notice()
            number = next(self.numbers)
            self.names[number] = name
            return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + self.attributes(number)
        if opcode == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if opcode == OPEN:
            return struct.pack("<QII", 0, 0, 0)
        if opcode == READ:
            return self.read(node, *struct.unpack_from("<QQI", body)[1:])
        if opcode == STATFS:
            return struct.pack("<5Q4I6I", 1, 0, 0, 1, 0, 4096, 255, 4096, *(0,) * 7)
        if opcode in (RELEASE, FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not served")

    def notice(self) -> None:
        """At the first look since it fails, have the kernel drop its pages; not in this thread, which it may ask."""
        before, self.failing = self.failing, os.path.exists(f"{self.source}/fails")
        if self.failing and not before:
            threading.Thread(target=self.let_go, args=(list(self.names),)).start()

    def let_go(self, nodes: list[int]) -> None:
        for node in nodes:
            with contextlib.suppress(OSError):  # the kernel has forgotten it
                os.write(self.descriptor, struct.pack("<IiQQqq", 40, INVALIDATE, 0, node, 0, 0))

    def attributes(self, node: int) -> bytes:
        if node == ROOT:
            return struct.pack("<6Q10I", ROOT, *(0,) * 8, DIRECTORY, 2, 0, 0, 0, 4096, 0)
        there = os.stat(f"{self.source}/{self.names[node]}")
        times = [divmod(at, 10**9) for at in (there.st_atime_ns, there.st_mtime_ns, there.st_ctime_ns)]
        seconds, rest = zip(*times, strict=True)
        return struct.pack("<6Q10I", node, there.st_size, 8, *seconds, *rest, there.st_mode, 1, 0, 0, 0, 4096, 0)

    def read(self, node: int, offset: int, size: int) -> bytes:
        if os.path.exists(f"{self.source}/fails"):
            raise OSError(errno.EIO, "broken off")
        with open(f"{self.source}/{self.names[node]}", "rb") as file:
            return os.pread(file.fileno(), size, offset)


def main(source: str, place: str, *command: str) -> int:
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"served", os.fsencode(place), b"fuse", 0, options.encode()):
        print(f"not mounted: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 77
    threading.Thread(target=Server(source, descriptor).serve, daemon=True).start()
    status = subprocess.run(command).returncode  # a process of its own: this one answers it
    libc.umount2(os.fsencode(place), 2)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
