// Products of rows with panels of base weights and of adapters: what every pass is made
// of.
#ifndef KTJAX_FFI_MOE_PRODUCTS_H_
#define KTJAX_FFI_MOE_PRODUCTS_H_

#include <xmmintrin.h>

#include <chrono>
#include <mutex>
#include <span>

#include "moe/arrays.h"
#include "moe/base_store.h"
#include "moe/profile.h"
#include "moe/schedule.h"
#include "moe/scratch.h"
#include "moe/terms.h"

namespace ktjax {

// Fetches `bytes` bytes to L2. In assembly: gcc 12 takes a function of prefetches alone
// for one that does nothing, and leaves out the calls of it.
inline void Fetch(const void* data, int64_t bytes) {
  const char* line = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) {
    asm volatile("prefetcht1 %0" : : "m"(line[i]));
  }
}

// The same for lines that will be written: this core owns them when the stores come.
inline void FetchToWrite(const void* data, int64_t bytes) {
  const char* line = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) {
    asm volatile("prefetchw %0" : : "m"(line[i]));
  }
}

// Bytes that a product fetches besides the next panel.
class FetchList {
 public:
  void Add(ByteSpan bytes) {
    if (bytes.size > 0) list_[count_++] = bytes;
  }
  const ByteSpan* data() const { return list_; }
  int count() const { return count_; }

 private:
  // The rows of the next product, and B of two factors for it; A of three factors.
  ByteSpan list_[6];
  int count_ = 0;
};

// One LoRA array, [experts, rows, columns]; a matrix that stands alone is expert 0.
struct LoRAMatrix {
  ConstArray array;
  int64_t rows;
  int64_t columns;

  // Packs rows [row, row + outputs) x columns [column, column + depth) of an expert's
  // matrix as strips of a panel; see Kernels::pack_outputs_*. Its low part as well
  // where dst has one.
  void PackOutputs(const Kernels& kernels, int expert, int64_t row, int outputs,
                   int64_t column, int depth, int strips, SplitPanel dst,
                   ptrdiff_t dst_stride) const;
  // The same with rows as depths and columns as outputs; see Kernels::pack_depths_*.
  void PackDepths(const Kernels& kernels, int expert, int64_t row, int depth,
                  int64_t column, int outputs, int strips, SplitPanel dst,
                  ptrdiff_t dst_stride) const;

  // Calls f(the kernels for the matrix's dtype, an expert's rows from (row, column)
  // on).
  template <typename F>
  void InPlace(const Kernels& kernels, int expert, int64_t row, int64_t column,
               F f) const {
    const int64_t offset = (expert * rows + row) * columns + column;
    if (array.is_float32) {
      f(*kernels.adapters_f32,
        Rows<float>{static_cast<const float*>(array.data) + offset, columns});
    } else {
      f(*kernels.adapters_bf16,
        Rows<bf16>{static_cast<const bf16*>(array.data) + offset, columns});
    }
  }
  // `count` whole rows of an expert's matrix.
  ByteSpan WholeRows(int expert, int64_t row, int count) const {
    const int64_t bytes = columns * (array.is_float32 ? sizeof(float) : sizeof(bf16));
    return {static_cast<const char*>(array.data) + (expert * rows + row) * bytes,
            count * bytes};
  }
  // Fetches `count` rows of an expert's matrix from (row, column) on, `width` columns.
  void FetchRows(int expert, int64_t row, int count, int64_t column, int width) const {
    const int64_t size = array.is_float32 ? sizeof(float) : sizeof(bf16);
    const char* first = static_cast<const char*>(array.data) +
                        ((expert * rows + row) * columns + column) * size;
    if (width == columns) return Fetch(first, count * width * size);
    for (int i = 0; i < count; ++i) Fetch(first + i * columns * size, width * size);
  }
};

// A LoRA gradient as a product over rows: grad[i][n] = Σ_r low_rank[i][r] source[r][n].
struct RowFactor {
  SplitRows low_rank;  // a row per rank; zero from the last source row up to a multiple
                       // of kDepth
  bool transposed;     // whether grad is stored as [n][i] (B) or as [i][n] (A)
  MutableArray grad;   // its first element
  int64_t stride;      // between its rows
};

