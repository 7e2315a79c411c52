#include "format/format.h"

#include <stdexcept>
#include <string>

#include "base/types.h"
#include "format/blocks.h"

namespace ktjax {
namespace {

constexpr FormatSpec InBlocks(Format format, const char* name) {
  const BlockSpec* blocks = FindBlocks(format);
  return {format, name, Code::kBlocks, ScaleType::kNone, blocks->depths, 1, blocks};
}

constexpr FormatSpec kSpecs[kFormats] = {
    {Format::kBf16, "bf16", Code::kBf16, ScaleType::kNone, 0, 1},
    {Format::kInt8, "int8", Code::kInt8, ScaleType::kFloat32, 0, 1},
    {Format::kInt4, "int4", Code::kInt4, ScaleType::kFloat32, 0, 1},
    {Format::kInt4KGroup, "int4_kgroup", Code::kInt4, ScaleType::kFloat32, kUserGroup,
     1},
    {Format::kFp8Block, "fp8_block", Code::kE4M3, ScaleType::kFloat32, 128, 128},
    {Format::kFp8Channel, "fp8_channel", Code::kE4M3, ScaleType::kFloat32, 0, 1},
    {Format::kRawInt4, "rawint4", Code::kInt4, ScaleType::kBf16, 32, 1},
    {Format::kMxFp4, "mxfp4", Code::kE2M1, ScaleType::kE8M0, 32, 1},
    {Format::kMxFp8, "mxfp8", Code::kE4M3, ScaleType::kE8M0, 32, 1},
    InBlocks(Format::kQ4_0, "q4_0"),
    InBlocks(Format::kQ4_1, "q4_1"),
    InBlocks(Format::kQ5_0, "q5_0"),
    InBlocks(Format::kQ5_1, "q5_1"),
    InBlocks(Format::kQ8_0, "q8_0"),
    InBlocks(Format::kQ2K, "q2_k"),
    InBlocks(Format::kQ3K, "q3_k"),
    InBlocks(Format::kQ4K, "q4_k"),
    InBlocks(Format::kQ5K, "q5_k"),
    InBlocks(Format::kQ6K, "q6_k"),
    InBlocks(Format::kIq4Nl, "iq4_nl"),
    InBlocks(Format::kIq4Xs, "iq4_xs"),
};

std::string Names() {
  std::string names;
  for (const FormatSpec& spec : kSpecs) {
    names += (names.empty() ? "" : ", ") + std::string(spec.name);
  }
  return names;
}

}  // namespace

const FormatSpec& SpecOf(Format format) { return kSpecs[static_cast<int>(format)]; }

int64_t Encoding::code_columns(int64_t depth) const {
  if (const BlockSpec* blocks = spec().blocks) {
    return depth / blocks->depths * blocks->bytes;
  }
  return CeilDiv(depth * CodeBits(spec().code), 8);
}

int64_t Encoding::scale_columns(int64_t depth) const {
  if (spec().scale == ScaleType::kNone) return 0;
  return group == 0 ? 1 : CeilDiv(depth, group);
}

int64_t Encoding::scale_rows(int64_t outputs) const {
  return CeilDiv(outputs, spec().block_outputs);
}

Encoding MakeEncoding(std::string_view name, int group_size, bool zero_points) {
  const FormatSpec* spec = nullptr;
  for (const FormatSpec& candidate : kSpecs) {
    if (name == candidate.name) spec = &candidate;
  }
  const std::string quoted = "'" + std::string(name) + "'";
  if (spec == nullptr) {
    throw std::invalid_argument("unknown weight format " + quoted +
                                "; the formats are " + Names());
  }
  if (zero_points && spec->group != kUserGroup) {
    throw std::invalid_argument("weight format " + quoted +
                                " has no zero points; int4_kgroup has");
  }
  if (spec->group != kUserGroup) {
    if (group_size != 0 && group_size != spec->group) {
      throw std::invalid_argument(
          "weight format " + quoted + " has no choice of group size, but " +
          std::to_string(group_size) + " was given; leave it out (0)");
    }
    return {spec->format, spec->group, false};
  }
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    throw std::invalid_argument("weight format " + quoted +
                                " has groups of 32, 64 or 128 depths, not of " +
                                std::to_string(group_size));
  }
  return {spec->format, group_size, zero_points};
}

void CheckDepth(const Encoding& encoding, int depth, std::string_view matrix) {
  const FormatSpec& spec = encoding.spec();
  // Blocks may be cut off at the edge of a matrix; groups may not.
  if (encoding.group == 0 || spec.block_outputs != 1 || depth % encoding.group == 0) {
    return;
  }
  throw std::invalid_argument(std::string(matrix) + " weights in " + spec.name +
                              " need a depth that is a multiple of the group size " +
                              std::to_string(encoding.group) + ", not " +
                              std::to_string(depth));
}

}  // namespace ktjax
