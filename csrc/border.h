// What the borders with Python have in common, the only files that know pybind11: addresses come in as whole numbers,
// and the interpreter's lock is let go while a loop runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;
using namespace py::literals;

namespace finf {

// Lets the interpreter's lock go for as long as it lives. A daemon thread that asks for the lock while the interpreter
// ends is unwound from inside that call, which a destructor has to allow: pybind11's own would end the process there.
struct Unlocked {
    PyThreadState* const state = PyEval_SaveThread();
    ~Unlocked() noexcept(false) { PyEval_RestoreThread(state); }
};

template <class T>
T* memory(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// csrc/io/bindings.cpp
void bind_files(py::module_& module);

}  // namespace finf