class Products {
 protected:
  // Takes the backend for itself: the workspace is this pass's. Rows are `exact` where
  // they are float32: carried in two parts, so that results are exact to float32.
  Products(const BaseStore& base, bool exact)
      : base_(base),
        exact_(exact),
        backend_(*base.backend()),
        kernels_(backend_.kernels),
        epilogues_(*kernels_.epilogues),
        lock_(backend_.mutex) {}

  bool exact() const { return exact_; }

  // Runs job(worker, scratch) on the pool, with the kernels' thread state set up and
  // the scratch that make_scratch(arena) describes.
  template <typename MakeScratch, typename Job>
  void RunOnPool(MakeScratch make_scratch, Job job);

  // Worker::Barrier, timed.
  static bool Wait(Worker& worker, const Scratch& scratch) {
    const WorkTimer timer(scratch.times, &WorkTimes::wait);
    return worker.Barrier();
  }

  // Prefetching is spread over so many passes through a panel. A kernel with larger
  // tiles makes fewer, and then fetches what is left at its own rate.
  static constexpr int kFetchRows = 6;
  // The product of rows with base weights, and what is added to it.
  struct BaseProduct {
    SplitRows rows;
    const Int8Rows* codes;  // the rows, quantised; null: base weights are decoded
    StoredPanel panel;
    StoredPanel next;  // to be fetched meanwhile
    FetchList also;    // the same
    int depth;
    int all_rows;  // that are multiplied with the panel, in this product and in others
    Terms lora;
  };
  // Like Multiply below.
  template <typename Touch, typename Epilogue>
  void MultiplyBase(const BaseProduct& product, int rows, const Scratch& scratch,
                    Touch touch, Epilogue epilogue) const;
  // scratch.tile = the product, where there are few rows and kernels multiply with
  // codes as they are. By all rows: how they are cut must not change a bit.
  bool DotCodes(const BaseProduct& product, const BasePanel& panel, int rows,
                const Scratch& scratch, Prefetch prefetch) const {
    if (!kernels_.dot_codes || product.all_rows > kMaxContractRows) return false;
    prefetch.Spread(product.depth / 2);
    const auto dot = [&](const QuantPanel& codes, float* c, Prefetch* fetch) {
      return kernels_.dot_codes(product.rows.high, product.rows.stride, rows, codes,
                                product.depth, c, fetch);
    };
    return dot(panel.codes, scratch.tile, prefetch.base ? &prefetch : nullptr) &&
           (!panel.mixed() || dot(*panel.odd, scratch.tile + kStrip, nullptr));
  }
  // Fetches a panel of base weights.
  static Prefetch FetchPanel(const StoredPanel& panel) {
    return panel ? FetchPart(panel, 0, panel.Bytes(), 1, 0) : Prefetch{};
  }
  // Fetches depth pairs [first, first + pairs) of `panels` panels, `stride` bytes
  // apart.
  static Prefetch FetchPairs(const StoredPanel& panel, int first, int pairs,
                             int panels = 1, int64_t stride = 0) {
    return FetchPart(panel, panel.PairBytes(first), panel.PairBytes(pairs), panels,
                     stride);
  }
  static Prefetch FetchPart(const StoredPanel& panel, int64_t offset, int64_t bytes,
                            int panels, int64_t stride) {
    Prefetch prefetch;
    prefetch.base = panel.start() + offset;
    prefetch.stride = stride;
    prefetch.chunk_bytes = RoundUp(bytes, 2048);
    prefetch.total_bytes = panels * prefetch.chunk_bytes;
    return prefetch;
  }
  // Few rows go through a panel faster than it comes from memory, once, in the order in
  // which it lies there. Lines that are asked for 5 KiB ahead of their use, and go to
  // L1, then come faster than those that are to wait in L2 for the panel after this
  // one: decoding a token of INT4 takes 0.43 instead of 0.48 ms.
  static constexpr int64_t kNearBytes = 5120;
  // What is fetched at once and not spread over a product, at most.
  static constexpr int64_t kBurstBytes = 256 << 10;
  // Fetches depth pairs of a panel just ahead of their product, and meanwhile the
  // scales of the next panel, if any.
  static Prefetch FetchNear(const StoredPanel& panel, int64_t pairs,
                            const StoredPanel& next) {
    const int64_t bytes = panel.PairBytes(pairs), ahead = std::min(bytes, kNearBytes);
    Prefetch prefetch;
    prefetch.near_bytes = kNearBytes;
    prefetch.base = panel.start() + ahead;
    prefetch.chunk_bytes = prefetch.total_bytes = bytes - ahead;
    if (next) {
      prefetch.scales = next.start() + next.PairBytes(pairs);
      prefetch.scales_bytes = next.ScaleBytes(pairs);
    }
    return prefetch;
  }
  // Fetches the scales and zero points of what FetchNear fetches of the next panel.
  // Those after them the kernel fetches; of blocks, all (Prefetch::scales).
  static void FetchFirstScales(const StoredPanel& next) {
    const BasePanel panel = next;
    if (panel.values) return;
    const QuantPanel& codes = panel.codes;
    const FormatSpec& spec = SpecOf(codes.format);
    if (spec.blocks) return;
    const int64_t outputs = kStrip * codes.strips;
    const int64_t depths = kNearBytes * 8 / spec.bits() / outputs;
    const int64_t scales = CeilDiv(depths, codes.group) * outputs;
    Fetch(codes.scales, scales * ScaleBytes(spec.scale));
    if (codes.zeros) Fetch(codes.zeros, scales);
  }
  // Depth pairs [first, first + pairs) of a panel, pairs <= kChunkPairs: where they
  // are, or decoded in scratch.chunk.
  const bf16* Pairs(const BasePanel& panel, int strips, int first, int pairs,
                    const Scratch& scratch, Prefetch* prefetch) const {
    if (panel.values)
      return panel.values + static_cast<int64_t>(first) * 2 * kStrip * strips;
    Decode(panel, first, pairs, scratch.chunk, prefetch, scratch);
    return scratch.chunk;
  }

