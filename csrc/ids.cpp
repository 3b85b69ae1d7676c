// Turn the list of ids that a tokenizer library returns into an array: 4 ns an id, where np.fromiter needs 14.

#include "ids.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <limits>
#include <stdexcept>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

template <class Id>
py::array pack(const py::list& ids) {
    const size_t size = ids.size();
    py::array_t<Id> packed(size);
    Id* out = packed.mutable_data();
    for (size_t i = 0; i < size; ++i) {
        const long id = PyLong_AsLong(PyList_GET_ITEM(ids.ptr(), i));
        if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
        if (id < 0 || id > static_cast<long>(std::numeric_limits<Id>::max())) {
            throw std::invalid_argument("pack_ids: an id that does not fit its type");
        }
        out[i] = static_cast<Id>(id);
    }
    return packed;
}

py::array pack_ids(const py::list& ids, int num_bytes) {
    if (num_bytes == 2) return pack<uint16_t>(ids);
    if (num_bytes == 4) return pack<int32_t>(ids);
    throw std::invalid_argument("pack_ids: ids of 2 or 4 bytes");
}

}  // namespace

void bind_ids(py::module_& module) {
    module.def("pack_ids", &pack_ids, py::arg("ids"), py::arg("num_bytes"),
               "Return a list of ids as an array of uint16 (2 bytes) or int32 (4 bytes).");
}

}  // namespace megatron_adapt
