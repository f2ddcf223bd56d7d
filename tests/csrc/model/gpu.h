#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

// A model of the multiprocessors of one cluster: the threads of its blocks are fibers of one host
// thread, switched in a random order wherever a kernel waits. Asynchronous operations take effect
// as early or as late as their documentation allows (`eager`), so that a missing wait and an early
// release both show.
namespace model {

[[noreturn]] inline void fail(const char* what) {
  std::printf("model: %s\n", what);
  std::fflush(stdout);
  std::_Exit(3);
}

inline void check(bool condition, const char* what) {
  if (!condition) fail(what);
}

struct Thread {
  ucontext_t
      context;   // its start: later switches are jumps, which spare the signal mask's syscalls
  jmp_buf here;  // where it waits
  bool started = false;
  bool (*ready)(void*) = nullptr;  // of what it waits for; the scheduler asks before it switches
  void* condition = nullptr;
  std::unique_ptr<char[]> stack;
  uint3 thread_idx;
  int index = 0;
  bool done = false;
  std::vector<std::function<void()>> open_copies;         // cp.async, not committed
  std::deque<std::vector<std::function<void()>>> copies;  // committed groups
  std::vector<std::function<void()>> open_products;       // wgmma, not committed
  std::deque<std::vector<std::function<void()>>> products;
};

struct Rendezvous {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Rendezvous meeting;
  std::array<uint32_t, 32> address{};
  std::array<std::array<uint32_t, 4>, 32> data{};
};

// mbarrier: a phase completes when its arrivals and announced bytes have all come.
struct Barrier {
  int arrivals = 0;
  int pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void complete() {
    check(pending >= 0, "an arrival too many at a barrier");
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = arrivals;
    }
  }
};

struct Block {
  uint3 index{};
  dim3 grid;
  std::vector<uint8_t> smem;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Rendezvous> named;
  std::map<uint32_t, Barrier> barriers;
  std::vector<std::function<void()>> loads;  // by TMA, in flight
  bool eager = false;
  int64_t progress = 0;
  ucontext_t scheduler;
  jmp_buf scheduling;
  Thread* current = nullptr;

  bool running() const {
    for (const Thread& t : threads)
      if (!t.done) return true;
    return false;
  }
};

inline Block*& block_pointer() {
  static Block* pointer = nullptr;
  return pointer;
}
inline Block& block() { return *block_pointer(); }

inline std::vector<Block>& cluster() {
  static std::vector<Block> blocks;
  return blocks;
}

// Runs `f` as if in another block.
template <class F>
void in_block(Block& other, F f) {
  Block* const here = block_pointer();
  block_pointer() = &other;
  f();
  block_pointer() = here;
}

inline Thread& current_thread() { return *block().current; }
inline Warp& current_warp() { return block().warps[current_thread().index / 32]; }
inline int lane() { return current_thread().index % 32; }

// From a thread to the scheduler.
inline void yield() {
  if (_setjmp(current_thread().here) == 0) _longjmp(block().scheduling, 1);
}

// From the scheduler to a thread, until that yields.
inline void resume(Block& b, Thread& t) {
  if (_setjmp(b.scheduling) != 0) return;
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  swapcontext(&b.scheduler, &t.context);
}

template <class Condition>
void wait_until(Condition condition) {
  if (!condition()) {
    Thread& t = current_thread();
    t.ready = [](void* c) { return (*static_cast<Condition*>(c))(); };
    t.condition = &condition;
    yield();
    t.ready = nullptr;
  }
  ++block().progress;
}

inline void meet(Rendezvous& r, int count) {
  const int64_t generation = r.generation;
  ++block().progress;
  if (++r.arrived == count) {
    r.arrived = 0;
    ++r.generation;
  } else {
    wait_until([&] { return r.generation != generation; });
  }
}

inline void sync_block() { meet(block().named[0], static_cast<int>(block().threads.size())); }
inline void sync_cluster() {
  meet(cluster()[0].named[-1], static_cast<int>(cluster().size() * block().threads.size()));
}
inline void sync_warp() { meet(current_warp().meeting, 32); }

inline uint8_t* smem_at(uint32_t address, size_t bytes) {
  check(address + bytes <= block().smem.size(), "shared memory beyond what was asked for");
  return block().smem.data() + address;
}

