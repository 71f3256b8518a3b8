// The border of files and slots with Python (border.h).
#include "../border.h"

#include <pybind11/stl.h>

#include <tuple>

#include "../check.h"
#include "deliver.h"
#include "file.h"
#include "reader.h"
#include "slots.h"

namespace finf {
namespace {

// What a file was: device, inode, size, times of change of content and of attributes in ns.
using KnownAs = std::tuple<uint64_t, uint64_t, int64_t, uint64_t, uint64_t>;

Identity identity(const KnownAs& known) {
    const auto& [device, inode, size, changed_ns, touched_ns] = known;
    return {device, inode, size, changed_ns, touched_ns};
}

// Rows of a reading; see deliver.h.
struct Rows {
    uintptr_t starts;
    int64_t first, step;
    uintptr_t lengths;
    int64_t R, length, threads;

    FileRows in(const OpenFile& file) const {
        return {file, memory<int64_t>(starts), first, step, memory<int64_t>(lengths), R, length, threads};
    }
};

// (errno or -1 for an early end, byte, mapped, no_trial, same, seconds)
using Answer = std::tuple<int, int64_t, bool, bool, bool, double>;

Answer answer(Reader& reader, int way, const KnownAs& known, int64_t begin, int64_t end,
              const std::function<Outcome(const OpenFile&)>& deliver) {
    require(way >= 0 && way <= 2, "way", "a code from 0 to 2", way);
    const Told told = reader.read({begin, end}, static_cast<Way>(way), identity(known), deliver);
    return {told.outcome.error, told.outcome.byte, told.mapped, told.no_trial, told.same, told.seconds};
}

Answer integers(Reader& reader, int way, const KnownAs& known, int64_t begin, int64_t end, uintptr_t starts,
                int64_t first, int64_t step, uintptr_t lengths, int64_t R, int64_t length, int64_t threads, int stored,
                int64_t fill, uintptr_t out) {
    const Rows rows = {starts, first, step, lengths, R, length, threads};
    return answer(reader, way, known, begin, end, [&](const OpenFile& file) {
        return deliver_integers(rows.in(file), require_stored("stored", stored), fill, memory<int64_t>(out));
    });
}

Answer raw(Reader& reader, int way, const KnownAs& known, int64_t begin, int64_t end, uintptr_t starts, int64_t first,
           int64_t step, uintptr_t lengths, int64_t R, int64_t length, int64_t threads, int64_t item, int64_t fill,
           uintptr_t out) {
    const Rows rows = {starts, first, step, lengths, R, length, threads};
    return answer(reader, way, known, begin, end,
                  [&](const OpenFile& file) { return deliver_raw(rows.in(file), item, fill, memory<uint8_t>(out)); });
}

Answer pixels(Reader& reader, int way, const KnownAs& known, int64_t begin, int64_t end, uintptr_t starts,
              int64_t first, int64_t step, uintptr_t lengths, int64_t R, int64_t length, int64_t threads,
              const Shades& shades, uintptr_t out) {
    const Rows rows = {starts, first, step, lengths, R, length, threads};
    return answer(reader, way, known, begin, end,
                  [&](const OpenFile& file) { return deliver_pixels(rows.in(file), shades, memory<void>(out)); });
}

std::unique_ptr<Shades> shades(uintptr_t tables, int64_t word, int64_t C, int64_t run, uintptr_t mean, uintptr_t std) {
    return std::make_unique<Shades>(memory<void>(tables), word, C, run, memory<float>(mean), memory<float>(std));
}

std::unique_ptr<Reader> reader(int descriptor, std::string path, int64_t size, bool numbered, int64_t reached) {
    return std::make_unique<Reader>(descriptor, std::move(path), size, numbered, reached);
}

void bind_reader(py::module_& module) {
    const auto unlocked = py::call_guard<Unlocked>();
    py::class_<Reader, std::shared_ptr<Reader>>(
        module, "Reader",
        "An opening of a file. Rows of it, from bytes starts (R) int64, or first + r step where it is 0, each of "
        "lengths (R) int64 or `length` items, all in [begin, end) -> out. way: 0 read, 1 mapped, 2 mapped unless the "
        "disk has yet to bring it. Returns (errno, byte, mapped, no_trial, same, seconds): errno 0 when all is well, "
        "-1 where the file ends too early; same: whether its name leads to it still.")
        .def(py::init(&reader), "descriptor"_a, "path"_a, "size"_a, "numbered"_a, "reached"_a = 0,
             "Owns the descriptor. Device and inode are part of what a file was only where numbered.")
        .def("deliver_integers", integers, unlocked, "way"_a, "known"_a, "begin"_a, "end"_a, "starts"_a, "first"_a,
             "step"_a, "lengths"_a, "R"_a, "length"_a, "threads"_a, "stored"_a, "fill"_a, "out"_a,
             "-> (R,length) int64, short rows filled up. stored: 0 uint8, 1 int8, 2 uint16, 3 int16, 4 uint32, 5 "
             "int32, 6 int64.")
        .def("deliver_raw", raw, unlocked, "way"_a, "known"_a, "begin"_a, "end"_a, "starts"_a, "first"_a, "step"_a,
             "lengths"_a, "R"_a, "length"_a, "threads"_a, "item"_a, "fill"_a, "out"_a,
             "-> (R,length) items of `item` bytes as they are stored.")
        .def("deliver_pixels", pixels, unlocked, "way"_a, "known"_a, "begin"_a, "end"_a, "starts"_a, "first"_a,
             "step"_a, "lengths"_a, "R"_a, "length"_a, "threads"_a, "shades"_a, "out"_a,
             "-> (R,length) words of `shades`.");
}

void bind_slots(py::module_& module) {
    // Lent and given back under the interpreter's lock.
    py::class_<Slots, std::shared_ptr<Slots>>(module, "Slots")
        .def(py::init<int64_t, int64_t>(), "kept"_a, "kept_bytes"_a)
        .def(
            "lend",
            [](const std::shared_ptr<Slots>& slots, int64_t bytes) { return std::make_unique<Lease>(slots, bytes); },
            "bytes"_a, "A buffer of at least so many bytes, whose memory comes back with its end.")
        .def("waiting", &Slots::waiting, "Bytes of each slot that waits.");
    py::class_<Lease>(module, "Lease", py::buffer_protocol()).def_buffer([](Lease& lease) {
        return py::buffer_info(lease.first(), lease.bytes());
    });
}

}  // namespace

void bind_files(py::module_& module) {
    py::class_<Shades>(module, "Shades", "What stands for a byte; see deliver.h.")
        .def(py::init(&shades), "tables"_a, "word"_a, "C"_a, "run"_a, "mean"_a, "std"_a,
             "tables (C,256) of words of 2 or 4 bytes, each for `run` bytes of a row in turn. mean, std (C) float32, "
             "or 0: the tables are (x / 255 - mean) / std.");
    bind_reader(module);
    bind_slots(module);
    module.def("is_missing", is_missing, py::call_guard<Unlocked>(), "descriptor"_a, "byte"_a,
               "Whether the disk has yet to bring a byte; no where the system does not say.");
    module.def("on_network", on_network, "descriptor"_a, "Whether a file lies behind a network.");
}

}  // namespace finf
