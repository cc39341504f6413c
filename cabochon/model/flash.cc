// Called from XLA, f32: `attend` and `attend_grad` of flash.py. A task is one head of one row; it walks over blocks of
// queries and keys, leaves out those where nothing may be seen, and never holds more than one block of scores.
//
// Every product is c [M,N] += a [M,K] b [K,N] with N along the vectors; `a` is read an element at a time, so it may lie
// transposed. What is needed along the vectors both ways is packed twice.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"
#include "vector.h"

namespace {

using Tensor = ffi::Buffer<ffi::F32>;  // a call with another type is refused
using Bools = ffi::Buffer<ffi::PRED>;
using Out = ffi::Result<Tensor>;

constexpr int64_t kBlock = 64;  // queries, and keys
#ifdef __AVX512F__
constexpr int64_t kRows = 8;  // of a tile: as many sums as there are registers for
#else
constexpr int64_t kRows = 2;
#endif
constexpr float kLow = -1e30f;

struct Shape {
  int64_t B, T, S, K, G, H, width;  // width: H in whole vectors
  Shape(const Tensor& q, const Tensor& k)
      : B(q.dimensions()[0]), T(q.dimensions()[1]), S(k.dimensions()[1]), K(q.dimensions()[2]), G(q.dimensions()[3]),
        H(q.dimensions()[4]), width((H + kLanes - 1) / kLanes * kLanes) {}
  int64_t queries(int64_t b, int64_t head) const { return (b * T * K * G + head) * H; }  // the first one's place
  int64_t keys(int64_t b, int64_t head) const { return (b * S * K + head / G) * H; }
  int64_t blocks(int64_t n) const { return (n + kBlock - 1) / kBlock; }
};

template <int V>
void tile(int64_t K, const float* a, int64_t down, int64_t along, const float* b, int64_t b_step, float* c,
          int64_t c_step) {
  Floats sums[kRows][V];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < V; v++) sums[r][v] = load(c + r * c_step + v * kLanes);
  for (int64_t k = 0; k < K; k++) {
    Floats right[V];
    for (int v = 0; v < V; v++) right[v] = load(b + k * b_step + v * kLanes);
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < V; v++) sums[r][v] += a[r * down + k * along] * right[v];
  }
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < V; v++) store(c + r * c_step + v * kLanes, sums[r][v]);
}

// c [kBlock,N] += a [kBlock,K] b [K,N]; element (m, k) of a is a[m * down + k * along].
void add_product(int64_t N, int64_t K, const float* a, int64_t down, int64_t along, const float* b, int64_t b_step,
                 float* c, int64_t c_step) {
  for (int64_t m = 0; m < kBlock; m += kRows) {
    int64_t n = 0;
    for (; n + 2 * kLanes <= N; n += 2 * kLanes)
      tile<2>(K, a + m * down, down, along, b + n, b_step, c + m * c_step + n, c_step);
    if (n < N) tile<1>(K, a + m * down, down, along, b + n, b_step, c + m * c_step + n, c_step);
  }
}

// n vectors of H, `step` apart, as rows of `width`; blocks are filled up with zeros.
std::vector<float> as_rows(const Shape& s, const float* from, int64_t step, int64_t n, float scale = 1) {
  std::vector<float> to(s.blocks(n) * kBlock * s.width);
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < s.H; h++) to[i * s.width + h] = from[i * step + h] * scale;
  return to;
}

// The same as columns: [H, blocks * kBlock].
std::vector<float> as_columns(const Shape& s, const float* from, int64_t step, int64_t n) {
  const int64_t columns = s.blocks(n) * kBlock;
  std::vector<float> to(columns * s.H);
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < s.H; h++) to[h * columns + i] = from[i * step + h];
  return to;
}

// Who sees whom in a block of queries from i and keys from j.
struct Sight {
  bool any = false, all = true;
  int32_t mask[kBlock][kBlock];  // -1 or 0; written only where some but not all are seen

