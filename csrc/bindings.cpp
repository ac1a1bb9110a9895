// Schemas and checks of torch.ops.vllm_kivi: the only file that sees torch, and only its stable ABI. Shapes and
// semantics of the ops are in vllm_kivi/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"
#ifdef KIVI_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda_kernels.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kLayoutFields[] = {
#define FIELD(name) #name,
    KIVI_LAYOUT_FIELDS(FIELD)
#undef FIELD
};

kivi::Layout make_layout(const std::vector<int64_t>& values) {
  constexpr size_t count = sizeof kLayoutFields / sizeof kLayoutFields[0];
  STD_TORCH_CHECK(values.size() == count, "kivi: layout has ", values.size(), " entries, this build expects ", count);
  kivi::Layout layout;
  const int64_t* value = values.data();
#define FIELD(name) layout.name = static_cast<int32_t>(*value++);
  KIVI_LAYOUT_FIELDS(FIELD)
#undef FIELD
  STD_TORCH_CHECK(layout.head_dim > 0 && layout.head_dim <= 256 && layout.head_dim % 16 == 0, "kivi: head_dim ",
                  layout.head_dim, " is not supported; accepted: multiples of 16 up to 256");
  STD_TORCH_CHECK(layout.group_size == 32 || layout.group_size == 64 || layout.group_size == 128, "kivi: group_size ",
                  layout.group_size, " is not supported; accepted: 32, 64, 128");
  for (const int bits : {layout.k_bits, layout.v_bits}) {
    STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8 || bits == 16, "kivi: ", bits,
                    " bits are not supported; accepted: 2, 4, 8, 16");
  }
  STD_TORCH_CHECK(
      layout.boosted_channels == 0 || (layout.boosted_channels > 0 && layout.boosted_channels % 8 == 0 &&
                                       layout.k_bits == 2 && 4 * (layout.boosted_channels - 8) < layout.head_dim),
      "kivi: ", layout.boosted_channels,
      " boosted channels are not supported; accepted: with keys of 2 "
      "bits, a multiple of 8 that is at most a quarter of head_dim, rounded up");
  STD_TORCH_CHECK(layout.page_tokens > 0 && layout.page_tokens % layout.group_size == 0, "kivi: page_tokens ",
                  layout.page_tokens, " is not a multiple of group_size ", layout.group_size);
  STD_TORCH_CHECK(layout.full_page_tokens > 0, "kivi: full_page_tokens is ", layout.full_page_tokens);
  return layout;
}

kivi::Dtype make_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kivi::Dtype::kFloat32;
    case ScalarType::BFloat16:
      return kivi::Dtype::kBFloat16;
    case ScalarType::Half:
      return kivi::Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "kivi: ", name, " must be float32, bfloat16 or float16");
  }
}

void check_layout_dtype(const kivi::Layout& layout, size_t element_size) {
  const int32_t bytes = layout.k_bits == 16 ? layout.k_boost_offset / layout.group_size / layout.head_dim
                                            : (layout.k_zero_offset - layout.k_scale_offset) / layout.head_dim;
  STD_TORCH_CHECK(bytes == static_cast<int32_t>(element_size), "kivi: the layout is for elements of ", bytes,
                  " bytes, the tensors have ", element_size);
}

void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), "kivi: ", name, " is on another device than the first row tensor");
}

// [num_tokens, heads, head_dim] with head_dim contiguous.
kivi::Rows make_rows(const Tensor& tensor, const char* name, const Tensor& like, int64_t heads, int64_t head_dim) {
  check_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "kivi: ", name,
                  " has another dtype than the first row tensor");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(1) == heads && tensor.size(2) == head_dim, "kivi: ", name,
                  " must be [num_tokens, ", heads, ", ", head_dim, "]");
  STD_TORCH_CHECK(tensor.size(0) == like.size(0), "kivi: ", name, " has ", tensor.size(0), " rows, not ", like.size(0));
  STD_TORCH_CHECK(tensor.stride(2) == 1, "kivi: the last dimension of ", name, " must be contiguous");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

