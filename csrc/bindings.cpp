// Python's door to the launchers: one def each, and what their params are made of. The only file that knows Python.
//
// What belongs together comes as one plain tuple, in the order of its struct in attention.h; a pointer is an integer,
// 0 for null. Tuples are what Python builds fastest: a call has a dozen tensors and a launch takes microseconds.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "few.h"
#ifdef ATTNFUSE_EMULATION
#include "machine.h"
#endif

namespace py = pybind11;

namespace attnfuse {
namespace {

// The items of a tuple, read one after the other.
class Items {
  public:
    Items(py::handle tuple, const char* name, Py_ssize_t count) : tuple_(tuple.ptr()) {
        if (!PyTuple_CheckExact(tuple_) || PyTuple_GET_SIZE(tuple_) != count) {
            throw py::type_error(
                std::string(name) + " must be a tuple of " + std::to_string(count) + " items, got " +
                std::string(py::repr(tuple)));
        }
    }

    py::handle item() { return PyTuple_GET_ITEM(tuple_, next_++); }

    void read(int64_t& field) {
        field = PyLong_AsLongLong(item().ptr());
        check(field == -1);
    }
    void read(int32_t& field) {
        int64_t wide;
        read(wide);
        if (wide != static_cast<int32_t>(wide)) {
            throw py::value_error(
                "item " + std::to_string(next_ - 1) + " must fit 32 bits, got " + std::to_string(wide));
        }
        field = static_cast<int32_t>(wide);
    }
    void read(float& field) {
        const double wide = PyFloat_AsDouble(item().ptr());
        check(wide == -1.0);
        field = static_cast<float>(wide);
    }
    template <typename X>
    void read(X*& field) {
        const unsigned long long address = PyLong_AsUnsignedLongLong(item().ptr());
        check(address == static_cast<unsigned long long>(-1));
        field = reinterpret_cast<X*>(static_cast<uintptr_t>(address));
    }
    void read(Dtype& field) {
        int32_t number;
        read(number);
        field = static_cast<Dtype>(number);
    }
    void read(Rows& field) {
        Items items(item(), "rows", 5);
        items.read_all(field.data, field.batch, field.head, field.row, field.aligned);
    }

    template <typename... Fields>
    void read_all(Fields&... fields) {
        (read(fields), ...);
    }

  private:
    static void check(bool maybe_error) {
        if (maybe_error && PyErr_Occurred()) {
            throw py::error_already_set();
        }
    }

    PyObject* tuple_;
    Py_ssize_t next_ = 0;
};

Shape shape_from(py::handle tuple) {
    Shape shape;
    Items(tuple, "shape", 11)
        .read_all(
            shape.dtype, shape.device, shape.batch, shape.heads, shape.key_heads, shape.rows, shape.dim,
            shape.value_dim, shape.scale, shape.softcap, shape.newest);
    return shape;
}

// The forward's params keep what they have room for: not the gradients.
BackwardSource source_from(py::handle tuple) {
    BackwardSource source;
    Items(tuple, "a source", 17)
        .read_all(
            source.key, source.value, source.grad_key, source.grad_value, source.lengths, source.present,
            source.key_mask, source.key_mask_batch, source.key_mask_column, source.bias, source.bias_batch,
            source.bias_head, source.offsets, source.offset, source.columns, source.left, source.right);
    return source;
}

template <typename Params>
void set_sources(Params& params, const py::tuple& sources) {
    if (sources.size() > kMaxSources) {
        throw py::value_error(
            "sources must be at most " + std::to_string(kMaxSources) + ", got " + std::to_string(sources.size()));
    }
    for (size_t s = 0; s < sources.size(); ++s) {
        params.sources[s] = source_from(sources[s]);
    }
    params.shape.source_count = static_cast<int32_t>(sources.size());
}

ForwardParams forward_params(const py::tuple& shape, const py::tuple& tensors, const py::tuple& sources) {
    ForwardParams params;
    params.shape = shape_from(shape);
    Items(tensors, "tensors", 5).read_all(params.query, params.out, params.lse, params.mass, params.sinks);
    set_sources(params, sources);
    return params;
}

BackwardParams backward_params(
    const py::tuple& shape, const py::tuple& tensors, const py::tuple& scratch, const py::tuple& sources) {
    BackwardParams params;
    params.shape = shape_from(shape);
    Items(tensors, "tensors", 8)
        .read_all(
            params.query, params.out, params.grad_out, params.grad_query, params.lse, params.grad_lse, params.mass,
            params.grad_mass);
    Items(scratch, "scratch", 7)
        .read_all(
            params.lse2, params.delta, params.live, params.dq_sum, params.sums, params.delta_source,
            params.rows_padded);
    set_sources(params, sources);
    return params;
}

SplitParams split_params(
    const py::tuple& shape, const py::tuple& tensors, const py::tuple& sources, const py::tuple& split) {
    SplitParams params{forward_params(shape, tensors, sources)};
    Items(split, "split", 3).read_all(params.splits, params.partial, params.state);
    return params;
}

FewParams few_params(
    const py::tuple& shape, const py::tuple& tensors, const py::tuple& scratch, const py::tuple& sources,
    const py::tuple& few) {
    FewParams params{backward_params(shape, tensors, scratch, sources)};
    Items(few, "few", 2).read_all(params.splits, params.partial);
    return params;
}

py::tuple told(const TileShape& tile) {
    return py::make_tuple(tile.pass, tile.rows, tile.columns, tile.threads, tile.shared_bytes);
}

// Others may run Python while a kernel is enqueued; the emulated machine is one for the whole process.
#ifdef ATTNFUSE_EMULATION
using Unlocked = py::call_guard<>;
#else
using Unlocked = py::call_guard<py::gil_scoped_release>;
#endif

template <typename Params, void (*launcher)(const Params&, void*)>
void enqueue(const Params& params, uintptr_t stream) {
    launcher(params, reinterpret_cast<void*>(stream));
}

}  // namespace
}  // namespace attnfuse

