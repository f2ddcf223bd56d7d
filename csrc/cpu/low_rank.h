// The two passes: out = a·w + bias + (a·thin_in)·thin_out^T over blocks of rows that stay in cache.
//
// Forward and dX are the same function (B is the fold, stack_g up[g]·core[g]^T, [N, Ra]):
//
//   forward   y  = x·W^T + bias + P·B^T,   P = x·down    a=x,  w=W^T, thin_in=down, thin_out=B
//   backward  dX = dY·W + S·down^T,        S = dY·B      a=dY, w=W,   thin_in=B,    thin_out=down
//
// w is packed once per call into panels of kPanel columns, in steps of kDepth rows. While a row
// block of `a` is in cache, the thin products that need it are made too, so x and dY are read from
// memory once each.
#pragma once

#include "product.h"
#include "thin.h"

namespace efft_kernels::cpu::EFFT_ISA {

template <class T>
struct ForwardPlan {
  Thin<T> thin;
  Packed<T> packed;
  T* tail = nullptr;
  T* bias = nullptr;
  T* a = nullptr;    // [slots, kBlockRows, K], where x is not stored in T
  T* p = nullptr;    // [slots, kBlockRows, width]
  T* out = nullptr;  // [slots, kBlockRows, padded N], where y is not stored in T

  ForwardPlan(Arena<T>& arena, const Forward& args)
      : thin(arena, args.factors, args.N, args.K), packed(arena, args.K, args.N) {
    tail = arena.take(args.factors.Ra * packed.padded);
    const int64_t rows = args.slots * kBlockRows;
    bias = arena.take(packed.padded);
    p = arena.take(rows * thin.width);
    if (!is_direct<T>(args.x)) a = arena.take(rows * args.K);
    if (!is_direct<T>(args.y)) out = arena.take(rows * packed.padded);
  }
};

template <class T>
void forward(const Forward& args) {
  Arena<T> measure(nullptr);
  ForwardPlan<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  ForwardPlan<T> plan(arena, args);

  fold(args.factors, args.N, args.K, plan.thin);
  const bool merge = args.join == Join::kMerge;
  const int64_t width = plan.thin.width;
  const Tail<T> tail = pack_tail(plan.thin.b, width, args.factors.Ra, args.N, plan.tail);
  pack(args.weight, true, merge ? plan.thin.down : nullptr, width, tail, plan.packed);
  if (args.bias) {
    read_padded(args.bias, 0, 1, args.N, plan.bias, plan.packed.padded);
  }
  const T* bias = args.bias ? plan.bias : nullptr;

  parallel_each(args.slots, [&](int64_t slot) {
    T* a_scratch = plan.a == nullptr ? nullptr : plan.a + slot * kBlockRows * args.K;
    T* p = plan.p + slot * kBlockRows * width;
    T* out_scratch =
        plan.out == nullptr ? nullptr : plan.out + slot * kBlockRows * plan.packed.padded;
    each_block(args.M, slot, args.slots, [&](int64_t first, int64_t rows) {
      const Rows<T> a = rows_of(args.x, first, rows, args.K, a_scratch);
      Riders<T> riders;
      riders.width = width;
      if (args.p || !merge) {
        riders.thin_in = plan.thin.down;
        riders.thin = p;
      }
      if (!merge) riders.tail = tail;
      const int64_t following = a_scratch == nullptr ? std::min(rows, args.M - first - rows) : 0;
      if (out_scratch == nullptr) {
        T* y = static_cast<T*>(args.y.data) + first * args.N;
        product(a, rows, plan.packed, bias, riders, y, args.N, false, following);
      } else {
        product(a, rows, plan.packed, bias, riders, out_scratch, plan.packed.padded, true,
                following);
        write_padded(args.y, first, rows, args.N, out_scratch, plan.packed.padded);
      }
      if (args.p) write_padded(args.p, first, rows, args.factors.Ra, p, width);
    });
  });
}

template <class T>
struct BackwardPlan {
  Thin<T> thin;
  Packed<T> packed;
  T* tail = nullptr;
  T* dy = nullptr;      // [slots, kBlockRows, N], where dY is not stored in T
  T* x = nullptr;       // [slots, kBlockRows, K], where x is not stored in T
  T* s = nullptr;       // [slots, kBlockRows, width]
  T* p = nullptr;       // [slots, kBlockRows, width]
  T* out = nullptr;     // [slots, kBlockRows, padded K], where dX is not stored in T
  T* d_b = nullptr;     // [slots, N, width]
  T* d_down = nullptr;  // [slots, K, width]
  T* d_core = nullptr;  // [G·Ra, rb]
  T* d_up = nullptr;    // [up_rows, rb]

