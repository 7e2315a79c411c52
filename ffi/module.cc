// The Python face of the native library: pool, stores, targets, eager calls.
#include <malloc.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "base/cpu.h"
#include "handlers/targets.h"
#include "linear/store.h"
#include "moe/backend.h"
#include "moe/eager.h"
#include "moe/encode_experts.h"
#include "moe/layer.h"
#include "moe/profile.h"
#include "moe/registry.h"
#include "moe/store.h"
#include "pool/peak.h"
#include "pool/topology.h"

namespace nb = nanobind;

namespace ktjax {
namespace {

// Arrays cross as uint16 bits where they are bfloat16: numpy has no name for it.
using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using OutputArray = nb::ndarray<nb::c_contig, nb::device::cpu>;

ConstArray Const(const Array& array) {
  return {array.data(), array.dtype() == nb::dtype<float>()};
}

// The process-wide backend; its stores keep it alive too.
std::mutex backend_mutex;
std::shared_ptr<Backend> backend;

std::shared_ptr<Backend> GetBackend() {
  std::lock_guard lock(backend_mutex);
  if (!backend) throw std::runtime_error("there is no worker pool");
  return backend;
}

void CreatePool(int threads_per_subpool, int subpool_count, const std::string& isa) {
  nb::gil_scoped_release release;
  std::lock_guard lock(backend_mutex);
  if (backend) throw std::runtime_error("there is a worker pool already");
  const Isa chosen = ChooseIsa(isa.c_str());
  backend = std::make_shared<Backend>(
      WorkerPoolConfig{subpool_count, threads_per_subpool}, chosen);
}

void ReleasePool() {
  nb::gil_scoped_release release;
  std::shared_ptr<Backend> last;
  std::lock_guard lock(backend_mutex);
  if (const int64_t open = StoreRegistry::Get().size(); open > 0) {
    throw std::runtime_error(std::to_string(open) +
                             " stores still use the worker pool; close them first");
  }
  last = std::move(backend);
}

nb::tuple ToTuple(Handle handle) { return nb::make_tuple(handle.epoch, handle.index); }

// A matrix, or that of all experts: values, or codes with their scales and perhaps zero
// points, or blocks that have all of it.
SourceMatrix Source(const std::vector<Array>& arrays) {
  const Array& values = arrays.at(0);
  if (arrays.size() > 1) {
    return {
        SourceMatrix::Type::kPlain, values.data(), arrays[1].data(),
        arrays.size() > 2 ? static_cast<const uint8_t*>(arrays[2].data()) : nullptr};
  }
  if (values.dtype() == nb::dtype<uint8_t>()) {  // blocks
    return {SourceMatrix::Type::kPlain, values.data()};
  }
  return {Const(values).is_float32 ? SourceMatrix::Type::kFloat32
                                   : SourceMatrix::Type::kBf16,
          values.data()};
}

nb::tuple CreateStore(const std::string& format, int group_size, bool zero_points,
                      const std::string& up_format, const std::string& down_format,
                      const std::vector<Array>& gate, const std::vector<Array>& up,
                      const std::vector<Array>& down) {
  const Geometry geometry{static_cast<int>(gate.at(0).shape(0)),
                          static_cast<int>(down.at(0).shape(1)),
                          static_cast<int>(gate.at(0).shape(1))};
  const SourceWeights source{Source(gate), Source(up), Source(down)};
  Handle handle;
  {
    nb::gil_scoped_release release;
    const Encoding encoding = MakeEncoding(format, group_size, zero_points);
    const auto other = [&](const std::string& name) {
      return name == format ? encoding : MakeEncoding(name, 0, false);
    };
    auto store = std::make_shared<ExpertStore>(GetBackend(), geometry, encoding,
                                               other(up_format), other(down_format));
    store->Pack(source);
    handle = StoreRegistry::Get().Add(std::move(store));
  }
  return ToTuple(handle);
}

nb::tuple CreateLinear(const std::string& format, int group_size, bool zero_points,
                       int outputs, int inputs, const std::vector<Array>& weight) {
  const SourceMatrix source = Source(weight);
  Handle handle;
  {
    nb::gil_scoped_release release;
    auto store = std::make_shared<LinearStore>(
        GetBackend(), outputs, inputs, MakeEncoding(format, group_size, zero_points));
    store->Pack(source);
    handle = StoreRegistry::Get().Add(std::move(store));
  }
  return ToTuple(handle);
}

// Quantises [experts, outputs, depth] to the plain arrays values, scales and, where the
// format has them, zeros.
void EncodeMatrix(const std::string& format, int group_size, bool zero_points,
                  const Array& weights, const std::string& name,
                  const std::vector<OutputArray>& plain) {
  const MatrixShape shape{static_cast<int>(weights.shape(0)),
                          static_cast<int>(weights.shape(1)),
                          static_cast<int>(weights.shape(2))};
  const PlainArrays out{
      static_cast<uint8_t*>(plain.at(0).data()),
      static_cast<uint8_t*>(plain.at(1).data()),
      plain.size() > 2 ? static_cast<uint8_t*>(plain[2].data()) : nullptr};
  const SourceMatrix source = Source({weights});
  nb::gil_scoped_release release;
  EncodeExperts(*GetBackend(), MakeEncoding(format, group_size, zero_points), source,
                shape, name, out);
}

nb::dict Describe() {
  nb::dict facts;
  const CpuFeatures& cpu = ThisCpu();
  facts["cpu"] = cpu.brand;
  std::vector<std::string> supported;
  for (Isa isa : SupportedIsas()) {
    if (isa != Isa::kAmxEmulated) supported.push_back(IsaName(isa));
  }
  facts["isas_supported"] = supported;
  facts["numa_nodes"] = ThisTopology().nodes.size();
  facts["physical_cores"] = ThisTopology().physical_cores();
  return facts;
}

nb::dict TakeProfile() {
  nb::dict result;
  for (const auto& [phase, entry] : Profile::Get().Take()) {
    result[phase.c_str()] = nb::make_tuple(entry.seconds, entry.count);
  }
  return result;
}

nb::dict Measure(double seconds) {
  Peaks peaks;
  {
    nb::gil_scoped_release release;
    peaks = MeasurePeaks(GetBackend()->pool, seconds);
  }
  nb::dict result;
  result["bf16_gflops"] = peaks.bf16_gflops;
  result["int8_gops"] = peaks.int8_gops;
  result["f32_gflops"] = peaks.f32_gflops;
  result["dram_read_gbs"] = peaks.dram_read_gbs;
  result["bf16_instruction"] = peaks.bf16_instruction;
  result["int8_instruction"] = peaks.int8_instruction;
  result["f32_instruction"] = peaks.f32_instruction;
  return result;
}

// Python objects whose memory a registration points at; freed under the GIL, whichever
// thread drops the last reference.
std::shared_ptr<void> KeepAlive(nb::object object) {
  PyObject* raw = object.release().ptr();
  return {raw, [](void* p) {
            nb::gil_scoped_acquire acquire;
            Py_DECREF(static_cast<PyObject*>(p));
          }};
}

LayerInputs EagerInputs(const Array& x, const Array& ids, const Array& w) {
  LayerInputs inputs;
  inputs.tokens = static_cast<int64_t>(x.shape(0));
  inputs.k = static_cast<int>(ids.shape(1));
  inputs.x = Const(x);
  inputs.ids = static_cast<const int32_t*>(ids.data());
  inputs.weights = static_cast<const float*>(w.data());
  return inputs;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::exception<DeadHandleError>(m, "DeadHandleError", PyExc_RuntimeError);

  m.def("targets", [] {
    nb::dict targets;
    for (const auto& list : {MoeTargets(), LinearTargets()}) {
      for (const Target& target : list) {
        targets[target.name] = nb::capsule(target.handler);
      }
    }
    return targets;
  });
  m.def("create_pool", &CreatePool);
  m.def("release_pool", &ReleasePool);
  m.def("choose_isa",
        [](const std::string& forced) { return IsaName(ChooseIsa(forced.c_str())); });
  m.def("explain_isa", [](const std::string& forced) {
    return ExplainIsa(ChooseIsa(forced.c_str()));
  });
  m.def("describe", &Describe);
  m.def("keep_freed_memory", [] {
    // Every large array from the heap, and the heap never shrinks: a training step then
    // finds the pages of the last one instead of faulting 70 MB of gradients in again.
    return mallopt(M_MMAP_MAX, 0) == 1 &&
           mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max()) == 1;
  });
  m.def("kernels", [] { return std::string(GetBackend()->kernels.name); });
  m.def("workspace_bytes", [] {
    const auto backend = GetBackend();
    std::lock_guard lock(backend->mutex);
    return backend->workspace.bytes();
  });
  m.def("measure_peaks", &Measure);
  m.def("profile_enable", [](bool on) { Profile::Get().Enable(on); });
  m.def("profile_take", &TakeProfile);