kivi::Pages make_pages(const Tensor& pages, const char* name, const Tensor& table, const char* table_name,
                       const Tensor& like, int64_t num_kv_heads, int64_t head_bytes, int64_t num_reqs) {
  check_device(pages, name, like);
  check_device(table, table_name, like);
  STD_TORCH_CHECK(pages.dim() >= 3 && pages.size(1) == num_kv_heads, "kivi: ", name,
                  " must be [num_blocks, num_kv_heads = ", num_kv_heads, ", ...]");
  const int64_t element_size = pages.element_size();
  int64_t inner = 1;
  for (int64_t dim = pages.dim() - 1; dim >= 2; --dim) {
    STD_TORCH_CHECK(pages.size(dim) == 1 || pages.stride(dim) == inner, "kivi: ", name,
                    " must be contiguous within a block and head");
    inner *= pages.size(dim);
  }
  STD_TORCH_CHECK(inner * element_size >= head_bytes, "kivi: ", name, " has ", inner * element_size,
                  " bytes a block and head, the layout needs ", head_bytes);
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Int && table.size(0) >= num_reqs &&
                      (table.size(1) == 1 || table.stride(1) == 1),
                  "kivi: ", table_name, " must be int32 [num_reqs, max_blocks] with contiguous rows");
  return {static_cast<char*>(pages.data_ptr()), pages.stride(0) * element_size, pages.stride(1) * element_size,
          static_cast<const int32_t*>(table.data_ptr()), table.stride(0)};
}

const int32_t* make_ints(const Tensor& tensor, const char* name, const Tensor& like, int64_t count) {
  check_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Int && tensor.size(0) >= count &&
                      (count <= 1 || tensor.stride(0) == 1),
                  "kivi: ", name, " must be a contiguous int32 tensor of at least ", count, " elements");
  return static_cast<const int32_t*>(tensor.data_ptr());
}

kivi::Batch make_batch(const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& like) {
  STD_TORCH_CHECK(query_start_loc.dim() == 1 && query_start_loc.size(0) >= 1,
                  "kivi: query_start_loc must be [num_reqs + 1]");
  const int64_t num_reqs = query_start_loc.size(0) - 1;
  return {static_cast<int32_t>(num_reqs), make_ints(query_start_loc, "query_start_loc", like, num_reqs + 1),
          make_ints(seq_lens, "seq_lens", like, num_reqs)};
}

// The kernels trust these numbers with addresses.
void check_batch(const kivi::Batch& batch, const char* starts_name, const kivi::Layout& layout, int64_t num_rows,
                 int64_t quantized_columns, int64_t full_columns) {
  STD_TORCH_CHECK(batch.query_start_loc[0] >= 0, "kivi: ", starts_name, " must not be negative");
  for (int32_t r = 0; r < batch.num_reqs; ++r) {
    const int64_t num_new = int64_t(batch.query_start_loc[r + 1]) - batch.query_start_loc[r];
    STD_TORCH_CHECK(num_new >= 0, "kivi: ", starts_name, " must not decrease");
    if (num_new == 0) continue;
    const int64_t num_tokens = batch.seq_lens[r];
    STD_TORCH_CHECK(num_tokens >= num_new, "kivi: request ", r, " has ", num_new, " rows but ", num_tokens, " tokens");
    STD_TORCH_CHECK(num_tokens <= quantized_columns * layout.page_tokens, "kivi: request ", r, " has ", num_tokens,
                    " tokens, its row of quantized_block_table covers ", quantized_columns * layout.page_tokens);
    STD_TORCH_CHECK(num_tokens <= full_columns * layout.full_page_tokens, "kivi: request ", r, " has ", num_tokens,
                    " tokens, its row of full_block_table covers ", full_columns * layout.full_page_tokens);
  }
  STD_TORCH_CHECK(batch.query_start_loc[batch.num_reqs] <= num_rows, "kivi: ", starts_name, " ends at ",
                  batch.query_start_loc[batch.num_reqs], " but there are ", num_rows, " rows");
}

