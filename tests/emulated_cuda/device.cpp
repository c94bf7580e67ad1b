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

#include <array>
#include <atomic>
#include <cmath>
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

// ---- attention: one operation each way, as in a GPU's kernels, with what these keep and take for a while ----

static double factor(const Tensor& q, std::optional<double> scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
}

// Scores of q and k (..., T, E), in fp32, on the host.
static Tensor scores(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bias, bool causal, double scale) {
  auto s = at::matmul(q.to(at::kFloat), k.to(at::kFloat).mT()) * scale;
  if (bias) s = s + bias->to(at::kFloat);
  if (!causal) return s;
  return s.masked_fill(at::ones({q.size(-2), k.size(-2)}, at::kBool).triu(1), -std::numeric_limits<double>::infinity());
}

// Gradients of q, k and v (..., T, E), in fp32, on the host.
static std::array<Tensor, 3> gradients(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& sums, const std::optional<Tensor>& bias, bool causal, double scale) {
  auto g = grad.to(at::kFloat);
  auto weights = at::exp(scores(q, k, bias, causal, scale) - sums.unsqueeze(-1));
  auto of_weights = at::matmul(g, v.to(at::kFloat).mT());
  auto of_scores = weights * (of_weights - (weights * of_weights).sum(-1, true)) * scale;
  return {at::matmul(of_scores, k.to(at::kFloat)), at::matmul(of_scores.mT(), q.to(at::kFloat)),
          at::matmul(weights.mT(), g)};
}

static int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The memory-efficient kernel sums the gradient of queries in fp32, in tiles of the longest sequence for each.
static Tensor accumulator(int64_t batch, int64_t longest, const Tensor& q, int64_t heads) {
  return at::empty({batch, heads, up(longest, 64), up(q.size(-1), 64)}, q.options().dtype(at::kFloat));
}

static std::optional<Tensor> on_host(const std::optional<Tensor>& t) {
  return t && t->defined() ? std::optional<Tensor>(on_host(*t)) : std::nullopt;
}

// As scaled_dot_product_attention calls it: (B, H, T, E), laid out as (B, T, H, E).
static std::tuple<Tensor, Tensor, Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const std::optional<Tensor>& bias, bool keeps_sums, double,
                                                         bool causal, std::optional<double> scale) {
  count("_scaled_dot_product_efficient_attention");
  at::AutoDispatchBelowADInplaceOrView below;
  auto hq = on_host(q), hk = on_host(k), hv = on_host(v);
  auto y = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  // the CPU's own values
  on_host(y).copy_(at::scaled_dot_product_attention(hq, hk, hv, on_host(bias), 0.0, causal, scale));
  auto sums = at::empty({q.size(0), q.size(1), keeps_sums ? up(q.size(2), 32) : 0}, q.options().dtype(at::kFloat));
  if (keeps_sums) {
    auto found = scores(hq, hk, on_host(bias), causal, factor(q, scale)).logsumexp(-1);
    on_host(sums).slice(2, 0, q.size(2)).copy_(found);
  }
  auto number = at::empty({}, q.options().dtype(at::kLong));
  return {y, sums, number, number};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor&,
    const Tensor& sums, const Tensor&, const Tensor&, double, std::array<bool, 4>, bool causal,
    std::optional<double> scale) {
  count("_scaled_dot_product_efficient_attention_backward");
  at::AutoDispatchBelowADInplaceOrView below;
  auto like = [](const Tensor& t) {
    return at::empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
  };
  std::array<Tensor, 3> results{like(q), like(k), like(v)};
  auto delta = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));  // sums of grad * y
  auto workspace = accumulator(q.size(0), q.size(2), q, q.size(1));
  auto found = gradients(on_host(grad), on_host(q), on_host(k), on_host(v), on_host(sums).slice(2, 0, q.size(2)),
                         on_host(std::optional<Tensor>(bias)), causal, factor(q, scale));
  for (int i = 0; i < 3; ++i) on_host(results[i]).copy_(found[i]);
  return {results[0], results[1], results[2], Tensor()};
}