  BackwardPlan(Arena<T>& arena, const Backward& args) : thin(arena, args.factors, args.N, args.K) {
    const int64_t rows = args.slots * kBlockRows;
    if (args.dx) {
      packed = Packed<T>(arena, args.N, args.K);
      tail = arena.take(args.factors.Ra * packed.padded);
    }
    if (!is_direct<T>(args.dy)) dy = arena.take(rows * args.N);
    s = arena.take(rows * thin.width);
    if (args.dx && !is_direct<T>(args.dx)) out = arena.take(rows * packed.padded);
    if (args.d_core || args.d_up) {
      p = arena.take(rows * thin.width);
      d_b = arena.take(args.slots * args.N * thin.width);
    }
    if (args.d_down) {
      if (!is_direct<T>(args.x)) x = arena.take(rows * args.K);
      d_down = arena.take(args.slots * args.K * thin.width);
    }
    // Without a core, d_up is d_B itself.
    if (args.d_core) d_core = arena.take(args.factors.G * args.factors.Ra * thin.rb);
    if (args.d_up && args.factors.core) d_up = arena.take(thin.up_rows * thin.rb);
  }
};

// Partial sums [slots, count]; the first slot's += the others', in the order of the slots.
template <class T>
struct Partial {
  T* sums;
  int64_t count;
};

template <class T>
void reduce_slots(const Partial<T> (&partials)[2], int64_t slots) {
  constexpr int64_t kPart = 4096;
  const int64_t parts[2] = {(partials[0].count + kPart - 1) / kPart,
                            (partials[1].count + kPart - 1) / kPart};
  parallel_each(parts[0] + parts[1], [&](int64_t task) {
    const Partial<T>& partial = partials[task < parts[0] ? 0 : 1];
    const int64_t begin = (task < parts[0] ? task : task - parts[0]) * kPart;
    const int64_t end = std::min(partial.count, begin + kPart);
    for (int64_t slot = 1; slot < slots; ++slot) {
      const T* other = partial.sums + slot * partial.count;
      for (int64_t i = begin; i < end; ++i) partial.sums[i] += other[i];
    }
  });
}

template <class T>
void backward(const Backward& args) {
  Arena<T> measure(nullptr);
  BackwardPlan<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  BackwardPlan<T> plan(arena, args);

  fold(args.factors, args.N, args.K, plan.thin);
  const bool merge = args.join == Join::kMerge;
  const int64_t width = plan.thin.width;
  Tail<T> tail;
  if (args.dx) {
    tail = pack_tail(plan.thin.down, width, args.factors.Ra, args.K, plan.tail);
    pack(args.weight, false, merge ? plan.thin.b : nullptr, width, tail, plan.packed);
  }
  const bool need_s = args.d_down || (args.dx && !merge);

  parallel_each(args.slots, [&](int64_t slot) {
    const int64_t row = slot * kBlockRows;
    T* dy_scratch = plan.dy == nullptr ? nullptr : plan.dy + row * args.N;
    T* x_scratch = plan.x == nullptr ? nullptr : plan.x + row * args.K;
    T* out_scratch = plan.out == nullptr ? nullptr : plan.out + row * plan.packed.padded;
    T* s = plan.s + row * width;
    T* p = plan.p == nullptr ? nullptr : plan.p + row * width;
    T* d_b = plan.d_b == nullptr ? nullptr : plan.d_b + slot * args.N * width;
    T* d_down = plan.d_down == nullptr ? nullptr : plan.d_down + slot * args.K * width;
    if (d_b != nullptr) std::memset(d_b, 0, args.N * width * sizeof(T));
    if (d_down != nullptr) std::memset(d_down, 0, args.K * width * sizeof(T));
    each_block(args.M, slot, args.slots, [&](int64_t first, int64_t rows) {
      const Rows<T> dy = rows_of(args.dy, first, rows, args.N, dy_scratch);
      if (d_b != nullptr) read_padded(args.p, first, rows, args.factors.Ra, p, width);
      Rows<T> x = {};
      if (d_down != nullptr) x = rows_of(args.x, first, rows, args.K, x_scratch);
      if (!args.dx) {
        if (need_s) thin_product(dy, rows, args.N, plan.thin.b, width, s);
        if (d_b != nullptr) {
          tall_product(dy.data, dy.stride, p, width, rows, d_b, width, args.N, width);
        }
        if (d_down != nullptr) {
          tall_product(x.data, x.stride, s, width, rows, d_down, width, args.K, width);
        }
        return;
      }
      Riders<T> riders;
      riders.width = width;
      if (need_s) {
        riders.thin_in = plan.thin.b;
        riders.thin = s;
      }
      if (!merge) riders.tail = tail;
      riders.tall_with = p;
      riders.tall = d_b;
      riders.beside = x;
      riders.beside_tall = d_down;
      const int64_t following = dy_scratch == nullptr ? std::min(rows, args.M - first - rows) : 0;
      if (out_scratch == nullptr) {
        T* dx = static_cast<T*>(args.dx.data) + first * args.K;
        product<T>(dy, rows, plan.packed, nullptr, riders, dx, args.K, false, following);
      } else {
        product<T>(dy, rows, plan.packed, nullptr, riders, out_scratch, plan.packed.padded, true,
                   following);
        write_padded(args.dx, first, rows, args.K, out_scratch, plan.packed.padded);
      }
    });
  });

  reduce_slots<T>({{plan.d_down, plan.d_down == nullptr ? 0 : args.K * width},
                   {plan.d_b, plan.d_b == nullptr ? 0 : args.N * width}},
                  args.slots);
  if (plan.d_down != nullptr) {
    write_padded(args.d_down, 0, args.K, args.factors.Ra, plan.d_down, width);
  }
  if (plan.d_b != nullptr) {
    unfold(args.factors, args.N, plan.thin, plan.d_b, plan.d_up, plan.d_core);
    if (args.d_up) {
      const T* d_up = plan.d_up != nullptr ? plan.d_up : plan.d_b;
      write_padded(args.d_up, 0, plan.thin.up_rows, args.factors.Rb, d_up, plan.thin.rb);
    }
    if (args.d_core) {
      write_padded(args.d_core, 0, args.factors.G * args.factors.Ra, args.factors.Rb, plan.d_core,
                   plan.thin.rb);
    }
  }
}

// y = x·W^T + bias + x·down[t]·b[t]^T for every item, t its task: the forward with many factors.
template <class T>
struct TasksPlan {
  int64_t width = 0;  // Ra padded
  Packed<T> packed;
  T* down = nullptr;  // [tasks, K, width]
  T* b = nullptr;     // [tasks, N, width]
  T* tail = nullptr;  // [tasks, tail]
  T* bias = nullptr;
  T* a = nullptr;    // [slots, kBlockRows, K], where x is not stored in T
  T* p = nullptr;    // [slots, kBlockRows, width]
  T* out = nullptr;  // [slots, kBlockRows, padded N], where y is not stored in T