  void Decode(const BasePanel& panel, int first, int pairs, bf16* dst,
              Prefetch* prefetch, const Scratch& scratch) const {
    const WorkTimer timer(scratch.times, &WorkTimes::decode);
    panel.Decode(kernels_, first, pairs, dst, prefetch);
  }

  // tile += terms.
  void AddTerms(const Terms& terms, int rows, int strips,
                const Scratch& scratch) const {
    if (terms.count() == 0) return;
    kernels_.gemm(terms.data(), terms.count(), rows, strips, scratch.tile, true,
                  nullptr);
  }

  // tile = rows x panel for all rows, in tiles. touch(row) fetches what the epilogue
  // will need of a row, while the product hides the way from memory; epilogue(first,
  // count) consumes a tile.
  template <typename Touch, typename Epilogue>
  void Multiply(const Terms& terms, int rows, int strips, const Scratch& scratch,
                Prefetch prefetch, Touch touch, Epilogue epilogue) const;

  // Source panels that are transposed at a time: 256 KiB of an L2, used at once.
  static constexpr int kSourcePanels = 32;
  // The product of rows with panels that are transposed first, kSourcePanels of
  // `sources` at a time, while the sums wait in scratch.tile. transposed(first, count)
  // transposes source panels into scratch.panel and returns the terms of all rows with
  // them; epilogue(tile, first row, rows) consumes a tile.
  template <typename Transposed, typename Touch, typename Epilogue>
  void MultiplyTransposed(int sources, Transposed transposed, const Terms& lora,
                          int rows, int strips, const Scratch& scratch,
                          Prefetch prefetch, Touch touch, Epilogue epilogue) const;

  // The gradients of `factors`, of `rank` rows each, over `count` source rows and
  // `columns` of their columns, which pack(first row, rows, first column, outputs,
  // strips) brings to scratch.panel with rows as depths.
  template <typename Pack>
  void MultiplyOverRows(Pack pack, int count, int columns, int rank,
                        std::span<const RowFactor> factors,
                        const Scratch& scratch) const;
  void StoreGrad(const RowFactor& factor, int rank, const float* tile, int column,
                 int outputs) const;

  // Base weights have one part: kernels do not write to them.
  static SplitPanel OnePart(const bf16* panel) {
    return {const_cast<bf16*>(panel), nullptr};
  }
  static Int8Rows From(Int8Rows rows, int64_t first) {
    rows.values += first * rows.stride;
    rows.scales += first * rows.scale_stride;
    rows.sums += first * rows.sum_stride;
    return rows;
  }

  const BaseStore& base_;
  const bool exact_;
  Backend& backend_;
  const Kernels& kernels_;
  const Epilogues& epilogues_;
  const std::unique_lock<std::mutex> lock_;
};

