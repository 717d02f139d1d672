// What Hopper has beside the chips before it: barriers that count bytes, copies of whole tiles that
// one thread asks for, and products of a whole group of four warps that read shared memory.
//
// A tile here is rows of 64 elements, 128 bytes each, its base a multiple of 1024; the copy engine
// places 16-byte piece p of row r at p ^ (r & 7), and the products read it so.
#pragma once
#include "prelude.cuh"

#ifndef HOST_EMULATION

DEVICE void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
// Before any other thread, or the copy engine, may use barriers that this one has initialised.
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the phase wait for so many bytes of copies as well.
DEVICE void barrier_expect(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is complete; of a new barrier phase 1 counts as complete.
DEVICE void barrier_wait(u64* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Rows row … of a matrix, 64 columns from `column` on, as `map` describes them; what lies beyond
// the matrix is zero. The barrier is told of every byte.
DEVICE void copy_tile(void* to, const void* map, int column, int row, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Blocks of a cluster see each other's shared memory. All threads that have not left meet here, and
// what they wrote before can be seen after.
DEVICE void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What lies at `own` in the shared memory of the cluster's block `rank`.
DEVICE float4 load_remote(const float4* own, int rank) {
  float4 v;
  asm volatile(
      "{\n.reg .u32 place;\nmapa.shared::cluster.u32 place, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [place];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
  return v;
}
// The first COUNT threads of the block meet.
template <int COUNT> DEVICE void some_meet() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }

// What this thread has written to shared memory can be read by the products of threads that meet it
// after; by default they may miss it.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A whole group of four warps takes so many registers a thread, or gives all but so many back.
template <int COUNT> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

DEVICE void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define EIGHT(how, d, i) \
  how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), how(d[i + 6]), how(d[i + 7])
#define SIXTY_FOUR(how, d)                                                                      \
  EIGHT(how, d, 0), EIGHT(how, d, 8), EIGHT(how, d, 16), EIGHT(how, d, 24), EIGHT(how, d, 32), \
      EIGHT(how, d, 40), EIGHT(how, d, 48), EIGHT(how, d, 56)

// Waits until no more than the newest PENDING of the committed groups are under way.
template <int PENDING> DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// And then d, of a group that is done, may be read: the compiler moves no use of it ahead.
template <int PENDING> DEVICE void product_wait(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : SIXTY_FOUR("+f", d) : "n"(PENDING) : "memory");
}

// The half of a descriptor that has the address.
DEVICE u32 descriptor_low(const void* tile) { return (shared_address(tile) >> 4 & 0x3fff) | (1u << 16); }
// Where a product finds an operand in shared memory; the place must be the same for all lanes.
struct Operand {
  u32 low;    // of its descriptor
};
DEVICE Operand operand(const void* tile) {
  const Operand made = {shuffle(descriptor_low(tile), 0)};
  return made;
}
DEVICE Operand operator+(Operand o, int bytes) {
  const Operand moved = {o.low + bytes / 16};
  return moved;
}
// With the distance of eight rows, and the placement of pieces, each in its field.
DEVICE u64 descriptor(Operand o) { return (u64)o.low | (64ull << 32) | (1ull << 62); }
DEVICE u64 tile_descriptor(const void* tile) {
  const Operand here = {descriptor_low(tile)};
  return descriptor(here);
}

#if BF16
#define PRODUCT_NAME(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16"
#else
#define PRODUCT_NAME(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16"
#endif

// d (64 x 128) += a (64 x 16) b (128 x 16)ᵀ. A thread's d[4 j + 2 h + i] is row 16 w + 8 h + lane / 4,
// column 8 j + 2 (lane % 4) + i, in warp w of its four.
#define PRODUCT                                                                                 \
  PRODUCT_NAME(128)                                                                             \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                    \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "            \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "           \
  "%64, %65, add, 1, 1, 0, 0;"
DEVICE void product_add(float (&d)[64], const void* a, const void* b) {
  asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n" PRODUCT "\n}"
               : SIXTY_FOUR("+f", d) : "l"(tile_descriptor(a)), "l"(tile_descriptor(b)));
}
// d = a bᵀ, whatever it was.
DEVICE void product_set(float (&d)[64], const void* a, const void* b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, 0, 0;\n" PRODUCT "\n}"
               : SIXTY_FOUR("=f", d) : "l"(tile_descriptor(a)), "l"(tile_descriptor(b)));
}

#define FOUR(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ALL_EIGHT(d) FOUR(d, 0), FOUR(d, 1), FOUR(d, 2), FOUR(d, 3), FOUR(d, 4), FOUR(d, 5), FOUR(d, 6), FOUR(d, 7)
#define ALL_EIGHT_NAMES \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

// The same for 64 columns: d (64 x 64) = a (64 x 16) b (64 x 16)ᵀ, added to what it was where `add`;
// d[column / 8][2 h + i].
[[maybe_unused]] DEVICE void product(float (&d)[8][4], Operand a, Operand b, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" PRODUCT_NAME(64) ALL_EIGHT_NAMES
               "%32, %33, add, 1, 1, 0, 0;\n}"
               : ALL_EIGHT(d)
               : "l"(descriptor(a)), "l"(descriptor(b)), "r"((int)add));
}

// From here on, after a wait, d is read: the compiler moves no use of it before.
[[maybe_unused]] DEVICE void product_end(float (&d)[8][4]) { asm volatile("" : ALL_EIGHT(d)::"memory"); }

// d (64 x 64) = a (64 x 16) b (16 x 64), added likewise; b by rows of a tile, and a in registers as `mma`
// has it: rows h, of them columns 0 to 7 in `low`, 8 to 15 in `high`. They stay untouched until the
// product is done.
[[maybe_unused]] DEVICE void product_by_rows(float (&d)[8][4], const u32 (&low)[2], const u32 (&high)[2],
                                             Operand b, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" PRODUCT_NAME(64) ALL_EIGHT_NAMES
               "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"
               : ALL_EIGHT(d)
               : "r"(low[0]), "r"(low[1]), "r"(high[0]), "r"(high[1]), "l"(descriptor(b)), "r"((int)add));
}

#endif  // HOST_EMULATION
