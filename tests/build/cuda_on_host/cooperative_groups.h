// The cluster of this thread, as csrc/cuda uses it.
#pragma once

#include <cuda_runtime_api.h>

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return on_host::cluster_blocks; }
  unsigned block_rank() const { return on_host::rank(); }

  void barrier_arrive() const {
    on_host::Fiber& self = on_host::fibers[on_host::current];
    if (self.arrived) on_host::die("arrives at the cluster's barrier again before it waited");
    self.arrived = true;
    ++self.arrivals;
    ++on_host::arrived;
    on_host::open_cluster();
  }
  void barrier_wait() const {
    on_host::Fiber& self = on_host::fibers[on_host::current];
    if (!self.arrived) on_host::die("waits at the cluster's barrier, and did not arrive");
    if (self.arrivals > on_host::phase) on_host::wait(on_host::State::at_cluster_barrier);
    self.arrived = false;
  }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }

  // The same variable in the shared memory of another block, which must have begun, and not have ended.
  template <typename T>
  T* map_shared_rank(T* mine, int block) const {
    const unsigned threads = blockDim.x;
    bool begun = false, ended = true;
    for (unsigned i = block * threads; i < (block + 1) * threads; ++i) {
      begun = begun || on_host::fibers[i].started;
      ended = ended && on_host::fibers[i].state == on_host::State::done;
    }
    if (!begun) on_host::die("shared memory of a block that has not begun");
    if (ended) on_host::die("shared memory of a block that has ended");
    for (auto& [place, memory] : on_host::shared[on_host::rank()]) {
      char* first = memory.data();
      char* wanted = reinterpret_cast<char*>(mine);
      if (first <= wanted && wanted < first + memory.size()) {
        return reinterpret_cast<T*>(on_host::shared_of(block, place, memory.size()).data() + (wanted - first));
      }
    }
    on_host::die("not shared memory");
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