template <typename MakeScratch, typename Job>
void Products::RunOnPool(MakeScratch make_scratch, Job job) {
  Arena counting(nullptr);
  make_scratch(counting);
  backend_.pool.Run([&](Worker& worker) {
    Arena arena(worker.Scratch(counting.used()));
    Scratch scratch = make_scratch(arena);
    struct ThreadState {
      const Kernels& kernels;
      explicit ThreadState(const Kernels& k) : kernels(k) { kernels.enter(); }
      ~ThreadState() { kernels.leave(); }
    } state(kernels_);
    if (worker.index() || !Profile::Get().enabled()) return job(worker, scratch);
    WorkTimes times;
    scratch.times = &times;
    const uint64_t start = __rdtsc();
    const auto clock = std::chrono::steady_clock::now();
    job(worker, scratch);
    const std::chrono::duration<double> seconds =
        std::chrono::steady_clock::now() - clock;
    times.Report(__rdtsc() - start, seconds.count());
  });
}

template <typename Touch, typename Epilogue>
void Products::Multiply(const Terms& terms, int rows, int strips,
                        const Scratch& scratch, Prefetch prefetch, Touch touch,
                        Epilogue epilogue) const {
  prefetch.Spread(terms.data()[0].depth / 2 * CeilDiv(rows, kFetchRows));
  ForTiles(kernels_, rows, [&](int first, int count) {
    for (int row = first; row < first + count; ++row) touch(row);
    const Terms tile_terms = terms.From(first);
    const int64_t pairs = terms.data()[0].depth / 2;
    const bool fetch = prefetch.Due((rows - first - count) * pairs / kFetchRows);
    kernels_.gemm(tile_terms.data(), tile_terms.count(), count, strips, scratch.tile,
                  false, fetch ? &prefetch : nullptr);
    {
      const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
      epilogue(first, count);
    }
  });
}

template <typename Touch, typename Epilogue>
void Products::MultiplyBase(const BaseProduct& product, int rows,
                            const Scratch& scratch, Touch touch,
                            Epilogue epilogue) const {
  const auto& [operand, codes, stored, next, also, depth, all_rows, lora] = product;
  const int strips = stored.strips();
  const BasePanel panel = stored;
  const bool once = codes || (panel.values && !exact());
  // A mixed panel is two, of which FetchNear knows the first.
  const bool near = once && !panel.mixed() && all_rows <= kernels_.near_rows;
  Prefetch prefetch = near ? FetchNear(stored, depth / 2, next) : FetchPanel(next);
  const ByteSpan ahead{next.start(), std::min(stored.PairBytes(depth / 2), kNearBytes)};
  if (near) {
    if (next) FetchFirstScales(next);
    prefetch.more = &ahead;
    prefetch.more_count = next ? 1 : 0;
    for (int i = 0; i < also.count(); ++i) {
      const auto [first, size] = also.data()[i];
      Fetch(first, std::min(size, kBurstBytes));
    }
  } else {
    prefetch.more = also.data();
    prefetch.more_count = also.count();
  }
  if (codes) {
    prefetch.Spread(depth / 2 * CeilDiv(rows, kFetchRows));
    ForTiles(kernels_, rows, [&](int first, int count) {
      for (int row = first; row < first + count; ++row) touch(row);
      const auto multiply = [&](const QuantPanel& b, float* c, Prefetch* fetch) {
        kernels_.gemm_int8(SpecOf(b.format), From(*codes, first), b, depth, count, c,
                           fetch);
      };
      multiply(panel.codes, scratch.tile, prefetch.base ? &prefetch : nullptr);
      if (panel.mixed()) multiply(*panel.odd, scratch.tile + kStrip, nullptr);
      AddTerms(lora.From(first), count, strips, scratch);
      {
        const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
        epilogue(first, count);
      }
    });
    return;
  }
  if (!panel.values && rows <= kernels_.max_rows && !exact()) {
    for (int row = 0; row < rows; ++row) touch(row);
    if (!DotCodes(product, panel, rows, scratch, prefetch)) {
      // One tile of rows: what was decoded is used at once, from L1. (Rows in two parts
      // are summed one after the other over all depths, as they are in other tiles.)
      prefetch.Spread(depth);
      for (int pair = 0; pair < depth / 2; pair += kChunkPairs) {
        const int pairs = std::min(kChunkPairs, depth / 2 - pair);
        const bf16* values = Pairs(panel, strips, pair, pairs, scratch,
                                   prefetch.base ? &prefetch : nullptr);
        const Term term{operand.high + 2 * pair, operand.stride, values, 2 * pairs};
        kernels_.gemm(&term, 1, rows, strips, scratch.tile, pair > 0,
                      prefetch.base ? &prefetch : nullptr);
      }
    }
    AddTerms(lora, rows, strips, scratch);
    {
      const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
      epilogue(0, rows);
    }
    return;
  }
  const bf16* values = panel.values;
  if (!values) {
    Decode(panel, 0, depth / 2, scratch.panel.high, nullptr, scratch);
    values = scratch.panel.high;
  }
  Terms terms;
  terms.Add(operand, OnePart(values), depth);
  terms.Add(lora);
  Multiply(terms, rows, strips, scratch, prefetch, touch, epilogue);
}

