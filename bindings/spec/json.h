// Writes JSON, as far as a plan's fields need it.
#pragma once

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cutloss::spec {

inline std::string json(std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += {'\\', 'u', '0', '0', kHex[c >> 4], kHex[c & 15]};
    } else {
      out += c;
    }
  }
  return out + '"';
}

inline std::string json(const char* text) { return json(std::string_view(text)); }
inline std::string json(const std::string& text) { return json(std::string_view(text)); }
inline std::string json(bool value) { return value ? "true" : "false"; }
inline std::string json(std::int64_t value) { return std::to_string(value); }
inline std::string json(int value) { return std::to_string(value); }

// The shortest text that reads as the same number. The number must be finite.
inline std::string json(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof(text), value);
  return {text, end};
}

// A list of what is written as JSON already.
inline std::string json_list(const std::vector<std::string>& written) {
  std::string out = "[";
  for (const std::string& entry : written) {
    if (out.size() > 1) out += ',';
    out += entry;
  }
  return out + "]";
}

// {"name": value, ...} in the order of the calls.
class JsonObject {
 public:
  template <class Value>
  JsonObject& add(std::string_view name, const Value& value) {
    return add_written(name, json(value));
  }
  // A value that is written as JSON already.
  JsonObject& add_written(std::string_view name, const std::string& written) {
    if (!text_.empty()) text_ += ',';
    text_.append(json(name)).append(":").append(written);
    return *this;
  }
  std::string text() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

}  // namespace cutloss::spec