  Sight(const uint8_t* allow, const Shape& s, int64_t i, int64_t j) {
    const int64_t rows = std::min(kBlock, s.T - i), columns = std::min(kBlock, s.S - j);
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* row = allow + (i + r) * s.S + j;
      uint8_t either = 0, both = 1;
      for (int64_t c = 0; c < columns; c++) either |= row[c], both &= row[c];
      any |= either, all &= both;
    }
    all &= rows == kBlock && columns == kBlock;
    if (!any || all) return;
    std::memset(mask, 0, sizeof(mask));
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) mask[r][c] = -int32_t(allow[(i + r) * s.S + j + c]);
  }
  Floats keep(Floats x, int64_t row, int64_t column, float otherwise) const {
    if (all) return x;
    Ints seen;
    std::memcpy(&seen, &mask[row][column], sizeof(seen));
    return seen ? x : Floats{} + otherwise;
  }
};

using Block = float[kBlock][kBlock];

// q, k, v, allow -> out [B,T,K,G,H] and, for the gradient, each query's log-sum-exp of its scores [B,T,K,G]
ffi::Error Attend(ffi::ThreadPool pool, Tensor q, Tensor k, Tensor v, Bools allow, Out out, Out lse, float scale) {
  const Shape s(q, k);
  auto *queries = q.typed_data(), *keys = k.typed_data();
  auto *values = v.typed_data();
  auto* seen = reinterpret_cast<const uint8_t*>(allow.typed_data());
  auto *to = out->typed_data(), *sums = lse->typed_data();
  const int64_t heads = s.K * s.G, q_step = heads * s.H, k_step = s.K * s.H;
  parallel(pool, s.B * heads, 4.0 * s.B * heads * s.T * s.S * s.H, [&](int64_t t) {
    const int64_t b = t / heads, head = t % heads, columns = s.blocks(s.S) * kBlock;
    const auto left = as_rows(s, queries + s.queries(b, head), q_step, s.T, scale);
    const auto right = as_columns(s, keys + s.keys(b, head), k_step, s.S);
    const auto value = as_rows(s, values + s.keys(b, head), k_step, s.S);
    std::vector<float> held(kBlock * s.width);
    for (int64_t i = 0; i < s.T; i += kBlock) {
      float most[kBlock], total[kBlock] = {};
      std::fill(most, most + kBlock, kLow);
      std::fill(held.begin(), held.end(), 0);
      for (int64_t j = 0; j < s.S; j += kBlock) {
        const Sight sight(seen + b * s.T * s.S, s, i, j);
        if (!sight.any) continue;
        Block score = {};
        add_product(kBlock, s.H, &left[i * s.width], s.width, 1, &right[j], columns, score[0], kBlock);
        for (int64_t r = 0; r < kBlock; r++) {
          Floats high = Floats{} + most[r];
          for (int64_t c = 0; c < kBlock; c += kLanes) {
            const Floats x = sight.keep(load(&score[r][c]), r, c, kLow);
            high = x > high ? x : high;
          }
          float top = kLow;
          for (int64_t lane = 0; lane < kLanes; lane++) top = std::max(top, high[lane]);
          Floats added = {};
          for (int64_t c = 0; c < kBlock; c += kLanes) {
            const Floats p = sight.keep(exponential(load(&score[r][c]) - top), r, c, 0);
            store(&score[r][c], p);
            added += p;
          }
          const float fade = std::exp(most[r] - top);
          total[r] = total[r] * fade + sum(added);
          if (fade != 1)
            for (int64_t h = 0; h < s.width; h++) held[r * s.width + h] *= fade;
          most[r] = top;
        }
        add_product(s.width, kBlock, score[0], kBlock, 1, &value[j * s.width], s.width, held.data(), s.width);
      }
      for (int64_t r = 0; r < std::min(kBlock, s.T - i); r++) {
        const float norm = total[r] == 0 ? 0 : 1 / total[r];
        for (int64_t h = 0; h < s.H; h++)
          to[s.queries(b, head) + (i + r) * q_step + h] = held[r * s.width + h] * norm;
        sums[(b * s.T + i + r) * heads + head] = total[r] == 0 ? 0 : most[r] + std::log(total[r]);
      }
    }
  });
  return ffi::Error::Success();
}