// Packed rows, known by their bounds. Boxed, since the operators' last arguments change from version to version.
struct Arguments {
  const c10::FunctionSchema& schema;
  std::vector<c10::IValue> values;
  Arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : schema(op.schema()), values(torch::jit::pop(*stack, schema.arguments().size())) {}
  const c10::IValue& operator[](const char* name) const {
    auto place = schema.argumentIndexWithName(name);
    TORCH_CHECK(place, schema.name(), " has no ", name);
    return values[*place];
  }
  std::optional<double> scale() const {
    const auto& value = (*this)["scale"];
    return value.isNone() ? std::nullopt : std::optional<double>(value.toDouble());
  }
};

// (N, H, E) of one sequence as (1, H, T, E), its heads as many as of the queries.
static Tensor sequence(const Tensor& t, int64_t first, int64_t last, int64_t heads) {
  auto x = t.slice(0, first, last);
  return x.repeat_interleave(heads / x.size(1), 1).transpose(0, 1).unsqueeze(0);
}

template <bool flash>
static void attend_packed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments given(op, stack);
  count(op.schema().name().substr(6));
  at::AutoDispatchBelowADInplaceOrView below;
  auto q = given["query"].toTensor(), k = given["key"].toTensor(), v = given["value"].toTensor();
  auto bounds = on_host(given[flash ? "cum_seq_q" : "cu_seqlens_q"].toTensor());
  auto starts = on_host(given[flash ? "cum_seq_k" : "cu_seqlens_k"].toTensor());
  const auto& used = given[flash ? "seqused_k" : "seqlen_k"];
  const auto longest = given[flash ? "max_q" : "max_seqlen_q"].toInt();
  const auto most_keys = given[flash ? "max_k" : "max_seqlen_k"].toInt();
  const bool causal = flash ? given["is_causal"].toBool() : given["custom_mask_type"].toInt() > 0;
  const bool keeps_sums = flash || given["compute_log_sumexp"].toBool();
  TORCH_CHECK(bounds.scalar_type() == at::kInt && starts.scalar_type() == at::kInt && causal);
  TORCH_CHECK(used.isNone() || used.toTensor().is_contiguous() && used.toTensor().numel() == bounds.numel() - 1);
  TORCH_CHECK(given["dropout_p"].toDouble() == 0 && bounds.numel() == starts.numel() && k.sizes() == v.sizes());
  TORCH_CHECK(flash ? q.dim() == 3 : q.dim() == 4 && q.size(2) == k.size(2));
  if (flash) TORCH_CHECK(q.scalar_type() != at::kFloat, "FlashAttention only support fp16 and bf16 data type");
  const int64_t heads = q.size(-2), count_ = bounds.numel() - 1, tokens = q.numel() / (heads * q.size(-1));

  auto y = at::empty(q.sizes(), q.options());
  std::vector<int64_t> shape{heads, tokens};
  if (!flash) shape = {count_, heads, keeps_sums ? up(longest, 32) : 0};
  auto sums = at::empty(shape, q.options().dtype(at::kFloat));
  // flash takes a longest of one for a promise that each has one
  TORCH_CHECK(!flash || longest > 1 || heads == k.size(-2) || tokens == count_);
  auto rows = [](const Tensor& t) {
    auto x = on_host(t);
    return t.dim() == 4 ? x.squeeze(0) : x;
  };
  for (int64_t i = 0; i < count_; ++i) {
    const auto first = bounds[i].item<int64_t>(), last = bounds[i + 1].item<int64_t>();
    const auto begin = starts[i].item<int64_t>();
    const auto end = used.isNone() ? starts[i + 1].item<int64_t>()
                                   : begin + on_host(used.toTensor())[i].item<int64_t>();
    TORCH_CHECK(last - first <= longest && end - begin <= most_keys);
    if (first == last) continue;
    auto one_q = sequence(rows(q), first, last, heads);
    auto one_k = sequence(rows(k), begin, end, heads), one_v = sequence(rows(v), begin, end, heads);
    Tensor found;
    if (first - last == begin - end) {  // the CPU's own values
      found = at::scaled_dot_product_attention(one_q, one_k, one_v, std::nullopt, 0.0, true, given.scale());
    } else {  // the last query sees all keys
      TORCH_CHECK(flash || given["custom_mask_type"].toInt() == 2);
      auto seen = at::ones({last - first, end - begin}, at::kBool).tril(end - begin - last + first);
      found = at::scaled_dot_product_attention(one_q, one_k, one_v, seen, 0.0, false, given.scale());
    }
    rows(y).slice(0, first, last).copy_(found[0].transpose(0, 1));
    if (!keeps_sums || !used.isNone()) continue;  // nobody needs those of a cache
    auto place = flash ? on_host(sums).slice(1, first, last) : on_host(sums)[i].slice(1, 0, last - first);
    place.copy_(scores(one_q, one_k, std::nullopt, causal, factor(q, given.scale())).logsumexp(-1)[0]);
  }
  torch::jit::push(*stack, y, sums);
  auto state = at::empty({flash ? 2 : 0}, q.options().dtype(at::kLong));
  if (flash) torch::jit::push(*stack, state, at::empty({}, state.options()), at::empty({0}, q.options()));
  else torch::jit::push(*stack, state, state, longest, longest);
}

