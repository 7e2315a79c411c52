// Which CPUs this process may use, and how they lie on NUMA nodes and physical cores.
#ifndef KTJAX_FFI_POOL_TOPOLOGY_H_
#define KTJAX_FFI_POOL_TOPOLOGY_H_

#include <string>
#include <vector>

namespace ktjax {

struct NumaNode {
  int id = 0;
  // One CPU of each physical core first, then their SMT siblings: the first n entries
  // are the best places for n threads.
  std::vector<int> cpus;
  int physical_cores = 0;
};

struct Topology {
  std::vector<NumaNode> nodes;  // those with a usable CPU, by id; never empty
  int cpu_count() const;
  int physical_cores() const;
};

// "0-3,8" -> {0, 1, 2, 3, 8}. Throws std::invalid_argument for anything else.
std::vector<int> ParseCpuList(const std::string& text);

// The CPUs that the calling thread may run on, ascending.
std::vector<int> AllowedCpus();

// Reads `sysfs`/devices/system/{cpu,node}, keeping the CPUs that are online and in
// `allowed`. Without NUMA information all CPUs lie on node 0; without sibling
// information each CPU counts as a core.
Topology ReadTopology(const std::string& sysfs, const std::vector<int>& allowed);

// ReadTopology("/sys", AllowedCpus()).
Topology ThisTopology();

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_TOPOLOGY_H_
