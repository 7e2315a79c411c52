#include "pool/topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <system_error>

namespace ktjax {
namespace {

// The first line of a file, or nothing when the file cannot be read.
std::optional<std::string> FirstLine(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::string line;
  std::getline(file, line);
  return line;
}

std::optional<std::vector<int>> ReadCpuList(const std::string& path) {
  const std::optional<std::string> line = FirstLine(path);
  if (!line) return std::nullopt;
  return ParseCpuList(*line);
}

// Both ascending.
std::vector<int> Intersection(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(),
                        std::back_inserter(both));
  return both;
}

// The usable CPUs of each node, by node id.
std::map<int, std::vector<int>> CpusByNode(const std::string& sysfs,
                                           const std::vector<int>& usable) {
  std::map<int, std::vector<int>> by_node;
  const std::string folder = sysfs + "/devices/system/node";
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    int id = 0;
    const char* end = name.data() + name.size();
    if (name.rfind("node", 0) != 0) continue;
    const auto parsed = std::from_chars(name.data() + 4, end, id);
    if (parsed.ec != std::errc() || parsed.ptr != end) continue;
    const auto cpus = ReadCpuList(entry.path().string() + "/cpulist");
    if (!cpus) continue;
    const std::vector<int> here = Intersection(*cpus, usable);
    if (!here.empty()) by_node[id] = here;  // else memory only, or not for us
  }
  if (by_node.empty()) by_node[0] = usable;
  return by_node;
}

NumaNode OrderByCore(const std::string& sysfs, int id, const std::vector<int>& cpus) {
  // (rank among the usable siblings of its core, CPU)
  std::vector<std::pair<int, int>> order;
  for (int cpu : cpus) {
    const auto siblings =
        ReadCpuList(sysfs + "/devices/system/cpu/cpu" + std::to_string(cpu) +
                    "/topology/thread_siblings_list");
    int rank = 0;
    if (siblings) {
      const std::vector<int> usable = Intersection(*siblings, cpus);
      rank = std::lower_bound(usable.begin(), usable.end(), cpu) - usable.begin();
    }
    order.emplace_back(rank, cpu);
  }
  std::sort(order.begin(), order.end());
  NumaNode node;
  node.id = id;
  for (const auto& [rank, cpu] : order) {
    node.cpus.push_back(cpu);
    if (rank == 0) ++node.physical_cores;
  }
  return node;
}

}  // namespace

int Topology::cpu_count() const {
  int count = 0;
  for (const NumaNode& node : nodes) count += static_cast<int>(node.cpus.size());
  return count;
}

int Topology::physical_cores() const {
  int count = 0;
  for (const NumaNode& node : nodes) count += node.physical_cores;
  return count;
}

std::vector<int> ParseCpuList(const std::string& text) {
  std::vector<int> cpus;
  const char* at = text.data();
  const char* end = at + text.size();
  const auto number = [&] {
    int value = 0;
    const auto parsed = std::from_chars(at, end, value);
    if (parsed.ec != std::errc() || value < 0) {
      throw std::invalid_argument("not a CPU list: '" + text + "'");
    }
    at = parsed.ptr;
    return value;
  };
  while (at != end) {
    const int first = number();
    int last = first;
    if (at != end && *at == '-') {
      ++at;
      last = number();
    }
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    if (at == end) break;
    if (*at++ != ',') throw std::invalid_argument("not a CPU list: '" + text + "'");
  }
  std::sort(cpus.begin(), cpus.end());
  return cpus;
}

std::vector<int> AllowedCpus() {
  // EINVAL says that the kernel knows more CPUs than the set holds.
  for (int capacity = CPU_SETSIZE; capacity <= (1 << 20); capacity *= 2) {
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(
        CPU_ALLOC(capacity), [](cpu_set_t* s) { CPU_FREE(s); });
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    CPU_ZERO_S(bytes, set.get());
    if (sched_getaffinity(0, bytes, set.get()) != 0) {
      if (errno == EINVAL) continue;
      break;
    }
    std::vector<int> cpus;
    for (int cpu = 0; cpu < capacity; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.get())) cpus.push_back(cpu);
    }
    return cpus;
  }
  throw std::system_error(errno, std::generic_category(),
                          "cannot read the CPUs of this process (sched_getaffinity)");
}

Topology ReadTopology(const std::string& sysfs, const std::vector<int>& allowed) {
  std::vector<int> usable = allowed;
  std::sort(usable.begin(), usable.end());
  if (const auto online = ReadCpuList(sysfs + "/devices/system/cpu/online")) {
    usable = Intersection(usable, *online);
  }
  if (usable.empty()) {
    throw std::invalid_argument("none of the CPUs allowed to this process is online");
  }
  Topology topology;
  for (const auto& [id, cpus] : CpusByNode(sysfs, usable)) {
    topology.nodes.push_back(OrderByCore(sysfs, id, cpus));
  }
  return topology;
}

Topology ThisTopology() { return ReadTopology("/sys", AllowedCpus()); }

}  // namespace ktjax
