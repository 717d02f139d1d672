// Runs the CUDA sources on the host, one fiber a thread, so that results can be tested
// where there is no GPU. Stands in for the lower half of kernels/prelude.cuh.
//
// A fiber is kept from block to block, and switched to without a system call. Shared memory
// starts as NaN. Asynchronous copies land either at once or only when they
// are waited for (`late_copies`): the first finds slots refilled too early, the second
// finds slots read too early.
//
// No header of C++'s library: compiling them would take longer than anything else here.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define HOST_EMULATION 1
#define DEVICE static inline
#define ENTRY static
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3_ { int x, y, z; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
template <typename V> static inline V max(V a, V b) { return a < b ? b : a; }
template <typename V> static inline V min(V a, V b) { return b < a ? b : a; }

const int MOST_THREADS = 3072, MOST_COPIES = 512;
struct Copy { void* to; const void* from; bool valid; int group; };
struct Fiber {
  jmp_buf where;
  bool done;
  int exchanges;
  // Copies that have not landed, oldest first, and how many groups of them were committed.
  Copy copies[MOST_COPIES];
  int waiting, committed;
};
struct Barrier { int arrived = 0, generation = 0; };
struct Lane { unsigned r; float a[8], b[4]; const void* row; };

static dim3_ threadIdx, blockIdx, blockDim, gridDim;
static Fiber* fibers[MOST_THREADS];
static jmp_buf scheduler;
static int current, started;
// Blocks of a cluster run together; block b's threads are the fibers from b * blockDim.x on.
#ifdef SPLIT
const int CLUSTER_BLOCKS = SPLIT;
#else
const int CLUSTER_BLOCKS = 1;
#endif
static Barrier block_barriers[CLUSTER_BLOCKS], some_barriers[CLUSTER_BLOCKS], cluster_barrier, warp_barriers[MOST_THREADS / 32];
static Lane lanes[2][MOST_THREADS];
static unsigned char* shared_memories[CLUSTER_BLOCKS];
static bool late_copies;
static void (*body)(void*);
static void* arguments;

static void yield() {
  if (!_setjmp(fibers[current]->where)) _longjmp(scheduler, 1);
}
static void resume() {
  if (!_setjmp(scheduler)) _longjmp(fibers[current]->where, 1);
}
static void arrive(Barrier& b, int count) {
  const int generation = b.generation;
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  while (b.generation == generation) yield();
}
static int own_block() { return current / blockDim.x; }
#define CLUSTER(blocks)
#define BARRIER_BLOCK() arrive(block_barriers[own_block()], blockDim.x)
#define BARRIER_WARP() arrive(warp_barriers[current / 32], 32)
#define __syncwarp() BARRIER_WARP()
#define DYNAMIC_SHARED(name) unsigned char* name = shared_memories[own_block()]

static void fiber_main() {
  for (;;) {
    yield();
    body(arguments);
    fibers[current]->done = true;
  }
}
static void start_fiber() {
  const size_t bytes = 128 << 10;
  fibers[current] = (Fiber*)malloc(sizeof(Fiber));
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = malloc(bytes);
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (!_setjmp(scheduler)) setcontext(&context);
}

template <typename F> static void run_grid(int gx, int gy, int threads, size_t shared, bool late, F& f) {
  late_copies = late;
  body = [](void* f) { (*(F*)f)(); };
  arguments = &f;
  gridDim = {gx, gy, 1};
  blockDim = {threads, 1, 1};
  const int all = threads * CLUSTER_BLOCKS;
  for (; started < all; ++started) current = started, start_fiber();
  for (auto& memory : shared_memories) {
    free(memory);
    memory = (unsigned char*)aligned_alloc(1024, (shared / 1024 + 1) * 1024);
  }
  for (int y = 0; y < gy; ++y)
    for (int x = 0; x < gx; x += CLUSTER_BLOCKS) {
      for (auto& memory : shared_memories) memset(memory, 0xff, shared);
      for (auto& b : block_barriers) b = Barrier();
      for (auto& b : some_barriers) b = Barrier();
      cluster_barrier = Barrier();
      for (auto& b : warp_barriers) b = Barrier();
      for (int i = 0; i < all; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.done = false;
        fiber.exchanges = fiber.waiting = fiber.committed = 0;
      }
      for (bool alive = true; alive;) {
        alive = false;
        for (current = 0; current < all; ++current)
          if (!fibers[current]->done) {
            alive = true;
            threadIdx = {current % threads, 0, 0};
            blockIdx = {x + current / threads, y, 0};
            resume();
          }
      }
    }
}

typedef unsigned short elem_;
static inline float bits_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned float_bits(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
#define __uint_as_float bits_float
#define __float_as_uint float_bits
#define __int_as_float(i) bits_float((unsigned)(i))
#define NEGATIVE_INFINITY (-INFINITY)
#define INFINITE INFINITY

static inline float to_float(elem_ v) {
#if BF16
  return bits_float((unsigned)v << 16);
#else
  _Float16 h;
  memcpy(&h, &v, 2);
  return (float)h;
#endif
}
static inline elem_ from_float(float f) {
#if BF16
  unsigned u = float_bits(f);
  if (isnan(f)) return 0x7fff;
  return (elem_)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#else
  _Float16 h = (_Float16)f;
  elem_ v;
  memcpy(&v, &h, 2);
  return v;
#endif
}
static inline unsigned pack(float low, float high) {
  return (unsigned)from_float(low) | ((unsigned)from_float(high) << 16);
}

// What the lanes of a warp show each other. Nobody can come to write the next but one before all
// have read this one, so two places are enough.
static Lane* warp_lanes() { return lanes[fibers[current]->exchanges++ % 2] + current / 32 * 32; }

static void mma(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2,
                unsigned a3, unsigned b0, unsigned b1) {
  Lane* warp = warp_lanes();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  for (int i = 0; i < 8; ++i) warp[lane].a[i] = to_float((elem_)(a[i / 2] >> (16 * (i % 2))));
  for (int i = 0; i < 4; ++i) warp[lane].b[i] = to_float((elem_)(b[i / 2] >> (16 * (i % 2))));
  BARRIER_WARP();
  float* d[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + (i & 1), hi = i >> 1;
    // Before sm_80 these are two steps of eight. Wide enough that the order within a step rounds
    // nothing.
    const int step = ARCH >= 80 ? 16 : 8;
    for (int first = 0; first < 16; first += step) {
      long double s = *d[i];
      for (int k = first; k < first + step; ++k) {
        const int q = (k % 8) / 2, upper = k / 8;
        const float x = warp[g * 4 + q].a[2 * (hi + 2 * upper) + (k & 1)];
        const float y = warp[column * 4 + q].b[2 * upper + (k & 1)];
        s += (double)x * y;
      }
      *d[i] = (float)s;
    }
  }
}

static void ldmatrix_any(unsigned* r, const void* row, bool transposed) {
  Lane* warp = warp_lanes();
  warp[threadIdx.x % 32].row = row;
  BARRIER_WARP();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m) {
    const int r0 = transposed ? 2 * t : g, c0 = transposed ? g : 2 * t;
    const int r1 = transposed ? 2 * t + 1 : g, c1 = transposed ? g : 2 * t + 1;
    const unsigned low = ((const elem_*)warp[m * 8 + r0].row)[c0], high = ((const elem_*)warp[m * 8 + r1].row)[c1];
    r[m] = low | (high << 16);
  }
  BARRIER_WARP();  // nobody writes to the rows before all have read them
}
static void ldmatrix(unsigned& a, unsigned& b, unsigned& c, unsigned& d, const void* row) {
  unsigned r[4];
  ldmatrix_any(r, row, false);
  a = r[0], b = r[1], c = r[2], d = r[3];
}
static void ldmatrix_transposed(unsigned& a, unsigned& b, unsigned& c, unsigned& d, const void* row) {
  unsigned r[4];
  ldmatrix_any(r, row, true);
  a = r[0], b = r[1], c = r[2], d = r[3];
}

static void land(const Copy& c) {
  if (c.valid) memcpy(c.to, c.from, 16);
  else memset(c.to, 0, 16);
}
static void copy16(void* to, const void* from, bool valid) {
  Fiber& f = *fibers[current];
  const Copy c = {to, from, valid, f.committed};
#if ARCH >= 80
  if (late_copies) {
    if (f.waiting == MOST_COPIES) abort();
    f.copies[f.waiting++] = c;
    return;
  }
#endif
  land(c);
}
static void copy_commit() { ++fibers[current]->committed; }
template <int PENDING> static void copy_wait() {
  Fiber& f = *fibers[current];
  int landed = 0;
  while (landed < f.waiting && f.copies[landed].group < f.committed - PENDING) land(f.copies[landed++]);
  f.waiting -= landed;
  memmove(f.copies, f.copies + landed, f.waiting * sizeof(Copy));
}

static uint4 load_constant(const void* p) { return *(const uint4*)p; }
template <typename V> static V load_fresh(const V* p) { return *p; }
static void keep_in_memory(void*) {}
static void wait_for_previous() {}
static void let_next_start() {}
template <typename V> static V shuffle_with(V v, int from) {
  static_assert(sizeof(V) == 4, "one register");
  unsigned u;
  memcpy(&u, &v, 4);
  Lane* warp = warp_lanes();
  warp[threadIdx.x % 32].r = u;
  BARRIER_WARP();
  u = warp[from].r;
  memcpy(&v, &u, 4);
  return v;
}
template <typename V> static V shuffle_xor(V v, int mask) { return shuffle_with(v, (threadIdx.x % 32) ^ mask); }
template <typename V> static V shuffle(V v, int lane) { return shuffle_with(v, lane); }

static inline float exp2_fast(float x) { return exp2f(x); }
#define __expf expf
static inline float reciprocal(float x) { return 1.f / x; }
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
static inline void __threadfence() {}
static inline int atomicAdd(int* p, int v) { int old = *p; *p += v; return old; }

// Hopper's own (kernels/hopper.cuh). A barrier's phase, and what it waits for.
typedef unsigned long long u64_;
struct Phase { unsigned char arrivals, left, parity, unused; int bytes; };
struct Tiles { const elem_* from; long long columns, rows, box_rows; };
struct Flight { void* to; const Tiles* map; int column, row; u64_* barrier; };
typedef const unsigned char* Operand;
struct Multiplied {
  float* d;
  int columns;
  Operand a, b;    // tiles in shared memory; a is null where it is in registers
  bool add, by_rows;
  int group;
  // Where it is: the thread's own registers, what was in them, and its two rows of a.
  const unsigned* registers[4];
  unsigned held[4];
  float rows[2][16];
};
const int MOST_FLIGHTS = 64, MOST_PRODUCTS = 64;
static Flight flights[MOST_FLIGHTS];
static int flying;
static Multiplied products[MOST_THREADS][MOST_PRODUCTS];
static int unfinished[MOST_THREADS], begun[MOST_THREADS];

static void barrier_turn(u64_* barrier) {
  Phase& p = *(Phase*)barrier;
  if (p.left == 0 && p.bytes == 0) p.left = p.arrivals, p.parity ^= 1;
}
static void barrier_init(u64_* barrier, int arrivals) {
  *(Phase*)barrier = {(unsigned char)arrivals, (unsigned char)arrivals, 0, 0, 0};
}
static void barrier_init_done() {}
static void barrier_arrive(u64_* barrier) {
  --((Phase*)barrier)->left;
  barrier_turn(barrier);
}
static void barrier_expect(u64_* barrier, int bytes) {
  ((Phase*)barrier)->bytes += bytes;
  barrier_arrive(barrier);
}
static void land(const Flight& f) {
  for (int r = 0; r < f.map->box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const long long row = f.row + r, column = f.column + c;
      const bool there = row < f.map->rows && column < f.map->columns;
      ((elem_*)f.to)[r * 64 + ((c / 8) ^ (r & 7)) * 8 + c % 8] = there ? f.map->from[row * f.map->columns + column] : 0;
    }
  ((Phase*)f.barrier)->bytes -= f.map->box_rows * 128;
  barrier_turn(f.barrier);
}
static void barrier_wait(u64_* barrier, int parity) {
  while (((Phase*)barrier)->parity == parity) {
    // Copies land in an order of their own: the newest first, and only when somebody waits.
    if (flying) land(flights[--flying]);
    else yield();
  }
}
static void copy_tile(void* to, const void* map, int column, int row, u64_* barrier) {
  const Flight f = {to, (const Tiles*)map, column, row, barrier};
  if (!late_copies) return land(f);
  if (flying == MOST_FLIGHTS) abort();
  flights[flying++] = f;
}

static void finish(const Multiplied& m) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto at = [](const unsigned char* tile, int row, int k) {
    const uintptr_t place = (uintptr_t)tile + row * 128 + k * 2;
    return to_float(*(const elem_*)(place ^ ((place >> 7 & 7) << 4)));
  };
  // What the tensor cores may still read has to stay.
  for (int i = 0; i < 4; ++i)
    if (!m.a && *m.registers[i] != m.held[i]) abort();
  for (int i = 0; i < m.columns / 2; ++i) {
    const int h = i / 2 % 2, row = threadIdx.x / 32 % 4 * 16 + h * 8 + g, column = i / 4 * 8 + 2 * t + i % 2;
    long double s = m.add ? m.d[i] : 0;
    for (int k = 0; k < 16; ++k) {
      const float x = m.a ? at(m.a, row, k) : m.rows[h][k];
      s += (double)x * (m.by_rows ? at(m.b, k, column) : at(m.b, column, k));
    }
    m.d[i] = (float)s;
  }
}
// Those that have left the kernel are not waited for.
static void cluster_meet() {
  const int generation = cluster_barrier.generation;
  ++cluster_barrier.arrived;
  for (;;) {
    if (cluster_barrier.generation != generation) return;
    int present = 0;
    for (int i = 0; i < (int)blockDim.x * CLUSTER_BLOCKS; ++i) present += !fibers[i]->done;
    if (cluster_barrier.arrived == present) break;
    yield();
  }
  cluster_barrier.arrived = 0;
  ++cluster_barrier.generation;
}
static float4 load_remote(const float4* own, int rank) {
  const size_t offset = (const unsigned char*)own - shared_memories[own_block()];
  return *(const float4*)(shared_memories[rank] + offset);
}
template <int COUNT> static void some_meet() { arrive(some_barriers[own_block()], COUNT); }
static void show_to_products() {}
template <int COUNT> static void take_registers() {}
template <int COUNT> static void give_registers() {}
static void product_begin() {}
static void product_commit() { ++begun[current]; }
static Operand operand(const void* tile) { return (Operand)tile; }
static void start(Multiplied m) {
  const int i = current;
  m.group = begun[i];
  if (!late_copies) return finish(m);
  if (unfinished[i] == MOST_PRODUCTS) abort();
  products[i][unfinished[i]++] = m;
}
static void product_add(float (&d)[64], const void* a, const void* b) { start({d, 128, (Operand)a, (Operand)b, true, false}); }
static void product_set(float (&d)[64], const void* a, const void* b) { start({d, 128, (Operand)a, (Operand)b, false, false}); }
static void product(float (&d)[8][4], Operand a, Operand b, bool add) {
  start({d[0], 64, a, b, add, false});
}
static void product_by_rows(float (&d)[8][4], const unsigned (&low)[2], const unsigned (&high)[2], Operand b, bool add) {
  Multiplied m = {d[0], 64, nullptr, b, add, true, 0, {&low[0], &low[1], &high[0], &high[1]}};
  const int lane = threadIdx.x % 32;
  Lane* warp = warp_lanes();
  for (int i = 0; i < 4; ++i) m.held[i] = *m.registers[i];
  for (int i = 0; i < 8; ++i) warp[lane].a[i] = to_float((elem_)(m.held[i / 2] >> (16 * (i % 2))));
  BARRIER_WARP();
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) m.rows[h][k] = warp[lane / 4 * 4 + k % 8 / 2].a[2 * (h + 2 * (k / 8)) + k % 2];
  start(m);
}
static void product_end(float (&)[8][4]) {}
template <int PENDING> static void product_wait() {
  const int i = current;
  int done = 0;
  while (done < unfinished[i] && products[i][done].group < begun[i] - PENDING) finish(products[i][done++]);
  unfinished[i] -= done;
  memmove(products[i], products[i] + done, unfinished[i] * sizeof(Multiplied));
}
template <int PENDING> static void product_wait(float (&)[64]) { product_wait<PENDING>(); }