int64_t quantized_head_bytes(const kivi::Layout& layout) {
  return int64_t(layout.page_tokens) / layout.group_size * layout.tile_bytes;
}

int64_t full_head_bytes(const kivi::Layout& layout, size_t element_size) {
  return int64_t(layout.full_page_tokens) * 2 * layout.head_dim * static_cast<int64_t>(element_size);
}

// torch's own pool: the host's thread settings hold, and nested calls do not oversubscribe.
const kivi::cpu::Threads& threads() {
  static thread_local kivi::cpu::Threads pool;
  pool.count = static_cast<int>(torch::stable::get_num_threads());
  pool.run = [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return pool;
}

// What is in batch is only checked where the host can read it.
kivi::StoreParams make_store(const Tensor& key, const Tensor& value, const Tensor& quantized_pages,
                             const Tensor& full_pages, const Tensor& quantized_block_table,
                             const Tensor& full_block_table, const Tensor& query_start_loc, const Tensor& seq_lens,
                             const std::vector<int64_t>& layout_list) {
  kivi::StoreParams params{};
  params.layout = make_layout(layout_list);
  const kivi::Layout& layout = params.layout;
  params.dtype = make_dtype(key, "key");
  check_layout_dtype(layout, key.element_size());
  params.key = make_rows(key, "key", key, layout.num_kv_heads, layout.head_dim);
  params.value = make_rows(value, "value", key, layout.num_kv_heads, layout.head_dim);
  params.batch = make_batch(query_start_loc, seq_lens, key);
  params.quantized = make_pages(quantized_pages, "quantized_pages", quantized_block_table, "quantized_block_table", key,
                                layout.num_kv_heads, quantized_head_bytes(layout), params.batch.num_reqs);
  params.full = make_pages(full_pages, "full_pages", full_block_table, "full_block_table", key, layout.num_kv_heads,
                           full_head_bytes(layout, key.element_size()), params.batch.num_reqs);
  if (key.is_cpu()) {
    check_batch(params.batch, "query_start_loc", layout, key.size(0), quantized_block_table.size(1),
                full_block_table.size(1));
  }
  return params;
}

void store_cpu(const Tensor& key, const Tensor& value, const Tensor& quantized_pages, const Tensor& full_pages,
               const Tensor& quantized_block_table, const Tensor& full_block_table, const Tensor& query_start_loc,
               const Tensor& seq_lens, const std::vector<int64_t>& layout) {
  kivi::cpu::kernels().store(make_store(key, value, quantized_pages, full_pages, quantized_block_table,
                                        full_block_table, query_start_loc, seq_lens, layout),
                             threads());
}

kivi::AttentionParams make_attention(const Tensor& output, const Tensor& query, const Tensor& quantized_pages,
                                     const Tensor& full_pages, const Tensor& quantized_block_table,
                                     const Tensor& full_block_table, const Tensor& query_start_loc,
                                     const Tensor& seq_lens, double scale, double logits_soft_cap,
                                     const std::vector<int64_t>& layout_list) {
  kivi::AttentionParams params{};
  params.layout = make_layout(layout_list);
  const kivi::Layout& layout = params.layout;
  params.dtype = make_dtype(query, "query");
  check_layout_dtype(layout, query.element_size());
  STD_TORCH_CHECK(query.dim() == 3 && query.size(1) > 0 && query.size(1) % layout.num_kv_heads == 0,
                  "kivi: query must be [num_tokens, num_heads, head_dim], num_heads a multiple of num_kv_heads = ",
                  layout.num_kv_heads);
  params.num_heads = static_cast<int32_t>(query.size(1));
  params.query = make_rows(query, "query", query, params.num_heads, layout.head_dim);
  params.output = make_rows(output, "output", query, params.num_heads, layout.head_dim);
  params.batch = make_batch(query_start_loc, seq_lens, query);
  params.quantized = make_pages(quantized_pages, "quantized_pages", quantized_block_table, "quantized_block_table",
                                query, layout.num_kv_heads, quantized_head_bytes(layout), params.batch.num_reqs);
  params.full = make_pages(full_pages, "full_pages", full_block_table, "full_block_table", query, layout.num_kv_heads,
                           full_head_bytes(layout, query.element_size()), params.batch.num_reqs);
  if (query.is_cpu()) {
    check_batch(params.batch, "query_start_loc", layout, query.size(0), quantized_block_table.size(1),
                full_block_table.size(1));
  }
  params.scale = static_cast<float>(scale);
  params.logits_soft_cap = static_cast<float>(logits_soft_cap);
  return params;
}

void decode_cpu(const Tensor& output, const Tensor& query, const Tensor& quantized_pages, const Tensor& full_pages,
                const Tensor& quantized_block_table, const Tensor& full_block_table, const Tensor& query_start_loc,
                const Tensor& seq_lens, double scale, double logits_soft_cap, const std::vector<int64_t>& layout,
                const std::optional<Tensor>&) {
  kivi::cpu::kernels().decode(
      make_attention(output, query, quantized_pages, full_pages, quantized_block_table, full_block_table,
                     query_start_loc, seq_lens, scale, logits_soft_cap, layout),
      threads());
}

void prefill_cpu(const Tensor& output, const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& quantized_pages, const Tensor& full_pages, const Tensor& quantized_block_table,
                 const Tensor& full_block_table, const Tensor& query_start_loc, const Tensor& seq_lens,
                 const Tensor& num_prompt_tokens, double scale, double logits_soft_cap,
                 const std::vector<int64_t>& layout) {
  kivi::AttentionParams params =
      make_attention(output, query, quantized_pages, full_pages, quantized_block_table, full_block_table,
                     query_start_loc, seq_lens, scale, logits_soft_cap, layout);
  params.key = make_rows(key, "key", query, params.layout.num_kv_heads, params.layout.head_dim);
  params.value = make_rows(value, "value", query, params.layout.num_kv_heads, params.layout.head_dim);
  params.num_prompt_tokens = make_ints(num_prompt_tokens, "num_prompt_tokens", query, params.batch.num_reqs);
  kivi::cpu::kernels().prefill(params, threads());
}

kivi::GatherParams make_gather(const Tensor& key, const Tensor& value, const Tensor& quantized_pages,
                               const Tensor& full_pages, const Tensor& quantized_block_table,
                               const Tensor& full_block_table, const Tensor& start_loc, const Tensor& first,
                               const Tensor& boundary, const std::vector<int64_t>& layout_list) {
  kivi::GatherParams params{};
  params.layout = make_layout(layout_list);
  const kivi::Layout& layout = params.layout;
  params.dtype = make_dtype(key, "key");
  check_layout_dtype(layout, key.element_size());
  params.key = make_rows(key, "key", key, layout.num_kv_heads, layout.head_dim);
  params.value = make_rows(value, "value", key, layout.num_kv_heads, layout.head_dim);
  params.num_reqs = static_cast<int32_t>(first.size(0));
  params.start_loc = make_ints(start_loc, "start_loc", key, params.num_reqs + 1);
  params.first = make_ints(first, "first", key, params.num_reqs);
  params.boundary = make_ints(boundary, "boundary", key, params.num_reqs);
  params.quantized = make_pages(quantized_pages, "quantized_pages", quantized_block_table, "quantized_block_table", key,
                                layout.num_kv_heads, quantized_head_bytes(layout), params.num_reqs);
  params.full = make_pages(full_pages, "full_pages", full_block_table, "full_block_table", key, layout.num_kv_heads,
                           full_head_bytes(layout, key.element_size()), params.num_reqs);
  if (key.is_cpu()) {
    std::vector<int32_t> ends(params.num_reqs);
    for (int32_t r = 0; r < params.num_reqs; ++r) {
      const int64_t end = int64_t(params.first[r]) + params.start_loc[r + 1] - params.start_loc[r];
      STD_TORCH_CHECK(params.first[r] >= 0 && end == static_cast<int32_t>(end), "kivi: first of request ", r, " is ",
                      params.first[r], "; accepted: positions of its tokens");
      ends[r] = static_cast<int32_t>(end);
    }
    check_batch({params.num_reqs, params.start_loc, ends.data()}, "start_loc", layout, key.size(0),
                quantized_block_table.size(1), full_block_table.size(1));
  }
  return params;
}

void gather_cpu(const Tensor& key, const Tensor& value, const Tensor& quantized_pages, const Tensor& full_pages,
                const Tensor& quantized_block_table, const Tensor& full_block_table, const Tensor& start_loc,
                const Tensor& first, const Tensor& boundary, const std::vector<int64_t>& layout) {
  kivi::cpu::kernels().gather(make_gather(key, value, quantized_pages, full_pages, quantized_block_table,
                                          full_block_table, start_loc, first, boundary, layout),
                              threads());
}

#ifdef KIVI_CUDA

using kivi::cuda::Stream;

// libtorch's stable ABI has this since 2.13 only; until then it is a C function of the part that CPU builds lack.
Stream current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  static const auto function =
      library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  STD_TORCH_CHECK(function != nullptr && function(device, &stream) == 0, "kivi: torch has no current CUDA stream");
  return static_cast<Stream>(stream);
}

