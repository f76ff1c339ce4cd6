#include "chunks.h"

#include <optional>
#include <string>

#include "place.h"

namespace cutloss::binding {
namespace {

constexpr std::int64_t kAlignment = 256;  // of kept and workspace in `memory`

std::int64_t workspace_at(const Plan& plan) {
  return (plan.kept_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

ChunkState make_state(const Call& call, const spec::Options& options) {
  const Plan& plan = call.plan();
  const std::int64_t rows = call.rows();
  const ScalarType type = call.stats();
  ChunkState state;
  for (Tensor* t : {&state.nll, &state.lse, &state.row_max, &state.log_sum}) {
    *t = call.make({rows}, type);
  }
  state.entropy = call.make({rows}, type, options.problem.wanted.entropy);
  state.de = call.make_de();
  state.dc = call.make_dc();
  state.dbias = call.make_dbias();
  state.memory = call.make({workspace_at(plan) + plan.forward_workspace_bytes}, ScalarType::Byte);
  return state;
}

void need(const Tensor& t, std::int64_t count, const char* what) {
  if (t.numel() == count && t.is_contiguous()) return;
  throw Error(ErrorCode::invalid_value, std::string(what) + " must be what chunks_begin made, of " +
                                            std::to_string(count) + " elements, got " +
                                            std::to_string(t.numel()));
}

void use(Call& call, const ChunkState& state) {
  const Plan& plan = call.plan();
  const Problem& p = plan.problem;
  const Head& head = head_of(p);
  const std::int64_t rows = call.rows();
  const auto row_output = [&](const Tensor& t, const char* what) {
    return const_cast<void*>(call.inputs().row(t, what));
  };
  RowOutputs& out = call.args.rows;
  out.nll = row_output(state.nll, "nll");
  out.lse = row_output(state.lse, "lse");
  out.row_max = row_output(state.row_max, "row_max");
  out.log_sum = row_output(state.log_sum, "log_sum");
  need(state.entropy, p.wanted.entropy ? rows : 0, "entropy");
  out.entropy = data(state.entropy);
  need(state.de, p.wanted.de.wanted ? p.rows.sequences * p.rows.length * head.D : 0, "de");
  need(state.dc, p.wanted.dc.wanted ? head.classes.count * head.D : 0, "dc");
  need(state.dbias, p.wanted.dbias.wanted ? head.classes.count : 0, "dbias");
  call.args.gradients = {data(state.de), data(state.dc), data(state.dbias)};
  need(state.memory, workspace_at(plan) + plan.forward_workspace_bytes, "memory");
  auto* memory = static_cast<std::byte*>(data(state.memory));
  call.args.kept = plan.kept_bytes > 0 ? memory : nullptr;
  call.args.workspace = memory == nullptr ? nullptr : memory + workspace_at(plan);
}

}  // namespace

ChunkState ChunkState::read(Stack& stack) {
  ChunkState state;
  for (Tensor* t : state.all()) *t = stack.next<Tensor>();
  return state;
}

void ChunkState::put(Stack& stack) const {
  ChunkState copy = *this;
  for (const Tensor* t : copy.all()) stack.put(*t);
}

std::tuple<ChunkState, std::int64_t> chunks_begin(Operands operands, const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_forward);
  ChunkState state = make_state(call, options);
  use(call, state);
  open(call.plan(), call.args, Pass::both)->begin();
  return {state, chunk_count(call.plan())};
}

std::vector<std::int64_t> chunk_statistics(Operands operands, const ChunkState& state,
                                           std::int64_t chunk, const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_forward);
  use(call, state);
  const auto session = resume(call.plan(), call.args, Pass::both);
  session->statistics(chunk);
  const RowList list = session->rows(chunk);
  const auto* memory = static_cast<const std::byte*>(state.memory.const_data_ptr());
  const std::int64_t offset =
      list.count == 0 ? 0 : reinterpret_cast<const std::byte*>(list.rows) - memory;
  return {offset, list.count};
}

void chunk_gradients(Operands operands, const ChunkState& state,
                     const std::array<std::optional<Tensor>, 3>& upstream, std::int64_t chunk,
                     const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_forward);
  use(call, state);
  RowGradients& up = call.args.upstream;
  up.d_nll = call.inputs().row(upstream[0], "d_nll");
  up.d_lse = call.inputs().row(upstream[1], "d_lse");
  up.d_entropy = call.inputs().row(upstream[2], "d_entropy");
  resume(call.plan(), call.args, Pass::both)->gradients(chunk);
}

void chunks_finish(Operands operands, const ChunkState& state, const spec::Options& options) {
  Call call(std::move(operands), options, Upstream::at_forward);
  use(call, state);
  resume(call.plan(), call.args, Pass::both)->finish();
}

bool is_read_in_place(const Tensor& t) {
  return strides_in_place(place_of(t), OnDevice(t).device()).has_value();
}

}  // namespace cutloss::binding
