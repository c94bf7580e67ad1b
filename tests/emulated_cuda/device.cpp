// A CUDA device for a CPU build of torch. Its tensors have `device.type == "cuda"` and real values, computed by the CPU's
// kernels over the same memory; autograd gives it threads of its own; tensors of two devices refuse to meet. It counts
// operations and whatever makes the host wait for the device, and bytes held and their peak, up to a limit.
//
// It is a boxed fallback under torch's CUDA key. Only what handles memory, and attention, is written out below.
// Not covered: the kernels themselves, streams, NCCL, speed.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using Guard = c10::impl::FakeGuardImpl<DeviceType::CUDA>;

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

static Device current() { return Guard().getDevice(); }

// ---- what is counted ----

static std::mutex lock;
static std::map<std::string, long> by_name;                 // operation -> how often
static std::atomic<long> operations{0}, waits{0};           // waits: of the host for the device
static std::atomic<long> held{0}, peak{0}, limit{std::numeric_limits<long>::max()};  // bytes
// what reads a number of the device in order to go on
static const std::set<std::string> WAITING{"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2",
                                           "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"};

static void count(const std::string& name, bool waiting = false) {
  ++operations;
  waits += waiting;
  std::lock_guard<std::mutex> guard(lock);
  ++by_name[name];
}

static long rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }  // as CUDA's allocator does

static void take(long bytes) {
  long now = held += bytes;
  if (now > limit) {
    held -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory (emulated): ", bytes, " bytes more than ", now - bytes);
  }
  long most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {}
}

// ---- memory ----

struct Block {
  void* place;
  long bytes;
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, [](void*) {}, current()};
    take(rounded(bytes));
    void* place = nullptr;
    TORCH_CHECK(posix_memalign(&place, 64, bytes) == 0, "the host is out of memory");
    std::memset(place, 0xA5, bytes);  // so that what nobody wrote is seen
    auto free_block = [](void* context) {
      auto* block = static_cast<Block*>(context);
      held -= block->bytes;
      std::free(block->place);
      delete block;
    };
    return {place, new Block{place, rounded(bytes)}, free_block, current()};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
static DeviceAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &allocator)