// Launches on the device of `tensor`, on its current stream.
template <class Launch>
void launch(const Tensor& tensor, Launch launch_on) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = launch_on(current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "kivi: ", error);
}

// Kernels copy 16 bytes at a time.
void check_aligned(const void* data, int64_t stride, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 16 == 0, "kivi: ", name,
                  " must be aligned to 16 bytes, strides included");
}

template <class Params>
void check_cuda(const Params& params) {
  for (const auto& [pages, name] :
       {std::pair{&params.quantized, "quantized_pages"}, std::pair{&params.full, "full_pages"}}) {
    check_aligned(pages->data, pages->block_stride, name);
    check_aligned(pages->data, pages->head_stride, name);
  }
}

void store_cuda(const Tensor& key, const Tensor& value, const Tensor& quantized_pages, const Tensor& full_pages,
                const Tensor& quantized_block_table, const Tensor& full_block_table, const Tensor& query_start_loc,
                const Tensor& seq_lens, const std::vector<int64_t>& layout) {
  const kivi::StoreParams params = make_store(key, value, quantized_pages, full_pages, quantized_block_table,
                                              full_block_table, query_start_loc, seq_lens, layout);
  check_cuda(params);
  launch(key, [&](Stream stream) { return kivi::cuda::store(params, static_cast<int>(key.size(0)), stream); });
}