template <typename Transposed, typename Touch, typename Epilogue>
void Products::MultiplyTransposed(int sources, Transposed transposed, const Terms& lora,
                                  int rows, int strips, const Scratch& scratch,
                                  Prefetch prefetch, Touch touch,
                                  Epilogue epilogue) const {
  prefetch.Spread(int64_t{sources} * kPanel / 2 * CeilDiv(rows, kFetchRows));
  for (int begin = 0; begin < rows; begin += kTransposedRows) {
    const int end = std::min(rows, begin + kTransposedRows);
    int source = 0, count;
    for (int left = static_cast<int>(CeilDiv(sources, kSourcePanels)); left > 0;
         --left, source += count) {
      count = static_cast<int>(CeilDiv(sources - source, left));
      const bool last = left == 1;
      Terms terms = transposed(source, count);
      if (last) terms.Add(lora);
      ForTiles(kernels_, end - begin, [&](int first, int tile_rows) {
        const int row = begin + first;
        // Sums that need not wait stay in one place, in L1.
        float* tile = scratch.tile + (sources > kSourcePanels ? first * kPanel : 0);
        for (int r = row; last && r < row + tile_rows; ++r) touch(r);
        const Terms tile_terms = terms.From(row);
        const int64_t to_come = int64_t{end - row - tile_rows} * count +
                                int64_t{end - begin} * (sources - source - count) +
                                int64_t{rows - end} * sources;
        const bool fetch = prefetch.Due(to_come * kPanel / 2 / kFetchRows);
        kernels_.gemm(tile_terms.data(), tile_terms.count(), tile_rows, strips, tile,
                      source > 0, fetch ? &prefetch : nullptr);
        if (!last) return;
        const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
        epilogue(tile, row, tile_rows);
      });
    }
  }
}

template <typename Pack>
void Products::MultiplyOverRows(Pack pack, int count, int columns, int rank,
                                std::span<const RowFactor> factors,
                                const Scratch& scratch) const {
  const int rank_rows = static_cast<int>(RoundUp(rank, kernels_.max_rows));
  for (int column = 0; column < columns; column += kPanel) {
    const int outputs = std::min(kPanel, columns - column);
    const int strips = static_cast<int>(CeilDiv(outputs, kStrip));
    if (count == 0) {
      std::fill_n(scratch.tile, factors.size() * rank_rows * kPanel, 0.0f);
    }
    for (int from = 0; from < count; from += kMaxGradDepth) {
      const int depth = std::min(kMaxGradDepth, count - from);
      pack(from, depth, column, outputs, strips);
      for (size_t f = 0; f < factors.size(); ++f) {
        SplitRows rows = factors[f].low_rank;
        rows.high += from;
        Terms terms;
        terms.Add(rows, scratch.panel, static_cast<int>(RoundUp(depth, 2)));
        float* tile = scratch.tile + f * rank_rows * kPanel;
        ForTiles(kernels_, rank, [&](int first, int tile_rows) {
          const Terms tile_terms = terms.From(first);
          kernels_.gemm(tile_terms.data(), tile_terms.count(), tile_rows, strips,
                        tile + first * kPanel, from > 0, nullptr);
        });
      }
    }
    for (size_t f = 0; f < factors.size(); ++f) {
      StoreGrad(factors[f], rank, scratch.tile + f * rank_rows * kPanel, column,
                outputs);
    }
  }
  _mm_sfence();  // after which other threads may read what was streamed
}

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_PRODUCTS_H_