// The gradients of q [B,T,K,G,H] and, for each head by itself, of k and v [B,S,K,G,H], from `out`'s
ffi::Error AttendGrad(ffi::ThreadPool pool, Tensor q, Tensor k, Tensor v, Bools allow, Tensor out, Tensor lse,
                      Tensor from, Out dq, Out dk, Out dv, float scale) {
  const Shape s(q, k);
  auto *queries = q.typed_data(), *keys = k.typed_data();
  auto *values = v.typed_data(), *sums = lse.typed_data();
  auto *outs = out.typed_data(), *grads = from.typed_data();
  auto* seen = reinterpret_cast<const uint8_t*>(allow.typed_data());
  auto *to_q = dq->typed_data(), *to_k = dk->typed_data();
  auto* to_v = dv->typed_data();
  const int64_t heads = s.K * s.G, q_step = heads * s.H, k_step = s.K * s.H;
  parallel(pool, s.B * heads, 10.0 * s.B * heads * s.T * s.S * s.H, [&](int64_t t) {
    const int64_t b = t / heads, head = t % heads, columns = s.blocks(s.S) * kBlock, first = s.queries(b, head);
    const auto q_rows = as_rows(s, queries + first, q_step, s.T, scale);
    const auto g_rows = as_rows(s, grads + first, q_step, s.T);
    const auto k_rows = as_rows(s, keys + s.keys(b, head), k_step, s.S);
    const auto k_columns = as_columns(s, keys + s.keys(b, head), k_step, s.S);
    const auto v_columns = as_columns(s, values + s.keys(b, head), k_step, s.S);
    std::vector<float> sum_q(q_rows.size()), sum_k(kBlock * s.width), sum_v(kBlock * s.width);
    std::vector<float> whole(s.blocks(s.T) * kBlock), drop(whole.size());  // a query's log-sum-exp; out . from
    for (int64_t i = 0; i < s.T; i++) {
      whole[i] = sums[(b * s.T + i) * heads + head];
      for (int64_t h = 0; h < s.H; h++) drop[i] += outs[first + i * q_step + h] * grads[first + i * q_step + h];
    }
    for (int64_t j = 0; j < s.S; j += kBlock) {
      std::fill(sum_k.begin(), sum_k.end(), 0);
      std::fill(sum_v.begin(), sum_v.end(), 0);
      for (int64_t i = 0; i < s.T; i += kBlock) {
        const Sight sight(seen + b * s.T * s.S, s, i, j);
        if (!sight.any) continue;
        Block p = {}, ds = {};
        add_product(kBlock, s.H, &q_rows[i * s.width], s.width, 1, &k_columns[j], columns, p[0], kBlock);
        add_product(kBlock, s.H, &g_rows[i * s.width], s.width, 1, &v_columns[j], columns, ds[0], kBlock);
        for (int64_t r = 0; r < kBlock; r++)
          for (int64_t c = 0; c < kBlock; c += kLanes) {
            const Floats part = sight.keep(exponential(load(&p[r][c]) - whole[i + r]), r, c, 0);
            store(&p[r][c], part);
            store(&ds[r][c], part * (load(&ds[r][c]) - drop[i + r]));
          }
        add_product(s.width, kBlock, p[0], 1, kBlock, &g_rows[i * s.width], s.width, sum_v.data(), s.width);
        add_product(s.width, kBlock, ds[0], 1, kBlock, &q_rows[i * s.width], s.width, sum_k.data(), s.width);
        add_product(s.width, kBlock, ds[0], kBlock, 1, &k_rows[j * s.width], s.width, &sum_q[i * s.width], s.width);
      }
      for (int64_t c = 0; c < std::min(kBlock, s.S - j); c++) {
        const int64_t place = ((b * s.S + j + c) * heads + head) * s.H;
        std::memcpy(to_k + place, &sum_k[c * s.width], s.H * sizeof(float));
        std::memcpy(to_v + place, &sum_v[c * s.width], s.H * sizeof(float));
      }
    }
    for (int64_t i = 0; i < s.T; i++)
      for (int64_t h = 0; h < s.H; h++) to_q[first + i * q_step + h] = sum_q[i * s.width + h] * scale;
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cabochon_flash, Attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>().Arg<Tensor>().Arg<Bools>()
        .Ret<Tensor>().Ret<Tensor>().Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cabochon_flash_grad, AttendGrad,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>().Arg<Tensor>().Arg<Bools>()
        .Arg<Tensor>().Arg<Tensor>().Arg<Tensor>()
        .Ret<Tensor>().Ret<Tensor>().Ret<Tensor>().Attr<float>("scale"));