void decode_cuda(const Tensor& output, const Tensor& query, const Tensor& quantized_pages, const Tensor& full_pages,
                 const Tensor& quantized_block_table, const Tensor& full_block_table, const Tensor& query_start_loc,
                 const Tensor& seq_lens, double scale, double logits_soft_cap, const std::vector<int64_t>& layout,
                 const std::optional<Tensor>& workspace) {
  kivi::AttentionParams params =
      make_attention(output, query, quantized_pages, full_pages, quantized_block_table, full_block_table,
                     query_start_loc, seq_lens, scale, logits_soft_cap, layout);
  check_cuda(params);
  STD_TORCH_CHECK(params.query.token_stride % 2 == 0 && params.query.head_stride % 2 == 0 &&
                      params.output.token_stride % 2 == 0 && params.output.head_stride % 2 == 0,
                  "kivi: strides of query and output must be even");
  STD_TORCH_CHECK(workspace.has_value(), "kivi: decode on CUDA needs a workspace; see vllm_kivi.ops.decode_workspace");
  check_device(*workspace, "workspace", query);
  launch(query, [&](Stream stream) {
    const size_t bytes = kivi::cuda::decode_workspace_bytes(params.layout);
    STD_TORCH_CHECK(workspace->numel() * workspace->element_size() >= static_cast<int64_t>(bytes),
                    "kivi: workspace is smaller than ", bytes, " bytes");
    params.workspace = workspace->data_ptr();
    return kivi::cuda::decode(params, stream);
  });
}

