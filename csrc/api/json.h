// Just enough JSON to read a saved Program and the header of a safetensors file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace pk::api {

class Json {
 public:
  enum class Kind { null, boolean, number, text, list, map };

  // Throws std::runtime_error saying at which byte the text is broken.
  static Json parse(const std::string& text);

  Kind kind = Kind::null;

  bool is_null() const { return kind == Kind::null; }
  bool boolean() const;
  int64_t integer() const;
  double number() const;            // "inf", "-inf" and "nan" are numbers too, since JSON has none
  const std::string& text() const;
  const std::vector<Json>& list() const;
  const std::map<std::string, Json>& map() const;
  std::vector<int64_t> integers() const;
  // Throws where a key is missing.
  const Json& operator[](const std::string& key) const;
  bool has(const std::string& key) const;

 private:
  friend class Parser;
  bool boolean_ = false;
  double number_ = 0;
  int64_t integer_ = 0;
  std::string text_;
  std::vector<Json> list_;
  std::map<std::string, Json> map_;
};

}  // namespace pk::api