PYBIND11_MODULE(ATTNFUSE_MODULE, module) {
    using namespace attnfuse;

    module.attr("MAX_SOURCES") = kMaxSources;
    module.attr("UNBOUNDED") = kUnbounded;
    // Which cards the machine code is for, as attnfuse/build.py named them; empty under emulation.
    module.attr("ARCHITECTURES") = ATTNFUSE_ARCHITECTURES;

    // Local to the module: a process may hold the extension and its emulation at once.
    py::class_<ForwardParams>(module, "ForwardParams", py::module_local())
        .def(py::init(&forward_params), "(shape, tensors, sources), see attention.h", py::pos_only());
    py::class_<BackwardParams>(module, "BackwardParams", py::module_local())
        .def(py::init(&backward_params), "(shape, tensors, scratch, sources), see attention.h", py::pos_only());

    py::class_<SplitParams>(module, "SplitParams", py::module_local())
        .def(py::init(&split_params), "(shape, tensors, sources, split), see few.h", py::pos_only());
    py::class_<FewParams>(module, "FewParams", py::module_local())
        .def(py::init(&few_params), "(shape, tensors, scratch, sources, few), see few.h", py::pos_only());

    module.def("padded_dim", &padded_dim);
    module.def("rows_padded", &rows_padded);
    module.def("tile_shapes", [](int dim_padded) {
        py::list shapes;
        for (const TileShape& tile : tile_shapes(dim_padded)) {
            shapes.append(py::make_tuple(tile.pass, tile.rows, tile.columns, tile.threads, tile.shared_bytes));
        }
        return shapes;
    });
    const auto scheduled = [](const TileShape& tile) {
        return py::make_tuple(tile.pass, tile.rows, tile.columns, tile.threads, tile.shared_bytes, tile.schedule);
    };
    module.def("attn_fwd_tile", [=](const ForwardParams& params) { return scheduled(attn_fwd_tile(params)); });
    module.def("attn_bwd_tiles", [=](const BackwardParams& params) {
        py::list tiles;
        for (const TileShape& tile : attn_bwd_tiles(params)) {
            tiles.append(scheduled(tile));
        }
        return tiles;
    });
    module.def("attn_fwd", &enqueue<ForwardParams, attn_fwd>, Unlocked());
    module.def("attn_bwd_delta", &enqueue<BackwardParams, attn_bwd_delta>, Unlocked());
    module.def("attn_bwd_dq", &enqueue<BackwardParams, attn_bwd_dq>, Unlocked());
    module.def("attn_bwd_dkdv", &enqueue<BackwardParams, attn_bwd_dkdv>, Unlocked());
    module.def("attn_bwd_convert", &enqueue<BackwardParams, attn_bwd_convert>, Unlocked());

    module.def("few_tile_shapes", [](int dim_padded) {
        py::list shapes;
        for (const TileShape& tile : few_tile_shapes(dim_padded)) {
            shapes.append(told(tile));
        }
        return shapes;
    });
    module.def("few_tile", [](const char* pass, int dim_padded, int packed_rows) {
        return told(few_tile(pass, dim_padded, packed_rows));
    });
    module.def("attn_bwd_few_rows", &attn_bwd_few_rows);
    module.def("attn_bwd_few_parts", &attn_bwd_few_parts);
    module.def("multiprocessor_count", &multiprocessor_count);
    module.def("attn_fwd_split", &enqueue<SplitParams, attn_fwd_split>, Unlocked());
    module.def("attn_bwd_few", &enqueue<FewParams, attn_bwd_few>, Unlocked());

#ifdef ATTNFUSE_EMULATION
    module.def("set_seed", &emulation::set_seed);
    module.def("set_shared_memory_limit", &emulation::set_shared_memory_limit);
    module.def("set_architecture", &emulation::set_architecture);
    module.def("set_multiprocessors", &emulation::set_multiprocessors);
    module.def("bank_conflicts", [] { return emulation::bank_conflicts; });
#endif
}