  TasksPlan(Arena<T>& arena, const TasksForward& args)
      : width(round_up(args.Ra, kLanes<T>)), packed(arena, args.K, args.N) {
    const int64_t rows = args.slots * kBlockRows;
    down = arena.take(args.tasks * args.K * width);
    b = arena.take(args.tasks * args.N * width);
    tail = arena.take(args.tasks * args.Ra * packed.padded);
    bias = arena.take(packed.padded);
    p = arena.take(rows * width);
    if (!is_direct<T>(args.x)) a = arena.take(rows * args.K);
    if (!is_direct<T>(args.y)) out = arena.take(rows * packed.padded);
  }
};

template <class T>
void tasks_forward(const TasksForward& args) {
  Arena<T> measure(nullptr);
  TasksPlan<T>{measure, args};
  Arena<T> arena(static_cast<T*>(workspace(measure.used() * sizeof(T))));
  TasksPlan<T> plan(arena, args);

  const int64_t width = plan.width;
  const int64_t tail_size = args.Ra * plan.packed.padded;
  const T* down = padded(args.down, args.tasks * args.K, args.Ra, width, plan.down);
  const T* b = padded(args.b, args.tasks * args.N, args.Ra, width, plan.b);
  parallel_each(args.tasks, [&](int64_t task) {
    pack_tail(b + task * args.N * width, width, args.Ra, args.N, plan.tail + task * tail_size);
  });
  pack<T>(args.weight, true, nullptr, width, {}, plan.packed);
  if (args.bias) read_padded(args.bias, 0, 1, args.N, plan.bias, plan.packed.padded);
  const T* bias = args.bias ? plan.bias : nullptr;

  parallel_each(args.slots, [&](int64_t slot) {
    T* a_scratch = plan.a == nullptr ? nullptr : plan.a + slot * kBlockRows * args.K;
    T* p = plan.p + slot * kBlockRows * width;
    T* out_scratch =
        plan.out == nullptr ? nullptr : plan.out + slot * kBlockRows * plan.packed.padded;
    // A block's rows belong to one item, for the sake of its factors.
    const int64_t per_item = (args.rows + kBlockRows - 1) / kBlockRows;
    const int64_t step = round_up((args.rows + per_item - 1) / per_item, kRows);
    const int64_t units = args.items * per_item;
    const int64_t last = units * (slot + 1) / args.slots;
    for (int64_t unit = units * slot / args.slots; unit < last; ++unit) {
      const int64_t item = unit / per_item;
      const int64_t begin = std::min(args.rows, unit % per_item * step);
      const int64_t rows = std::min(step, args.rows - begin);
      if (rows == 0) continue;
      const int64_t first = item * args.rows + begin;
      const int64_t task = args.task_of_item[item];
      const Rows<T> a = rows_of(args.x, first, rows, args.K, a_scratch);
      Riders<T> riders;
      riders.width = width;
      riders.thin_in = down + task * args.K * width;
      riders.thin = p;
      riders.tail = {args.Ra, plan.tail + task * tail_size};
      const int64_t following =
          a_scratch == nullptr ? std::min(rows, args.items * args.rows - first - rows) : 0;
      if (out_scratch == nullptr) {
        T* y = static_cast<T*>(args.y.data) + first * args.N;
        product(a, rows, plan.packed, bias, riders, y, args.N, false, following);
      } else {
        product(a, rows, plan.packed, bias, riders, out_scratch, plan.packed.padded, true,
                following);
        write_padded(args.y, first, rows, args.N, out_scratch, plan.packed.padded);
      }
    }
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