  m.def("encode", &EncodeMatrix);
  m.def("create_store", &CreateStore);
  m.def("close_store", [](uint32_t epoch, uint32_t index) {
    nb::gil_scoped_release release;
    StoreRegistry::Get().Remove({epoch, index});
  });
  m.def("store_bytes", [](uint32_t epoch, uint32_t index) {
    return StoreRegistry::Get().Find({epoch, index})->bytes();
  });
  m.def("store_dequantize", [](uint32_t epoch, uint32_t index, const OutputArray& gate,
                               const OutputArray& up, const OutputArray& down) {
    nb::gil_scoped_release release;
    StoreRegistry::Get()
        .Find<ExpertStore>({epoch, index})
        ->Dequantize(static_cast<float*>(gate.data()), static_cast<float*>(up.data()),
                     static_cast<float*>(down.data()));
  });
  m.def("create_linear", &CreateLinear);
  m.def("linear_dequantize",
        [](uint32_t epoch, uint32_t index, const OutputArray& values) {
          nb::gil_scoped_release release;
          StoreRegistry::Get()
              .Find<LinearStore>({epoch, index})
              ->Dequantize(static_cast<float*>(values.data()));
        });

  m.def("register_lora",
        [](uint32_t epoch, uint32_t index, const std::vector<Array>& arrays,
           float scaling, nb::object owner) {
          LoRAOperands lora;
          lora.rank = static_cast<int>(arrays.at(0).shape(1));
          lora.scaling = scaling;
          for (int i = 0; i < kLoRAArrays; ++i) lora.arrays[i] = Const(arrays.at(i));
          auto keep = KeepAlive(std::move(owner));
          nb::gil_scoped_release release;
          StoreRegistry::Get()
              .Find<ExpertStore>({epoch, index})
              ->RegisterLoRA(std::make_shared<RegisteredLoRA>(lora, std::move(keep)));
        });
  m.def("submit_forward",
        [](uint32_t epoch, uint32_t index, const Array& x, const Array& ids,
           const Array& w, const OutputArray& y, nb::object owner, bool int8) {
          LayerInputs inputs = EagerInputs(x, ids, w);
          inputs.int8 = int8;
          auto store = StoreRegistry::Get().Find<ExpertStore>({epoch, index});
          auto keep = KeepAlive(std::move(owner));
          const MutableArray out{y.data(), y.dtype() == nb::dtype<float>()};
          nb::gil_scoped_release release;
          return SubmitForward(std::move(store), inputs, out, std::move(keep));
        });
  nb::class_<PendingCall>(m, "PendingCall")
      .def("wait", &PendingCall::Wait, nb::call_guard<nb::gil_scoped_release>())
      .def("done", &PendingCall::Done);
}

}  // namespace ktjax
