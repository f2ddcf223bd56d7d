// The producer's and the consumers' protocol over the ring of stages, with a model of mbarrier: any
// order of steps ends, and a consumer only ever reads the tile that was meant for it.

#include <cstdint>
#include <random>
#include <vector>

#include "csrc/cuda/common/ring.h"
#include "expect.h"

using namespace efft_kernels::cuda;

// A phase completes when its arrivals and its announced bytes have all come.
struct Barrier {
  int arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int count) : arrivals(count), pending(count) {}

  bool passed(uint32_t parity) const { return (phase & 1) != parity; }  // try_wait.parity
  void expect(int64_t announced) { bytes += announced; }
  void arrive() {
    --pending;
    complete();
  }
  void deliver(int64_t count) {
    bytes -= count;
    complete();
  }
  void complete() {
    EXPECT(pending >= 0, "an arrival too many");
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = arrivals;
    }
  }
};

constexpr int kWarps = 8;

template <int kStages>
static void protocol(int tiles, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Barrier> full(kStages, Barrier(1)), empty(kStages, Barrier(kWarps));
  std::vector<int> content(kStages, -1);
  struct Load {
    int stage, tile;
    int64_t bytes;
  };
  std::vector<Load> in_flight;  // TMA delivers in any order
  Ring<kStages> producer;
  int produced = 0;
  // Each warp holds a stage until the next one is issued, as one wgmma group stays in flight.
  std::vector<Ring<kStages>> consumer(kWarps);
  std::vector<int> consumed(kWarps, 0), previous(kWarps, -1);
  std::vector<std::vector<int>> held(kWarps);

  int64_t steps = 0;
  bool done = false;
  while (!done && ++steps < 200000) {
    const int who = static_cast<int>(random() % (kWarps + 2));
    if (who == kWarps) {
      if (produced < tiles && empty[producer.stage].passed(producer.parity ^ 1)) {
        const int s = producer.stage;
        for (int w = 0; w < kWarps; ++w)
          for (const int stage : held[w]) EXPECT(stage != s, "stage %d is still being read", s);
        full[s].expect(100);
        full[s].arrive();
        in_flight.push_back({s, produced, 60});
        in_flight.push_back({s, produced, 40});
        ++produced;
        producer.advance();
      }
    } else if (who == kWarps + 1) {
      if (!in_flight.empty()) {
        const size_t pick = random() % in_flight.size();
        const Load load = in_flight[pick];
        in_flight.erase(in_flight.begin() + static_cast<int64_t>(pick));
        content[load.stage] = load.tile;
        full[load.stage].deliver(load.bytes);
      }
    } else if (consumed[who] < tiles) {
      Ring<kStages>& ring = consumer[who];
      if (full[ring.stage].passed(ring.parity)) {
        EXPECT(content[ring.stage] == consumed[who], "warp %d reads tile %d for %d", who,
               content[ring.stage], consumed[who]);
        held[who].push_back(ring.stage);
        if (previous[who] >= 0) {
          held[who].erase(held[who].begin());
          empty[previous[who]].arrive();
        }
        previous[who] = ring.stage;
        ring.advance();
        // The end of an output tile waits for everything in flight.
        if (++consumed[who] % 13 == 0 || consumed[who] == tiles) {
          held[who].clear();
          empty[previous[who]].arrive();
          previous[who] = -1;
        }
      }
    }
    done = produced == tiles;
    for (const int count : consumed) done = done && count == tiles;
  }
  EXPECT(done, "%d stages, %d tiles: stuck at %d", kStages, tiles, produced);
}

int main() {
  for (unsigned seed = 0; seed < 8; ++seed) {
    for (const int tiles : {1, 2, 3, 12, 13, 26, 101}) {
      protocol<3>(tiles, seed);
      protocol<4>(tiles, seed);
      protocol<6>(tiles, seed);
    }
  }
  return failures() != 0;
}