inline uint16_t element_at(uint32_t address) {
  uint16_t value;
  std::memcpy(&value, smem_at(address, 2), 2);
  return value;
}

inline void run_all(std::vector<std::function<void()>>& operations) {
  for (auto& operation : operations) operation();
  operations.clear();
}

// Completes all but the latest `pending` groups.
inline void complete(std::deque<std::vector<std::function<void()>>>& groups, size_t pending) {
  while (groups.size() > pending) {
    run_all(groups.front());
    groups.pop_front();
  }
}

struct Settings {
  bool eager = false;
};
inline Settings& settings() {
  static Settings s;
  return s;
}

inline std::function<void()>& body() {
  static std::function<void()> f;
  return f;
}

inline void entry() {
  body()();
  current_thread().done = true;
  ++block().progress;
  yield();
}

inline void start_threads(Block& b, int threads) {
  constexpr size_t kStackBytes = 256 * 1024;
  b.threads = std::vector<Thread>(threads);
  b.warps = std::vector<Warp>((threads + 31) / 32);
  for (int i = 0; i < threads; ++i) {
    Thread& t = b.threads[i];
    t.index = i;
    t.thread_idx = make_uint3(static_cast<unsigned>(i), 0, 0);
    t.stack.reset(new char[kStackBytes]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = &b.scheduler;
    makecontext(&t.context, entry, 0);
  }
}

inline void run_cluster(int threads, std::mt19937& random) {
  std::vector<Block>& blocks = cluster();
  for (Block& b : blocks) start_threads(b, threads);
  const int count = threads * static_cast<int>(blocks.size());
  const auto progress = [&] {
    int64_t sum = 0;
    for (const Block& b : blocks) sum += b.progress;
    return sum;
  };
  const auto any_warp = [&] { return static_cast<int>(random() % (count / 16 + 1)); };
  int idle_rounds = 0;
  int slow_warp = any_warp();
  bool running = true;
  while (running) {
    running = false;
    const int64_t before = progress();
    // One warp is slow for a while, so that the others run ahead as far as they may.
    if (random() % 512 == 0) slow_warp = any_warp();
    const bool skip_slow = random() % 128 != 0;
    const int first = static_cast<int>(random() % count);
    const int step = random() % 2 ? 1 : count - 1;
    for (int i = 0, at = first; i < count; ++i, at = (at + step) % count) {
      Block& b = blocks[at / threads];
      Thread& t = b.threads[at % threads];
      if (t.done) continue;
      running = true;
      if (skip_slow && at / 32 == slow_warp) continue;
      block_pointer() = &b;
      b.current = &t;
      if (t.ready == nullptr || t.ready(t.condition)) resume(b, t);
    }
    // TMA delivers in any order, some time.
    for (Block& b : blocks) {
      block_pointer() = &b;
      while (!b.loads.empty() && (random() % 2 || progress() == before)) {
        const size_t pick = random() % b.loads.size();
        const auto load = b.loads[pick];
        b.loads.erase(b.loads.begin() + static_cast<int64_t>(pick));
        load();
        ++b.progress;
      }
    }
    if (progress() != before)
      idle_rounds = 0;
    else if (!skip_slow)
      ++idle_rounds;
    check(idle_rounds < 8, "every thread waits: a deadlock");
  }
  for (const Block& b : blocks) {
    check(b.loads.empty(), "loads in flight at the end of a block");
    for (const Thread& t : b.threads)
      check(t.products.empty(), "products in flight at the end of a thread");
  }
}

template <class Kernel>
void run_grid(Kernel kernel, dim3 grid, int threads, int smem_bytes, unsigned cluster_size = 1) {
  static unsigned launches = 0;
  const unsigned seed = 7919 * ++launches;
  body() = kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster_size) {
      cluster() = std::vector<Block>(cluster_size);
      for (unsigned rank = 0; rank < cluster_size; ++rank) {
        Block& b = cluster()[rank];
        b.index = make_uint3(x + rank, y, 0);
        b.grid = grid;
        // Uninitialised memory is NaN in both 16-bit types and in float.
        b.smem.assign(smem_bytes, 0xff);
        b.eager = settings().eager;
      }
      std::mt19937 random(seed + x * 977 + y);
      run_cluster(threads, random);
    }
  }
}

}  // namespace model
