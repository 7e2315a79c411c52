// What the stores of frozen weights share: an encoding, and panels in memory.
#ifndef KTJAX_FFI_MOE_BASE_STORE_H_
#define KTJAX_FFI_MOE_BASE_STORE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/aligned.h"
#include "base/types.h"
#include "format/encode.h"
#include "format/panel.h"
#include "moe/backend.h"

namespace ktjax {

// One matrix, or that of all experts one after the other, row-major: float32 or
// bfloat16 values, or the plain arrays of a quantised format (format/panel.h).
struct SourceMatrix {
  enum class Type { kFloat32, kBf16, kPlain };
  Type type;
  const void* values;
  const void* scales = nullptr;
  const uint8_t* zeros = nullptr;
};

// A panel of base weights: bfloat16 values, or (null) codes.
struct BasePanel {
  const bf16* values;
  QuantPanel codes;  // of values the format alone, kBf16
  // The odd strips, where they have another format than the even ones, which are then
  // alone in `codes` and before these in memory.
  std::optional<QuantPanel> odd = {};

  bool mixed() const { return odd.has_value(); }
  // The values of depth pairs [first, + pairs) of codes, as a panel of all strips.
  void Decode(const Kernels& kernels, int first, int pairs, bf16* dst,
              Prefetch* prefetch) const {
    kernels.decode(codes, first, pairs, dst, prefetch);
    if (mixed()) kernels.decode(*odd, first, pairs, dst + 2 * kStrip, nullptr);
  }
};

// Where things are in a panel of base weights: computed once.
class BasePanelLayout {
 public:
  // `depth` is a multiple of 32.
  BasePanelLayout(const Encoding& encoding, int strips, int depth)
      : strips_(strips), depth_(depth), even_(encoding, strips, depth) {}
  // Even strips in one format and odd ones in another, both in blocks.
  BasePanelLayout(const Encoding& even, const Encoding& odd, int strips, int depth)
      : strips_(strips),
        depth_(depth),
        even_(even, strips / 2, depth),
        odd_(PanelLayout(odd, strips / 2, depth)) {}

  int strips() const { return strips_; }
  // The next panel's first lines wait for this: nothing is copied, and `odd` not
  // cleared, which gcc does in microcode.
  BasePanel At(const uint8_t* memory) const {
    if (even_.encoding.format == Format::kBf16) {
      return {reinterpret_cast<const bf16*>(memory), {}};
    }
    if (!odd_) return {nullptr, even_.At(memory)};
    BasePanel panel{nullptr, even_.At(memory), odd_->At(memory + even_.bytes)};
    panel.codes.apart = panel.odd->apart = 2;
    return panel;
  }
  // Of the panel, scales counted.
  int64_t Bytes() const { return even_.bytes + (odd_ ? odd_->bytes : 0); }
  // Of so many depth pairs, a multiple of 16, scales not counted; of mixed panels the
  // even strips.
  int64_t PairBytes(int64_t pairs) const {
    return 2 * pairs * kStrip * even_.strips * even_.encoding.spec().bits() / 8;
  }
  // Of the scales behind so many depth pairs, all of the panel; of mixed panels those
  // of the even strips.
  int64_t ScaleBytes(int64_t pairs) const { return even_.bytes - PairBytes(pairs); }
  // Bytes between two panels of one matrix. Large ones are 32 depths further apart than
  // they are long. The backward reads the same rows of every panel: a power of two
  // apart (256 KiB for a hidden size of 2048), they would share a few sets of L1 and L2
  // and evict one another.
  int64_t Stride() const {
    return Bytes() + (depth_ >= 512 ? PairBytes(kDepth / 2) : 0);
  }

 private:
  int strips_;
  int depth_;
  PanelLayout even_;  // of all strips where odd ones are no different
  std::optional<PanelLayout> odd_;
};

// A panel as a store names it, or none: what is fetched need not be taken apart.
struct StoredPanel {
  const BasePanelLayout* layout = nullptr;
  const uint8_t* memory = nullptr;

  explicit operator bool() const { return layout; }
  operator BasePanel() const { return layout->At(memory); }
  int strips() const { return layout->strips(); }
  int64_t Bytes() const { return layout->Bytes(); }
  int64_t PairBytes(int64_t pairs) const { return layout->PairBytes(pairs); }
  int64_t ScaleBytes(int64_t pairs) const { return layout->ScaleBytes(pairs); }
  const char* start() const { return reinterpret_cast<const char*>(memory); }
};

class BaseStore {
 public:
  virtual ~BaseStore() = default;
  BaseStore(const BaseStore&) = delete;
  BaseStore& operator=(const BaseStore&) = delete;

  // What users call a store of this class.
  virtual std::string_view kind() const = 0;

  const Encoding& encoding() const { return encoding_; }
  bool quantised() const { return IsQuantised(encoding_); }
  const std::shared_ptr<Backend>& backend() const { return backend_; }
  size_t bytes() const;

 protected:
  BaseStore(std::shared_ptr<Backend> backend, const Encoding& encoding)
      : backend_(std::move(backend)), encoding_(encoding) {}

  static bool IsQuantised(const Encoding& encoding) {
    return encoding.format != Format::kBf16;
  }
  std::shared_ptr<Backend> backend_;
  Encoding encoding_;
  std::vector<AlignedBuffer> memory_;  // one per sub-pool, on its node
};

// Packs `outputs` rows of a matrix of values, `stride` elements apart from element
// `offset` on, as strips of a panel; `depth` of each.
void PackStrips(const Kernels& kernels, const SourceMatrix& matrix, int64_t stride,
                int64_t offset, int outputs, int depth, int strips, bf16* dst,
                ptrdiff_t dst_stride);

// How errors name rows of a matrix.
struct RowsName {
  std::string_view matrix;
  int expert;         // or kNoExpert
  int64_t first_row;  // of the matrix
};

// Rows [row, row + rows) of a source in plain arrays, whose scales begin with row
// `scale_row` of the source's. `encoded` holds them where the source is not quantised.
// Throws std::invalid_argument as EncodedMatrix::Encode and CheckPlain do.
PlainMatrix PlainRows(const Encoding& encoding, const SourceMatrix& source, int64_t row,
                      int64_t scale_row, int rows, int depth, const RowsName& name,
                      EncodedMatrix& encoded);

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_BASE_STORE_H_