template <bool flash>
static void attend_packed_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments given(op, stack);
  count(op.schema().name().substr(6));
  at::AutoDispatchBelowADInplaceOrView below;
  auto q = given["query"].toTensor(), k = given["key"].toTensor(), v = given["value"].toTensor();
  auto grad = given[flash ? "grad_out" : "grad_out_"].toTensor(), sums = given["logsumexp"].toTensor();
  auto bounds = on_host(given[flash ? "cum_seq_q" : "cu_seqlens_q"].toTensor());
  const auto longest = given[flash ? "max_q" : "max_seqlen_q"].toInt();
  const bool causal = flash ? given["is_causal"].toBool() : given["custom_mask_type"].toInt() > 0;
  const int64_t heads = q.size(-2), count_ = bounds.numel() - 1, tokens = q.numel() / (heads * q.size(-1));

  std::array<Tensor, 3> inputs{q, k, v}, results;
  for (int i = 0; i < 3; ++i) results[i] = at::empty(inputs[i].sizes(), inputs[i].options());
  auto wide = q.options().dtype(at::kFloat);
  auto delta = at::empty({heads, flash ? tokens + 128 * count_ : tokens}, wide);  // sums of grad * y
  auto workspace = flash ? at::empty({tokens + 128 * count_, heads, up(q.size(-1), 32)}, wide)
                         : accumulator(count_, longest, q, heads);
  // flash writes the gradients of grouped keys and values for each query head, and adds them up
  std::array<Tensor, 2> expanded;
  for (int i = 0; flash && i < 2 && k.size(-2) != heads; ++i) expanded[i] = at::empty(q.sizes(), q.options());
  for (int64_t i = 0; i < count_; ++i) {
    const auto first = bounds[i].item<int64_t>(), last = bounds[i + 1].item<int64_t>();
    if (first == last) continue;
    std::array<Tensor, 4> one;
    int place = 0;
    for (const auto& t : {q, k, v, grad})
      one[place++] = sequence(on_host(t).reshape({tokens, t.size(-2), -1}), first, last, heads);
    auto of = flash ? on_host(sums).slice(1, first, last) : on_host(sums)[i].slice(1, 0, last - first);
    auto found = gradients(one[3], one[0], one[1], one[2], of, std::nullopt, causal, factor(q, given.scale()));
    for (int j = 0; j < 3; ++j) {
      auto target = on_host(results[j]).view({tokens, results[j].size(-2), -1}).slice(0, first, last);
      auto whole = found[j][0].transpose(0, 1);  // (T, H, E)
      target.copy_(whole.reshape({whole.size(0), target.size(1), -1, whole.size(2)}).sum(2));
    }
  }
  torch::jit::push(*stack, results[0], results[1], results[2]);
  if (!flash) torch::jit::push(*stack, Tensor());
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
  m.impl("_flash_attention_forward", torch::CppFunction::makeFromBoxedFunction<&attend_packed<true>>());
  m.impl("_flash_attention_backward", torch::CppFunction::makeFromBoxedFunction<&attend_packed_backward<true>>());
  m.impl("_efficient_attention_forward", torch::CppFunction::makeFromBoxedFunction<&attend_packed<false>>());
  m.impl("_efficient_attention_backward", torch::CppFunction::makeFromBoxedFunction<&attend_packed_backward<false>>());
  // what is one kernel on a GPU, and would come apart into several here
  auto one = [&](const std::string& name) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  };
  one("silu_backward");
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("aten::_foreach_", 0) == 0 && name.overload_name.find("out") == std::string::npos)
      one(name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name));
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
