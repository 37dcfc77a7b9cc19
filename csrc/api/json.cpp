#include "json.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace pk::api {

namespace {

constexpr int kDeepest = 200;      // nested lists and maps; a Program has five

}  // namespace

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json whole() {
    Json value = any(0);
    skip();
    if (at_ != text_.size()) fail("more text than one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw std::runtime_error("no JSON: " + std::string(what) + " at byte " + std::to_string(at_));
  }
  void skip() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_])) ++at_;
  }
  char next() {
    skip();
    if (at_ == text_.size()) fail("the text ends");
    return text_[at_];
  }
  bool take(char c) {
    if (next() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail((std::string("no '") + c + "'").c_str());
  }
  bool word(const char* w) {
    if (text_.compare(at_, std::strlen(w), w) != 0) return false;
    at_ += std::strlen(w);
    return true;
  }

  Json any(int depth) {
    if (depth > kDeepest) fail("too deep");
    Json value;
    const char c = next();
    if (c == '{') {
      value.kind = Json::Kind::map;
      ++at_;
      if (take('}')) return value;
      do {
        next();
        const std::string key = string();
        expect(':');
        value.map_.emplace(key, any(depth + 1));
      } while (take(','));
      expect('}');
    } else if (c == '[') {
      value.kind = Json::Kind::list;
      ++at_;
      if (take(']')) return value;
      do value.list_.push_back(any(depth + 1));
      while (take(','));
      expect(']');
    } else if (c == '"') {
      value.kind = Json::Kind::text;
      value.text_ = string();
    } else if (word("true") || word("false")) {
      value.kind = Json::Kind::boolean;
      value.boolean_ = c == 't';
    } else if (!word("null")) {
      value.kind = Json::Kind::number;
      const char* const start = text_.c_str() + at_;
      char *end = nullptr, *whole = nullptr;
      value.number_ = std::strtod(start, &end);
      value.integer_ = std::strtoll(start, &whole, 10);
      if (end == start || !std::strchr("-0123456789", c)) fail("no value");
      if (whole != end) value.integer_ = int64_t(value.number_);
      at_ += size_t(end - start);
    }
    return value;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (true) {
      if (at_ == text_.size()) fail("a string has no end");
      const char c = text_[at_++];
      if (c == '"') return found;
      if (c != '\\') {
        found += c;
        continue;
      }
      if (at_ == text_.size()) fail("a string has no end");
      const char escaped = text_[at_++];
      switch (escaped) {
        case 'n': found += '\n'; break;
        case 't': found += '\t'; break;
        case 'r': found += '\r'; break;
        case 'b': found += '\b'; break;
        case 'f': found += '\f'; break;
        case 'u': unicode(&found); break;
        case '"': case '\\': case '/': found += escaped; break;
        default: fail("an unknown escape");
      }
    }
  }

  unsigned hex() {
    if (at_ + 4 > text_.size()) fail("a short \\u");
    unsigned value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = text_[at_++];
      if (!std::isxdigit(static_cast<unsigned char>(c))) fail("a broken \\u");
      value = value * 16 + unsigned(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return value;
  }

  void unicode(std::string* to) {
    unsigned code = hex();
    if (code >= 0xd800 && code < 0xdc00 && word("\\u")) code = 0x10000 + ((code - 0xd800) << 10) + (hex() - 0xdc00);
    if (code < 0x80) {
      *to += char(code);
    } else {
      const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
      *to += char((0xf0 << (3 - more) & 0xf0) | (more == 1 ? 0xc0 : 0) | code >> 6 * more);
      for (int i = more - 1; i >= 0; --i) *to += char(0x80 | (code >> 6 * i & 63));
    }
  }

  const std::string& text_;
  size_t at_ = 0;
};

Json Json::parse(const std::string& text) { return Parser(text).whole(); }

namespace {

[[noreturn]] void wrong(const char* wanted) { throw std::runtime_error(std::string("a value is not ") + wanted); }

}  // namespace

bool Json::boolean() const {
  if (kind == Kind::number) return number_ != 0;
  if (kind != Kind::boolean) wrong("true or false");
  return boolean_;
}
int64_t Json::integer() const {
  if (kind == Kind::boolean) return boolean_;
  if (kind != Kind::number) wrong("a number");
  return integer_;
}
double Json::number() const {
  if (kind == Kind::text && (text_ == "inf" || text_ == "-inf")) return text_[0] == '-' ? -INFINITY : INFINITY;
  if (kind == Kind::text && text_ == "nan") return NAN;
  if (kind == Kind::boolean) return boolean_;
  if (kind != Kind::number) wrong("a number");
  return number_;
}
const std::string& Json::text() const {
  if (kind != Kind::text) wrong("a string");
  return text_;
}
const std::vector<Json>& Json::list() const {
  if (kind != Kind::list) wrong("a list");
  return list_;
}
const std::map<std::string, Json>& Json::map() const {
  if (kind != Kind::map) wrong("an object");
  return map_;
}
std::vector<int64_t> Json::integers() const {
  std::vector<int64_t> found;
  for (const Json& each : list()) found.push_back(each.integer());
  return found;
}
const Json& Json::operator[](const std::string& key) const {
  const auto it = map().find(key);
  if (it == map_.end()) throw std::runtime_error("there is no \"" + key + "\"");
  return it->second;
}
bool Json::has(const std::string& key) const { return kind == Kind::map && map_.count(key) != 0; }

}  // namespace pk::api