namespace at {
struct EmulatedHooks final : CUDAHooksInterface {
  EmulatedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  int getNumGPUs() const override { return 8; }
  DeviceIndex current_device() const override { return current().index(); }
  DeviceIndex getCurrentDevice() const override { return current().index(); }
  void setCurrentDevice(DeviceIndex index) const override { Guard::setDeviceIndex(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    auto before = current().index();
    setCurrentDevice(index);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  void deviceSynchronize(DeviceIndex) const override {}
};
using CUDAHooksRegistry_t = void;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, EmulatedHooks)
}  // namespace at

static bool is_cuda(const Tensor& t) { return t.defined() && t.device().type() == DeviceType::CUDA; }

// A tensor of the device as one of the CPU, over the same memory.
static Tensor on_host(const Tensor& t) {
  if (!is_cuda(t)) return t;
  void* place = nullptr;
  if (t.storage().nbytes()) place = static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.itemsize();
  return at::from_blob(place, t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
}

// A result that the CPU computed as a tensor of the device, over the same memory.
static Tensor on_device(const Tensor& t, Device device) {
  if (!t.defined() || is_cuda(t)) return t;
  struct Kept {
    Tensor tensor;
    long bytes;
  };
  const long bytes = rounded(t.storage().nbytes());
  take(bytes);
  auto forget = [](void* context) {
    held -= static_cast<Kept*>(context)->bytes;
    delete static_cast<Kept*>(context);
  };
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(),
      c10::DataPtr(t.storage().mutable_data(), new Kept{t, bytes}, forget, device), &allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

// ---- every operation that is not written out below ----

static const char* ELSEWHERE = "Expected all tensors to be on the same device, but found ";

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto inputs = schema.arguments().size(), outputs = schema.returns().size();
  const std::string overload = schema.overload_name().empty() ? "" : "." + schema.overload_name();
  const std::string name = schema.name().substr(6) + overload;  // without aten::
  count(name, WAITING.count(name));

  const auto given = torch::jit::last(stack, inputs).vec();
  auto host = given;
  Device device = current();
  bool found = false, stray = false;
  auto see = [&](const Tensor& t) {
    if (is_cuda(t)) {
      TORCH_CHECK(!found || device == t.device(), ELSEWHERE, device, " and ", t.device(), " in ", name);
      device = t.device();
      found = true;
    } else if (t.defined() && t.dim() > 0) {
      stray = true;
    }
    return on_host(t);
  };
  for (size_t i = 0; i < inputs; ++i) {
    const auto& value = given[i];
    if (value.isTensor()) {
      Tensor t = value.toTensor(), seen = see(t);
      const auto* alias = schema.arguments()[i].alias_info();
      // an empty out= may be resized, which memory that is not the CPU's own cannot be
      host[i] = alias && alias->isWrite() && is_cuda(t) && !t.numel() ? at::empty(t.sizes(), seen.options()) : seen;
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(see(t));
      host[i] = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorList()) {
        if (t && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) ++waits;  // a mask is counted
        list.push_back(t ? std::optional<Tensor>(see(*t)) : t);
      }
      host[i] = list;
    } else if (value.isDevice() && value.toDevice().type() == DeviceType::CUDA) {
      device = value.toDevice();
      host[i] = c10::IValue(Device(at::kCPU));
    } else if (value.isGenerator()) {
      host[i] = c10::IValue(at::detail::getDefaultCPUGenerator());
    }
  }
  TORCH_CHECK(!stray || !found, ELSEWHERE, device, " and cpu in ", name);
  if (name.find("softmax") != std::string::npos && inputs > 2 && host[2].isBool() && host[2].toBool()) {
    host[0] = host[0].toTensor().to(at::kFloat);  // the CPU has no softmax from half precision to fp32
    host[2] = false;
  }

  torch::jit::drop(*stack, inputs);
  for (auto& value : host) torch::jit::push(*stack, std::move(value));
  {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  const auto results = torch::jit::last(stack, outputs).vec();
  torch::jit::drop(*stack, outputs);

  for (size_t i = 0; i < outputs; ++i) {
    c10::IValue result = results[i];
    const auto* alias = schema.returns()[i].alias_info();
    TORCH_CHECK(!alias || alias->isWrite() || !result.isTensor(), name, " makes a view: write it out in device.cpp");
    bool written = false;  // an argument that comes back
    for (size_t j = 0; alias && j < inputs && !written; ++j) {
      const auto* other = schema.arguments()[j].alias_info();
      if (!other || !(*other == *alias)) continue;
      written = true;
      if (given[j].isTensor() && result.isTensor()) {
        Tensor target = given[j].toTensor();
        const Tensor& source = result.toTensor();
        if (!target.numel() && source.numel()) {
          auto filled = on_device(source, device);
          auto* impl = target.unsafeGetTensorImpl();
          impl->set_storage_keep_dtype(filled.storage());
          impl->set_sizes_and_strides(filled.sizes(), filled.strides(), filled.storage_offset());
        } else {
          TORCH_CHECK(target.sizes() == source.sizes(), name, " resized its out=");
        }
      }
      result = given[j];
    }
    if (!written && result.isTensor()) result = on_device(result.toTensor(), device);
    if (!written && result.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& t : result.toTensorVector()) list.push_back(on_device(t, device));
      result = list;
    }
    torch::jit::push(*stack, result);
  }
}

// ---- memory again: making, copying, viewing ----

static Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(current()));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

static Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(current()));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

static Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (is_cuda(source) && is_cuda(self)) {
    count("copy_");
  } else if (is_cuda(source)) {
    count("copy_ to the host", true);  // even non_blocking, since nothing here is pinned
  } else {
    // what may return before the device has read it reads a buffer that CUDA fills at once
    count("copy_ to the device", !non_blocking);
  }
  on_host(self).copy_(on_host(source));
  return self;
}

