#include "base/aligned.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <system_error>
#include <utility>
#include <vector>

namespace ktjax {
namespace {

size_t RoundUpTo(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

[[noreturn]] void ThrowAllocation(size_t bytes) {
  throw AllocationError("cannot allocate " + std::to_string(bytes) + " bytes (" +
                        std::to_string(bytes >> 20) +
                        " MiB) of host memory; free memory or use a smaller model");
}

// True unless the kernel lists several nodes with memory ("0-1", "0,2").
bool HasOneNode() {
  std::ifstream file("/sys/devices/system/node/has_memory");
  std::string nodes;
  std::getline(file, nodes);
  return nodes.find_first_of(",-") == std::string::npos;
}

// The raw system call: libnuma would be the only library that ktjax needs.
void Place(void* data, size_t bytes, int node) {
  // MPOL_PREFERRED, because MPOL_BIND turns a full node into a killed process.
  constexpr int kMpolPreferred = 1;
  constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;
  std::vector<unsigned long> mask(node / kBits + 1, 0);
  mask[node / kBits] |= 1UL << (node % kBits);
  // One bit more than the mask has: the kernel ignores the last one.
  const unsigned long max_node = mask.size() * kBits + 1;
  if (syscall(SYS_mbind, data, bytes, kMpolPreferred, mask.data(), max_node, 0) == 0) {
    return;
  }
  const int error = errno;
  if (HasOneNode()) return;
  throw std::system_error(error, std::generic_category(),
                          "cannot place memory on NUMA node " + std::to_string(node) +
                              " (mbind); in a container allow it (CAP_SYS_NICE)");
}

// `length` bytes aligned to `alignment`, a multiple of the page size.
void* MapAligned(size_t length, size_t alignment) {
  // The kernel aligns to 4 KiB only: map more, give the ends back.
  const size_t slack = alignment;
  if (length > SIZE_MAX - slack) return nullptr;
  void* mapped = mmap(nullptr, length + slack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t aligned = RoundUpTo(begin, alignment);
  if (aligned > begin) munmap(mapped, aligned - begin);
  const uintptr_t end = begin + length + slack;
  if (end > aligned + length) {
    munmap(reinterpret_cast<void*>(aligned + length), end - aligned - length);
  }
  return reinterpret_cast<void*>(aligned);
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes, int numa_node) : size_(bytes) {
  if (bytes == 0) return;
  const bool large = bytes >= kHugePage;
  if (bytes > SIZE_MAX / 2) ThrowAllocation(bytes);
  if (!large && numa_node == kAnyNode) {
    data_ = std::aligned_alloc(kCacheLine, RoundUpTo(bytes, kCacheLine));
    if (data_ == nullptr) ThrowAllocation(bytes);
    return;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Not rounded to 2 MiB: the tail stays on small pages and wastes no memory.
  const size_t length = RoundUpTo(bytes, page);
  data_ = MapAligned(length, large ? kHugePage : page);
  if (data_ == nullptr) ThrowAllocation(bytes);
  mapped_ = length;
  try {
    if (numa_node != kAnyNode) Place(data_, length, numa_node);
  } catch (...) {
    munmap(data_, mapped_);
    throw;
  }
  AdviseHugePages(data_, length);
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

AlignedBuffer::~AlignedBuffer() {
  if (mapped_ != 0) {
    munmap(data_, mapped_);
  } else {
    std::free(data_);
  }
}

size_t AdviseHugePages(void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = RoundUpTo(begin, kHugePage);
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first >= last) return 0;
  const size_t length = last - first;
  const int rc = madvise(reinterpret_cast<void*>(first), length, MADV_HUGEPAGE);
  return rc == 0 ? length : 0;
}

}  // namespace ktjax