void gather_cuda(const Tensor& key, const Tensor& value, const Tensor& quantized_pages, const Tensor& full_pages,
                 const Tensor& quantized_block_table, const Tensor& full_block_table, const Tensor& start_loc,
                 const Tensor& first, const Tensor& boundary, const std::vector<int64_t>& layout) {
  const kivi::GatherParams params = make_gather(key, value, quantized_pages, full_pages, quantized_block_table,
                                                full_block_table, start_loc, first, boundary, layout);
  check_cuda(params);
  launch(key, [&](Stream stream) { return kivi::cuda::gather(params, static_cast<int>(key.size(0)), stream); });
}

int64_t decode_workspace_bytes(const std::vector<int64_t>& layout, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return static_cast<int64_t>(kivi::cuda::decode_workspace_bytes(make_layout(layout)));
}

#endif

// Names of the layout's entries: vllm_kivi/ops.py refuses an extension that was built for other ones.
std::string layout_fields() {
  std::string names;
  for (const char* name : kLayoutFields) names += (names.empty() ? "" : ",") + std::string(name);
  return names;
}

// Chooses the CPU kernels and returns the name of those in use; an empty name changes nothing.
std::string set_isa(std::string name) {
  STD_TORCH_CHECK(name.empty() || kivi::cpu::set_isa(name), "kivi: instruction set '", name,
                  "' is not available; accepted: ", kivi::cpu::available_isas());
  return kivi::cpu::kernels().isa;
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_kivi, m) {
  m.def(
      "store(Tensor key, Tensor value, Tensor(a!) quantized_pages, Tensor(b!) full_pages, "
      "Tensor quantized_block_table, Tensor full_block_table, Tensor query_start_loc, Tensor seq_lens, int[] layout) "
      "-> ()");
  m.def(
      "decode(Tensor(a!) output, Tensor query, Tensor quantized_pages, Tensor full_pages, "
      "Tensor quantized_block_table, Tensor full_block_table, Tensor query_start_loc, Tensor seq_lens, float scale, "
      "float logits_soft_cap, int[] layout, Tensor(b!)? workspace=None) -> ()");
  m.def(
      "prefill(Tensor(a!) output, Tensor query, Tensor key, Tensor value, Tensor quantized_pages, Tensor full_pages, "
      "Tensor quantized_block_table, Tensor full_block_table, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor num_prompt_tokens, float scale, float logits_soft_cap, int[] layout) -> ()");
  m.def(
      "gather(Tensor(a!) key, Tensor(b!) value, Tensor quantized_pages, Tensor full_pages, "
      "Tensor quantized_block_table, Tensor full_block_table, Tensor start_loc, Tensor first, Tensor boundary, "
      "int[] layout) -> ()");
  m.def("decode_workspace_bytes(int[] layout, int device) -> int");
  m.def("layout_fields() -> str");
  m.def("set_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_kivi, CPU, m) {
  m.impl("store", TORCH_BOX(&store_cpu));
  m.impl("decode", TORCH_BOX(&decode_cpu));
  m.impl("prefill", TORCH_BOX(&prefill_cpu));
  m.impl("gather", TORCH_BOX(&gather_cpu));
}

#ifdef KIVI_CUDA
STABLE_TORCH_LIBRARY_IMPL(vllm_kivi, CUDA, m) {
  m.impl("store", TORCH_BOX(&store_cuda));
  m.impl("decode", TORCH_BOX(&decode_cuda));
  m.impl("gather", TORCH_BOX(&gather_cuda));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(vllm_kivi, CompositeExplicitAutograd, m) {
#ifdef KIVI_CUDA
  m.impl("decode_workspace_bytes", TORCH_BOX(&decode_workspace_bytes));
#endif
  m.impl("layout_fields", TORCH_BOX(&layout_fields));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

// Importing the module is what loads the library; everything is reached through torch.ops.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
