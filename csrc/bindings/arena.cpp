// Bindings of fastpeft/arena.h.
#include "fastpeft/arena.h"

#include "bindings/bindings.h"
#include "common/error.h"

namespace py = pybind11;

namespace fastpeft::bindings {
namespace {

using cuda::Arena;
using cuda::ArenaMode;

std::unique_ptr<Arena> make_arena(int64_t bytes, bool managed, int64_t slot_bytes) {
  const py::gil_scoped_release unlocked;
  return std::make_unique<Arena>(bytes, managed ? ArenaMode::kManaged : ArenaMode::kPinned, slot_bytes);
}

}  // namespace

void bind_arena(py::module_& m) {
  py::class_<Arena>(m, "Arena")
      .def(py::init(&make_arena), py::arg("nbytes"), py::arg("managed"), py::arg("slot_bytes"))
      .def_property_readonly("nbytes", &Arena::bytes)
      .def_property_readonly("managed", [](const Arena& arena) { return arena.mode() == ArenaMode::kManaged; })
      .def("view",
           [](const Arena& arena, int64_t offset, int64_t bytes) {
             const cuda::ArenaView view = arena.view(offset, bytes);
             return py::make_tuple(reinterpret_cast<Address>(view.address), view.device);
           })
      .def("places", [](const Arena& arena) { return arena.on_device(); })
      .def(
          "move",
          [](Arena& arena, int64_t first_page, int64_t pages, bool to_device, const Context& context) {
            arena.move(first_page, pages, to_device, context);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastpeft::bindings
