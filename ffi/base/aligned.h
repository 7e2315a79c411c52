// Memory for weights and scratch: aligned, on huge pages when large, on a NUMA node.
#ifndef KTJAX_FFI_BASE_ALIGNED_H_
#define KTJAX_FFI_BASE_ALIGNED_H_

#include <cstddef>
#include <new>
#include <string>
#include <utility>

namespace ktjax {

inline constexpr size_t kCacheLine = 64;
inline constexpr size_t kHugePage = size_t{2} << 20;

// A std::bad_alloc that says how much was asked for.
class AllocationError : public std::bad_alloc {
 public:
  explicit AllocationError(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Owns `size()` bytes, 64-byte aligned; from kHugePage up 2 MiB aligned and on huge
// pages where the kernel has them. Contents are undefined. Nothing is touched here, so
// that pages land on the node of the thread that touches them first.
class AlignedBuffer {
 public:
  static constexpr int kAnyNode = -1;

  AlignedBuffer() = default;

  // With a `numa_node`, pages come from that node whoever touches them first, and from
  // another one only when it is full. Throws AllocationError when there is no memory
  // and std::system_error when the kernel refuses the placement on a machine with
  // several nodes (with one node there is nothing to place).
  explicit AlignedBuffer(size_t bytes, int numa_node = kAnyNode);

  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  ~AlignedBuffer();

  void* data() { return data_; }
  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;  // bytes to unmap; 0 when the memory came from the heap
};

// Asks for huge pages for the whole 2 MiB pages inside [data, data + bytes), memory
// that somebody else owns. Returns the bytes that the kernel agreed to: 0 when there is
// no whole page inside or the kernel has no transparent huge pages.
size_t AdviseHugePages(void* data, size_t bytes);

}  // namespace ktjax

#endif  // KTJAX_FFI_BASE_ALIGNED_H_
