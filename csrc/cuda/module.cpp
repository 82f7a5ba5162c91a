// The extension softmask._cuda. Importing it registers its operators' implementations; the schemas
// are defined in softmask/ops/_library.py.

#include <Python.h>

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
