#include "spec/plan_fields.h"

#include <vector>

#include "plan/decision.h"
#include "spec/json.h"

namespace cutloss::spec {
namespace {

void add_buffers(std::vector<std::string>& out, const char* memory, const Ledger& ledger) {
  for (const Booking& b : ledger.bookings()) {
    JsonObject buffer;
    buffer.add("memory", memory).add("name", b.name).add("bytes", b.bytes);
    buffer.add("lifetime", name(b.lifetime)).add("lies_in", b.lies_in).add("until", b.until);
    out.push_back(buffer.text());
  }
}

std::string ledger_of(const Decision& d) {
  std::vector<std::string> buffers;
  add_buffers(buffers, "kept", d.kept);
  add_buffers(buffers, "forward", d.forward);
  add_buffers(buffers, "backward", d.backward);
  return json_list(buffers);
}

std::string reasons_of(const Decided& decided) {
  std::vector<std::string> written;
  for (const std::string& reason : decided.not_in_forward) {
    written.push_back(json("with the loss: " + reason));
  }
  for (const std::string& reason : decided.plan->reasons) written.push_back(json(reason));
  return json_list(written);
}

}  // namespace

std::string plan_fields(const Problem& problem, const Decided& decided) {
  const Plan& plan = *decided.plan;
  const Decision& d = *plan.decision;
  // What is kept from statistics to gradients of a chunk is scratch of one call.
  const std::int64_t seam = plan.keeps_logits ? 0 : plan.kept_bytes;
  JsonObject fields;
  fields.add("engine", plan.engine).add("algorithm", plan.algorithm);
  fields.add("schedule", name(plan.schedule)).add("in_forward", decided.in_forward);
  fields.add("keeps_logits", plan.keeps_logits).add("products", plan.products);
  fields.add("predicted_time", plan.predicted_time);
  fields.add("rows", row_count(plan.problem)).add("chunks", chunk_count(d));
  fields.add("chunk_rows", plan.chunk_rows).add("block_rows", d.sizes.block_rows);
  fields.add("block_columns", d.sizes.slab).add("gradient_rows", d.sizes.gradient_rows);
  fields.add("gradient_columns", d.sizes.gradient_slab);
  fields.add("kept_bytes", plan.kept_bytes - seam);
  fields.add("forward_bytes", plan.forward_workspace_bytes + seam);
  fields.add("backward_bytes", plan.backward_workspace_bytes);
  fields.add("least_bytes", least_workspace(problem));
  fields.add_written("ledger", ledger_of(d)).add_written("reasons", reasons_of(decided));
  return fields.add("text", describe(plan)).text();
}

std::string fields_for_rows(const Problem& problem) {
  std::vector<std::string> written;
  for (const auto& [most, in_forward, schedule] : decide_for_rows(problem)) {
    JsonObject fields;
    fields.add("most", most).add("in_forward", in_forward);
    written.push_back(fields.add("schedule", name(schedule)).text());
  }
  return json_list(written);
}

std::string engine_fields() {
  std::vector<std::string> written;
  for (const EngineHere& engine : engines_here()) {
    JsonObject fields;
    fields.add("name", engine.name).add("absent", engine.absent);
    written.push_back(fields.add("description", engine.description).text());
  }
  return json_list(written);
}

}  // namespace cutloss::spec
