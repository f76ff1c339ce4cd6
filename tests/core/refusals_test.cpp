// Every refusal of make_plan, with the values that its message must name.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "problems.h"
#include "run.h"

namespace cutloss::test {
namespace {

Problem valid() {
  Problem p = with_size(2, 8, 100, 16).problem;
  p.upstream.when = Upstream::at_backward;
  return p;
}

struct Refusal {
  const char* name;
  void (*spoil)(Problem&);
  ErrorCode code;
  std::vector<const char*> message;  // all of these are in it
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr std::int64_t kHuge = std::int64_t{1} << 40;

const Refusal kRefusals[] = {
    {"negative_sequences",
     [](Problem& p) { p.rows.sequences = -1; },
     ErrorCode::invalid_value,
     {"sequences", ">= 0", "-1"}},
    {"negative_length",
     [](Problem& p) { p.rows.length = -3; },
     ErrorCode::invalid_value,
     {"length", ">= 0", "-3"}},
    {"no_vocabulary",
     [](Problem& p) { classes_of(p).count = 0; },
     ErrorCode::invalid_value,
     {"V", ">= 1", "0"}},
    {"negative_vocabulary",
     [](Problem& p) { classes_of(p).count = -5; },
     ErrorCode::invalid_value,
     {"V", ">= 1", "-5"}},
    {"no_hidden_size",
     [](Problem& p) { head_of(p).D = 0; },
     ErrorCode::invalid_value,
     {"D", ">= 1", "0"}},
    {"negative_shift",
     [](Problem& p) { p.rows.shift = -2; },
     ErrorCode::invalid_value,
     {"shift", ">= 0", "-2"}},
    {"rows_overflow",
     [](Problem& p) { p.rows.sequences = p.rows.length = kHuge; },
     ErrorCode::invalid_value,
     {"sequences x length", "1099511627776"}},
    {"embeddings_overflow",
     [](Problem& p) { p.rows.sequences = head_of(p).D = kHuge; },
     ErrorCode::invalid_value,
     {"N x D", "8796093022208", "1099511627776"}},
    {"logits_overflow",
     [](Problem& p) { p.rows.sequences = classes_of(p).count = kHuge; },
     ErrorCode::invalid_value,
     {"N x V", "8796093022208", "1099511627776"}},
    {"classifier_overflow",
     [](Problem& p) { classes_of(p).count = head_of(p).D = kHuge; },
     ErrorCode::invalid_value,
     {"V x D", "1099511627776"}},
    {"e_row_stride",
     [](Problem& p) { head_of(p).e_row_stride = 15; },
     ErrorCode::invalid_value,
     {"e_row_stride", "16", "15"}},
    {"e_row_stride_negative",
     [](Problem& p) { head_of(p).e_row_stride = -16; },
     ErrorCode::invalid_value,
     {"e_row_stride", "16", "-16"}},
    {"e_sequence_stride",
     [](Problem& p) { head_of(p).e_sequence_stride = 127; },
     ErrorCode::invalid_value,
     {"e_sequence_stride", "128", "127"}},
    {"c_row_stride",
     [](Problem& p) { head_of(p).c_row_stride = 3; },
     ErrorCode::invalid_value,
     {"c_row_stride", "16", "3"}},
    {"c_row_stride_overflow",
     [](Problem& p) { head_of(p).c_row_stride = std::int64_t{1} << 60; },
     ErrorCode::invalid_value,
     {"c_row_stride", "100", "1152921504606846976"}},
    {"f64_embeddings_alone",
     [](Problem& p) { head_of(p).e_type = DType::f64; },
     ErrorCode::invalid_type,
     {"E is f64", "C f32", "compute_type f32", "convert"}},
    {"f64_classifier_alone",
     [](Problem& p) { head_of(p).c_type = DType::f64; },
     ErrorCode::invalid_type,
     {"E is f32", "C f64"}},
    {"f64_products_of_f32",
     [](Problem& p) { p.compute_type = DType::f64; },
     ErrorCode::invalid_type,
     {"E is f32", "compute_type f64"}},
    {"f32_bias_among_f64",
     [](Problem& p) {
       set_types(p, kTypes[2]);
       head_of(p).has_bias = true;
       head_of(p).bias_type = DType::f32;
     },
     ErrorCode::invalid_type,
     {"E is f64", "bias f32"}},
    {"softcap_0",
     [](Problem& p) { p.transform.softcap = 0; },
     ErrorCode::invalid_value,
     {"softcap", "> 0", "got 0"}},
    {"softcap_negative",
     [](Problem& p) { p.transform.softcap = -30; },
     ErrorCode::invalid_value,
     {"softcap", "> 0", "-30"}},
    {"softcap_infinite",
     [](Problem& p) { p.transform.softcap = kInf; },
     ErrorCode::invalid_value,
     {"softcap", "finite", "inf"}},
    {"softcap_nan",
     [](Problem& p) { p.transform.softcap = std::nan(""); },
     ErrorCode::invalid_value,
     {"softcap", "nan"}},
    {"softcap_without_a_reciprocal",
     [](Problem& p) { p.transform.softcap = 1e-40; },
     ErrorCode::invalid_value,
     {"softcap", "1.17549e-38", "1e-40"}},
    {"temperature_beyond_f32",
     [](Problem& p) { p.transform.temperature = 1e40; },
     ErrorCode::invalid_value,
     {"temperature", "8.50706e+37", "1e+40"}},
    {"logit_scale_beyond_f32",
     [](Problem& p) { p.transform.logit_scale = -1e40; },
     ErrorCode::invalid_value,
     {"logit_scale", "8.50706e+37", "-1e+40"}},
    {"logit_scale_0",
     [](Problem& p) { p.transform.logit_scale = 0; },
     ErrorCode::invalid_value,
     {"logit_scale", "other than 0", "got 0"}},
    {"logit_scale_infinite",
     [](Problem& p) { p.transform.logit_scale = -kInf; },
     ErrorCode::invalid_value,
     {"logit_scale", "finite", "-inf"}},
    {"logit_scale_nan",
     [](Problem& p) { p.transform.logit_scale = std::nan(""); },
     ErrorCode::invalid_value,
     {"logit_scale", "nan"}},
    {"temperature_0",
     [](Problem& p) { p.transform.temperature = 0; },
     ErrorCode::invalid_value,
     {"temperature", "> 0", "got 0"}},
    {"temperature_negative",
     [](Problem& p) { p.transform.temperature = -1.5; },
     ErrorCode::invalid_value,
     {"temperature", "> 0", "-1.5"}},
    {"temperature_infinite",
     [](Problem& p) { p.transform.temperature = kInf; },
     ErrorCode::invalid_value,
     {"temperature", "finite", "inf"}},
    {"temperature_nan",
     [](Problem& p) { p.transform.temperature = std::nan(""); },
     ErrorCode::invalid_value,
     {"temperature", "nan"}},
    {"negative_workspace",
     [](Problem& p) { p.max_workspace = -1; },
     ErrorCode::invalid_value,
     {"max_workspace", ">= 0", "-1"}},
    {"bias_gradient_without_bias",
     [](Problem& p) { p.wanted.dbias.wanted = true; },
     ErrorCode::invalid_value,
     {"wanted.dbias", "no bias"}},
    {"gradient_without_upstream",
     [](Problem& p) { p.upstream.when = Upstream::none; },
     ErrorCode::invalid_value,
     {"gradient is wanted", "upstream.when is none", "at_forward", "at_backward"}},
    {"gradient_without_schedule",
     [](Problem& p) { p.schedule = Schedule::none; },
     ErrorCode::invalid_value,
     {"schedule none", "wanted.de, dc or dbias"}},
    {"entropy_gradient_without_entropy",
     [](Problem& p) { p.upstream.entropy = true; },
     ErrorCode::invalid_value,
     {"upstream.entropy", "wanted.entropy"}},
    {"zbar_gradient_without_zbar",
     [](Problem& p) { p.upstream.zbar = true; },
     ErrorCode::invalid_value,
     {"upstream.zbar", "wanted.zbar"}},
    {"shard_whose_rows_are_to_be_closed",
     [](Problem& p) {
       classes_of(p).first = 50;
       classes_of(p).total = 150;
     },
     ErrorCode::invalid_value,
     {"first 50", "count 100", "total 150", "wanted.state", "close_rows"}},
    {"classes_beyond_the_total",
     [](Problem& p) {
       classes_of(p).first = 2;
       classes_of(p).total = 101;
     },
     ErrorCode::invalid_value,
     {"first 2", "count 100", "total 101", "at most total"}},
    {"gradient_that_adds",
     [](Problem& p) { p.wanted.de.add = true; },
     ErrorCode::unsupported,
     {"wanted.de.add", "leave it false"}},
    {"gradient_that_adds_in_16_bits",
     [](Problem& p) {
       head_of(p).c_type = DType::bf16;
       p.wanted.dc.add = true;
     },
     ErrorCode::unsupported,
     {"wanted.dc.add", "bf16", "wanted.dc.type to f32"}},
    {"gradient_of_another_type",
     [](Problem& p) {
       head_of(p).e_type = DType::bf16;
       p.wanted.de.type = DType::f16;
     },
     ErrorCode::unsupported,
     {"wanted.de.type is f16", "bf16", "f32"}},
    {"gradient_of_logits",
     [](Problem& p) { p.wanted.dlogits.wanted = true; },
     ErrorCode::invalid_value,
     {"wanted.dlogits", "Linear", "wanted.de"}},
    {"logits_that_exist",
     [](Problem& p) { p.source = Logits{}; },
     ErrorCode::invalid_value,
     {"Logits", "needs Linear", "cutloss/logits.h"}},
    {"device_index_of_the_cpu",
     [](Problem& p) { p.device_index = 0; },
     ErrorCode::invalid_value,
     {"device_index", "-1", "got 0", "the CPU"}},
    {"unknown_engine",
     [](Problem& p) { p.engine = "abacus"; },
     ErrorCode::invalid_value,
     {"abacus", "cpu"}},
    {"engine_of_another_device",
     [](Problem& p) {
       p.engine = "cpu";
       p.device = Device::cuda;
     },
     ErrorCode::unsupported,
     {"engine cpu", "host memory"}},
    {"workspace_too_small",
     [](Problem& p) { p.max_workspace = 10; },
     ErrorCode::workspace,
     {"max_workspace is 10 bytes", "needs", "grant at least"}},
};

class Refuses : public testing::TestWithParam<Refusal> {};

TEST_P(Refuses, AndSaysWhy) {
  ASSERT_NO_THROW(make_plan(valid()));
  Problem problem = valid();
  GetParam().spoil(problem);
  try {
    make_plan(problem);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), GetParam().code) << error.what();
    for (const char* part : GetParam().message) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "no '" << part << "' in: " << error.what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(MakePlan, Refuses, testing::ValuesIn(kRefusals),
                         [](const auto& info) { return std::string(info.param.name); });

// What looks odd and is fine.
const std::pair<const char*, void (*)(Problem&)> kAccepted[] = {
    {"all_classes_said",
     [](Problem& p) {
       classes_of(p) = {0, 100, 100};
     }},
    {"own_type_said", [](Problem& p) { p.wanted.de.type = DType::f32; }},
    {"no_rows", [](Problem& p) { p.rows.length = 0; }},
    {"no_sequences", [](Problem& p) { p.rows.sequences = 0; }},
    {"one_of_everything",
     [](Problem& p) { p.rows.sequences = p.rows.length = classes_of(p).count = head_of(p).D = 1; }},
    {"ignore_index_in_the_vocabulary", [](Problem& p) { p.rows.ignore_index = 7; }},
    {"negative_logit_scale", [](Problem& p) { p.transform.logit_scale = -1; }},
    {"options_in_the_range_of_f64",
     [](Problem& p) {
       set_types(p, kTypes[2]);
       p.transform.softcap = 1e40;
       p.transform.temperature = 1e-100;
     }},
    {"largest_shift_with_rows", [](Problem& p) { p.rows.shift = 7; }},
    {"shift_of_the_length", [](Problem& p) { p.rows.shift = 8; }},
    {"shift_beyond_the_length", [](Problem& p) { p.rows.shift = 11; }},
    {"unused_sequence_stride",
     [](Problem& p) {
       p.rows.sequences = 1;
       head_of(p).e_sequence_stride = 1;
     }},
    {"a_million_columns", [](Problem& p) { classes_of(p).count = 1 << 20; }},
};

TEST(MakePlan, AcceptsWhatIsOddButValid) {
  for (const auto& [name, change] : kAccepted) {
    SCOPED_TRACE(name);
    Problem problem = valid();
    change(problem);
    EXPECT_NO_THROW(make_plan(problem));
  }
}

}  // namespace
}  // namespace cutloss::test
