// Packed lists of integers, read in the order that arguments.h describes.
#include "bindings/torch/arguments.h"

#include <array>
#include <cstddef>

#include "dilated/backend.h"

namespace dilated::binding {
namespace {

constexpr std::array kDTypes = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                DType::kFloat16};

/// Takes entries of a packed list from the front.
class Reader {
 public:
  Reader(const char* argument, const Ints& packed) : argument_(argument), packed_(packed) {}

  std::int64_t integer() {
    if (next_ == packed_.size()) {
      fail();
    }
    return packed_[next_++];
  }

  /// -1 is "not given".
  std::optional<std::int64_t> optional_integer() {
    const std::int64_t value = integer();
    return value == -1 ? std::nullopt : std::optional<std::int64_t>(value);
  }

  bool flag() { return integer() == 1; }

  Ints list(std::int64_t length) {
    if (length < 0 || static_cast<std::size_t>(length) > packed_.size() - next_) {
      fail();
    }
    const auto begin = packed_.begin() + static_cast<std::ptrdiff_t>(next_);
    next_ += static_cast<std::size_t>(length);
    return {begin, begin + static_cast<std::ptrdiff_t>(length)};
  }

  Ints rest() { return list(static_cast<std::int64_t>(packed_.size() - next_)); }

  std::size_t checked(std::int64_t index, std::size_t count) const {
    if (index < 0 || static_cast<std::size_t>(index) >= count) {
      fail();
    }
    return static_cast<std::size_t>(index);
  }

  void finish() const {
    if (next_ != packed_.size()) {
      fail();
    }
  }

 private:
  [[noreturn]] void fail() const {
    reject(argument_, "a list that the package dilated packed",
           std::to_string(packed_.size()) + " integers of another order",
           "call dilated.dilated_attention instead of the operator");
  }

  const char* argument_;
  const Ints& packed_;
  std::size_t next_ = 0;
};

/// Four bits each: an index plus 1, 0 for "not given".
class Digits {
 public:
  Digits(const Reader& reader, std::int64_t packed)
      : reader_(reader), rest_(static_cast<std::uint64_t>(packed)) {}

  std::optional<std::size_t> index(std::size_t count) {
    const auto digit = static_cast<std::int64_t>(rest_ & 15);
    rest_ >>= 4;
    return digit == 0 ? std::nullopt
                      : std::optional<std::size_t>(reader_.checked(digit - 1, count));
  }

  std::optional<std::string> name(const NameRow& row) {
    const std::optional<std::size_t> at = index(row.names.size());
    return at ? std::optional<std::string>(row.names[*at]) : std::nullopt;
  }

  std::optional<bool> flag() {
    const std::optional<std::size_t> at = index(2);
    return at ? std::optional<bool>(*at == 1) : std::nullopt;
  }

 private:
  const Reader& reader_;
  std::uint64_t rest_;
};

NameRow row_of(const char* option) {
  const auto names = option_names(option);
  return {option, {names.begin(), names.end()}};
}

}  // namespace

const std::vector<NameRow>& option_rows() {
  static const std::vector<NameRow> kRows = [] {
    std::vector<NameRow> all = {{"layout", layout_names()}, {"backend", {}}};
    for (const BackendInfo& info : backends()) {
      all[1].names.push_back(info.name);
    }
    for (const char* option : {"preset", "offsets", "groups", "merge", "tail", "gqa_offset"}) {
      all.push_back(row_of(option));
    }
    return all;
  }();
  return kRows;
}

CallOptions unpack(std::optional<double> scale, std::optional<double> out_scale, double dropout_p,
                   const Ints& packed) {
  Reader reader("options", packed);
  const std::vector<NameRow>& rows = option_rows();
  CallOptions options;
  Digits digits(reader, reader.integer());
  options.layout = parse_layout(digits.name(rows[0]).value_or(""));
  options.backend = digits.name(rows[1]).value_or("");
  options.core.preset = digits.name(rows[2]);
  options.core.offsets = digits.name(rows[3]);
  options.core.groups = digits.name(rows[4]);
  options.core.merge = digits.name(rows[5]);
  options.core.tail = digits.name(rows[6]);
  options.core.gqa_offset = digits.name(rows[7]);
  options.core.lse_grad = digits.flag();
  options.core.is_causal = digits.flag().value_or(false);
  const std::int64_t num_segments = reader.integer();
  const std::int64_t num_dilations = reader.integer();
  const std::optional<std::int64_t> num_offsets = reader.optional_integer();
  options.core.head_offset = reader.integer();
  options.core.total_heads = reader.optional_integer();
  options.core.total_kv_heads = reader.optional_integer();
  options.core.segments = reader.list(num_segments);
  options.core.dilations = reader.list(num_dilations);
  if (num_offsets) {
    options.core.offset_table = reader.list(*num_offsets);
  }
  reader.finish();
  options.core.scale = scale;
  options.core.out_scale = out_scale;
  options.core.dropout_p = dropout_p;
  return options;
}

Shapes unpack_shapes(const Ints& packed) {
  Reader reader("shapes", packed);
  Shapes shapes;
  shapes.device.kind = reader.checked(reader.integer(), 2) == 0 ? Device::kCpu : Device::kCuda;
  shapes.device.units = reader.integer();
  shapes.dtype = dtype_at(reader.integer());
  shapes.batch = reader.integer();
  shapes.seqlen = reader.integer();
  shapes.num_heads = reader.integer();
  shapes.num_kv_heads = reader.integer();
  shapes.head_dim = reader.integer();
  shapes.has_key_mask = reader.flag();
  shapes.has_seqused = reader.flag();
  shapes.cu_seqlens = reader.rest();
  return shapes;
}

std::vector<std::string> dtype_names() {
  std::vector<std::string> names;
  names.reserve(std::size(kDTypes));
  for (const DType dtype : kDTypes) {
    names.emplace_back(name_of(dtype));
  }
  return names;
}

DType dtype_at(std::int64_t index) {
  const Ints none;
  return kDTypes[Reader("dtype", none).checked(index, kDTypes.size())];
}

}  // namespace dilated::binding