static const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  if (bytes > self.storage().nbytes()) {
    auto larger = allocator.allocate(bytes);
    if (self.storage().nbytes()) std::memcpy(larger.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(larger));
    self.storage().set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

static Tensor& set_storage(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size,
                           at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

static Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}
static Tensor view(const Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }
static Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
static Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

// ---- attention: one operation, as memory-efficient and flash attention are, and with what they keep ----

static Tensor scores(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bias, bool causal, double scale) {
  auto s = at::matmul(q.to(at::kFloat), k.to(at::kFloat).mT()) * scale;
  if (bias) s = s + on_host(*bias).to(at::kFloat);
  if (!causal) return s;
  auto future = at::ones({q.size(-2), k.size(-2)}, at::kBool).triu(1);
  return s.masked_fill(future, -std::numeric_limits<double>::infinity());
}

static double factor(const Tensor& q, std::optional<double> scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const std::optional<Tensor>& bias, bool keeps_sums, double,
                                                         bool causal, std::optional<double> scale) {
  count("_scaled_dot_product_efficient_attention");
  at::AutoDispatchBelowADInplaceOrView below;
  auto hq = on_host(q), hk = on_host(k), hv = on_host(v);
  std::optional<Tensor> mask = bias ? std::optional<Tensor>(on_host(*bias)) : bias;
  auto y = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  on_host(y).copy_(at::scaled_dot_product_attention(hq, hk, hv, mask, 0.0, causal, scale));  // the CPU's own values
  auto sums = at::empty({q.size(0), q.size(1), keeps_sums ? (q.size(2) + 31) / 32 * 32 : 0}, q.options().dtype(at::kFloat));
  if (keeps_sums) on_host(sums).slice(2, 0, q.size(2)).copy_(scores(hq, hk, bias, causal, factor(q, scale)).logsumexp(-1));
  auto number = at::empty({}, q.options().dtype(at::kLong));
  return {y, sums, number, number};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& y,
    const Tensor& sums, const Tensor&, const Tensor&, double, std::array<bool, 4>, bool causal,
    std::optional<double> scale) {
  count("_scaled_dot_product_efficient_attention_backward");
  at::AutoDispatchBelowADInplaceOrView below;
  auto like = [](const Tensor& t) {  // heads beside each other, as the forward pass had them
    return at::empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
  };
  auto grad_q = like(q), grad_k = like(k), grad_v = like(v);
  auto products = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));  // sum of grad * y
  Tensor accumulator;  // both kernels sum the gradient of queries in fp32
  if (q.scalar_type() != at::kFloat) accumulator = at::empty(q.sizes(), q.options().dtype(at::kFloat));

  std::optional<Tensor> mask = bias.defined() ? std::optional<Tensor>(bias) : std::nullopt;
  auto hq = on_host(q), hk = on_host(k), hv = on_host(v), g = on_host(grad).to(at::kFloat);
  const double by = factor(q, scale);
  auto p = at::exp(scores(hq, hk, mask, causal, by) - on_host(sums).slice(2, 0, q.size(2)).unsqueeze(-1));
  auto dp = at::matmul(g, hv.to(at::kFloat).mT());
  auto ds = p * (dp - (p * dp).sum(-1, true)) * by;
  on_host(grad_v).copy_(at::matmul(p.mT(), g));
  on_host(grad_q).copy_(at::matmul(ds, hk.to(at::kFloat)));
  on_host(grad_k).copy_(at::matmul(ds.mT(), hq.to(at::kFloat)));
  return {grad_q, grad_k, grad_v, Tensor()};
}

static int64_t choose(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                      std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::efficient_attention);
}
static const bool chosen = (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose), true);

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("view", &view);
  m.impl("unfold", &unfold);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("_fused_sdp_choice", &choose);
  m.impl("_scaled_dot_product_efficient_attention", &attend);
  m.impl("_scaled_dot_product_efficient_attention_backward", &attend_backward);
}

// ---- what emulated.py calls ----

extern "C" {
long emu_held() { return held; }
long emu_peak() { return peak; }
long emu_operations() { return operations; }
long emu_waits() { return waits; }
void emu_set_limit(long bytes) { limit = bytes; }
void emu_reset_peak() { peak = held.load(); }
int emu_device() { return current().index(); }
void emu_set_device(int index) { Guard::setDeviceIndex(index); }
void emu_clear() {
  operations = waits = 0;
  std::lock_guard<std::mutex> guard(lock);
  by_name.clear();
}
const char* emu_names() {
  static std::string text;
  std::lock_guard<std::mutex> guard(lock);
  text.clear();
  for (auto& [name, times] : by_name) text += name + "\t" + std::to_string(times) + "\n";
  return text.c_str();
}
}
