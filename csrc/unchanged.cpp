#include "unchanged.h"

namespace peftk {
namespace {

// Each returns 1 for yes, 0 for no, and -1 with an exception of Python.

int none_is_true(PyObject* objects) {
  const Py_ssize_t count = PyTuple_GET_SIZE(objects);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int truth = PyObject_IsTrue(PyTuple_GET_ITEM(objects, i));
    if (truth != 0) return truth < 0 ? -1 : 0;
  }
  return 1;
}

int none_says_yes(PyObject* calls) {
  const Py_ssize_t count = PyTuple_GET_SIZE(calls);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* answer = PyObject_CallNoArgs(PyTuple_GET_ITEM(calls, i));
    if (answer == nullptr) return -1;
    const int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (truth != 0) return truth < 0 ? -1 : 0;
  }
  return 1;
}

bool holds_only(PyObject* list, PyObject* items) {
  const Py_ssize_t count = PyTuple_GET_SIZE(items);
  if (PyList_GET_SIZE(list) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(items, i)) return false;
  return true;
}

int all_found(PyObject* own, PyObject* entries) {
  const Py_ssize_t count = PyTuple_GET_SIZE(entries);
  for (Py_ssize_t i = 0; i + 2 < count; i += 3) {
    PyObject* where = PyTuple_GET_ITEM(entries, i);
    PyObject* key = PyTuple_GET_ITEM(entries, i + 1);
    PyObject* value = PyTuple_GET_ITEM(entries, i + 2);
    if (where == Py_None) where = own;
    if (PyDict_Check(where) && key == Py_None && PyLong_Check(value)) {
      if (PyDict_GET_SIZE(where) != PyLong_AsSsize_t(value)) return 0;
    } else if (PyDict_Check(where)) {
      PyObject* found = PyDict_GetItemWithError(where, key);
      if (found == nullptr && PyErr_Occurred()) return -1;
      if (found != (value == Py_Ellipsis ? nullptr : value)) return 0;
    } else if (PyList_Check(where) && PyTuple_Check(value)) {
      if (!holds_only(where, value)) return 0;
    } else if (reinterpret_cast<PyObject*>(Py_TYPE(where)) != value) {
      return 0;
    }
  }
  return 1;
}

// unchanged(own, calls, empty, entries) -> bool
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !PyDict_Check(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyTuple_Check(arguments[2]) ||
      !PyTuple_Check(arguments[3]))
    return PyErr_Format(PyExc_TypeError,
                        "unchanged: expected a dictionary and three tuples (own, calls, empty, entries)");
  int same = none_says_yes(arguments[1]);
  if (same == 1) same = none_is_true(arguments[2]);
  if (same == 1) same = all_found(arguments[0], arguments[3]);
  return same < 0 ? nullptr : PyBool_FromLong(same);
}

PyMethodDef methods[] = {
    {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(unchanged)), METH_FASTCALL,
     "unchanged(own, calls, empty, entries): whether Python's objects are what they were; see peftk.kernels.native."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void define_unchanged(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftk
