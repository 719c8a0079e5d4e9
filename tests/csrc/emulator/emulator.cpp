#include "emulator.h"

#include <ucontext.h>

#include <memory>
#include <vector>

#include "emulated_ptx.h"

uint3 threadIdx, blockIdx;
dim3 blockDim;

namespace emulator {
namespace {

constexpr size_t kStack = 64 * 1024;

// Counts arrivals; a phase ends when all have arrived.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t phase = 0;

  void arrive() {
    if (++arrived == expected) {
      arrived = 0;
      ++phase;
    }
  }
};

struct Warp {
  Barrier barrier;
  unsigned char given[2][32][16];  // in turn: a lane may be one exchange ahead
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint64_t* barrier;
};

struct Block {
  uint3 index;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Copy> copies;
  unsigned running;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Block* block;
  unsigned thread;
  unsigned exchanges;
  uint64_t cluster_phase;
  bool done;
  const Barrier* waits_for;  // until its phase is past
  uint64_t phase;

  bool ready() const { return !done && (waits_for == nullptr || waits_for->phase != phase); }
};

std::vector<Fiber> fibers;  // kept from launch to launch for their stacks
std::vector<Block> blocks;  // of the cluster
Barrier cluster;
ucontext_t scheduler;
unsigned count;    // fibers of the cluster
unsigned current;  // the running one
const std::function<void()>* body;

// The next fiber to run in the chosen order; `count` if all wait.
unsigned next() {
  const bool up = order == Order::kForward || order == Order::kFirst;
  unsigned i = order == Order::kFirst ? count - 1 : order == Order::kLast ? 0 : current;
  for (unsigned tried = 0; tried < count; ++tried) {
    i = up ? (i + 1 == count ? 0 : i + 1) : (i == 0 ? count - 1 : i - 1);
    if (fibers[i].ready()) return i;
  }
  return count;
}

void enter(unsigned i) {
  current = i;
  fibers[i].waits_for = nullptr;
  threadIdx = {fibers[i].thread, 0, 0};
  blockIdx = fibers[i].block->index;
}

void leave() {
  const unsigned self = current, other = next();
  if (other == self) return enter(self);
  if (other == count) {
    for (unsigned i = 0; i < count; ++i)
      if (!fibers[i].done) fail("deadlock: a barrier that not all threads reach");
    setcontext(&scheduler);
  }
  enter(other);
  swapcontext(&fibers[self].context, &fibers[other].context);
}

void wait(const Barrier& barrier, uint64_t phase) {
  if (barrier.phase != phase) return;
  fibers[current].waits_for = &barrier;
  fibers[current].phase = phase;
  leave();
}
void arrive_and_wait(Barrier& barrier) {
  const uint64_t phase = barrier.phase;
  barrier.arrive();
  wait(barrier, phase);
}

void fiber_main() {
  (*body)();
  Fiber& self = fibers[current];
  self.done = true;
  Block& block = *self.block;
  if (--block.running == 0) {
    check(block.copies.empty(), "a block ended before its copies");
    std::memset(block.shared.get(), 0xff, block.shared_bytes);
  }
  leave();
}

void start(Fiber& fiber, Block& block, unsigned thread) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
  fiber.block = &block;
  fiber.thread = thread;
  fiber.exchanges = 0;
  fiber.done = false;
  fiber.waits_for = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_cluster(const cudaLaunchConfig_t& config, unsigned first, unsigned size) {
  const unsigned threads = config.blockDim.x;
  count = size * threads;
  cluster = {};
  cluster.expected = count;
  blocks.clear();
  blocks.resize(size);
  if (fibers.size() < count) fibers.resize(count);
  for (unsigned b = 0; b < size; ++b) {
    Block& block = blocks[b];
    block.index = {first + b, 0, 0};
    block.shared_bytes = config.dynamicSmemBytes;
    block.shared.reset(new unsigned char[config.dynamicSmemBytes]);
    std::memset(block.shared.get(), 0xff, config.dynamicSmemBytes);
    block.barrier.expected = block.running = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
    for (unsigned t = 0; t < threads; ++t) start(fibers[b * threads + t], block, t);
  }
  current = 0;
  enter(next());
  swapcontext(&scheduler, &fibers[current].context);
}

}  // namespace

unsigned lane() { return fibers[current].thread % 32; }

void block_barrier() { arrive_and_wait(fibers[current].block->barrier); }

void exchange(const void* mine, void* theirs, size_t size, unsigned lane) {
  Fiber& fiber = fibers[current];
  Warp& warp = fiber.block->warps[fiber.thread / 32];
  auto& given = warp.given[fiber.exchanges++ % 2];
  std::memcpy(given[fiber.thread % 32], mine, size);
  arrive_and_wait(warp.barrier);
  std::memcpy(theirs, given[lane], size);
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const unsigned size = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  check(config.blockDim.x % 32 == 0 && config.blockDim.x <= 1024, "threads of a block");
  check(config.gridDim.x % size == 0 && size <= 8, "blocks of a cluster");
  check(config.dynamicSmemBytes <= static_cast<size_t>(machine.shared_per_block), "shared memory");
  check(size == 1 || machine.clusters != 0, "no clusters here");
  blockDim = config.blockDim;
  body = &kernel;
  for (unsigned first = 0; first < config.gridDim.x; first += size)
    run_cluster(config, first, size);
}

}  // namespace emulator

namespace megatron_deft::cuda::ptx {

using namespace emulator;

unsigned char* shared_memory() { return fibers[current].block->shared.get(); }
unsigned char* shared_memory_of(unsigned rank) {
  check(rank < blocks.size(), "no such block in the cluster");
  check(blocks[rank].running > 0, "shared memory of a block that has ended");
  return blocks[rank].shared.get();
}

void cluster_arrive() {
  fibers[current].cluster_phase = cluster.phase;
  cluster.arrive();
}
void cluster_wait() { wait(cluster, fibers[current].cluster_phase); }

void bulk_copy(void* to, const void* from, uint32_t bytes, CopyBarrier* barrier) {
  check_aligned(to);
  check_aligned(from);
  check(bytes > 0 && bytes % 16 == 0 && bytes < 1u << 20, "size of a bulk copy");
  check(*barrier == kReady, "a barrier that is not ready for a copy");
  *barrier = kCopying;
  fibers[current].block->copies.push_back({to, from, bytes, barrier});
}
void wait_for_copy(CopyBarrier* barrier) {
  if (*barrier == kCopied) return;
  check(*barrier == kCopying, "waiting for a copy that nobody started");
  std::vector<Copy>& copies = fibers[current].block->copies;
  for (size_t i = 0; i < copies.size(); ++i)
    if (copies[i].barrier == barrier) {
      std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
      copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
      break;
    }
  *barrier = kCopied;
}

}  // namespace megatron_deft::cuda::ptx
