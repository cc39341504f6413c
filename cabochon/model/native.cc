// Decode kernels for CPUs with AVX-512, called from XLA: `multiply`, `experts` and `attend` of native.py.
//
// A row's arithmetic never depends on the other rows: sums run over k in order, one accumulator per output, so the same
// row gives the same bits in any company and at any number of rows. Weights are packed in panels of 32 columns,
// [panels][K][32] in f32 or [panels][K/2][32][2] in bf16 (pairs of k side by side, as vdpbf16ps wants them).

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"

namespace {

constexpr int kRows = 12;  // accumulators: 12 rows x 2 registers of the 32
using Any = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// -- weights of one type: how a step of k is loaded and multiplied -----------------------------------------------------

struct F32 {
  using Element = float;
  static constexpr int64_t kStep = 1;
  static void rows(const float* x, float* to, int64_t K, int64_t) { std::memcpy(to, x, K * sizeof(float)); }
  static int64_t words(int64_t K) { return K; }
  static __m512 madd(__m512 acc, const float* x, const Element* w) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*x), _mm512_loadu_ps(w), acc);
  }
};

struct BF16 {
  using Element = uint16_t;
  static constexpr int64_t kStep = 2;
  static void rows(const float* x, float* to, int64_t K, int64_t words) {  // to nearest even, two in a word
    auto* out = reinterpret_cast<uint16_t*>(to);
    out[2 * words - 1] = 0;
    for (int64_t i = 0; i < K; i += 16) {
      const __mmask16 m = K - i >= 16 ? 0xffff : (1 << (K - i)) - 1;
      const __m512i b = _mm512_castps_si512(_mm512_maskz_loadu_ps(m, x + i));
      const __m512i even = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(_mm512_add_epi32(b, even), _mm512_set1_epi32(0x7fff));
      _mm256_mask_storeu_epi16(out + i, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
    }
  }
  static int64_t words(int64_t K) { return (K + 1) / 2; }
  static __m512 madd(__m512 acc, const float* x, const Element* w) {
    __m512i pair = _mm512_castps_si512(_mm512_set1_ps(*x)), weight = _mm512_loadu_si512(w);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)pair, (__m512bh)weight);
#else
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(weight, 16)), acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(weight, high)), acc);
#endif
  }
};

// MR rows against one panel: acc[r][half], both halves of 16 columns. On the way, a cache line a step of what comes next
// is asked for at `next`.
template <typename W, int MR>
inline void product(const float* const* x, const typename W::Element* w, const char* next, int64_t words,
                    __m512 (&acc)[MR][2]) {
  constexpr int64_t half = 16 * W::kStep;
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < words; k++, w += 2 * half) {
    _mm_prefetch(reinterpret_cast<const char*>(w + 16 * half), _MM_HINT_T0);
    _mm_prefetch(next + 64 * k, _MM_HINT_T1);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      acc[r][0] = W::madd(acc[r][0], x[r] + k, w);
      acc[r][1] = W::madd(acc[r][1], x[r] + k, w + half);
    }
  }
}

__m512 exp512(__m512 x) {  // exp for x <= 88, to 2 units in the last place; 0 far below
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

struct Plain {  // y = the product
  int64_t columns;
  template <int MR>
  void store(float* const* y, int64_t panel, const __m512 (&acc)[MR][2]) const {
    const int64_t left = columns - panel * 32;
    const __mmask16 low = left >= 16 ? 0xffff : (1 << left) - 1;
    const __mmask16 high = left >= 32 ? 0xffff : left <= 16 ? 0 : (1 << (left - 16)) - 1;
    for (int r = 0; r < MR; r++) {
      _mm512_mask_storeu_ps(y[r] + panel * 32, low, acc[r][0]);
      if (high) _mm512_mask_storeu_ps(y[r] + panel * 32 + 16, high, acc[r][1]);
    }
  }
};

struct Gated {  // a panel holds 16 gate columns and the 16 up columns beside them: y = silu(gate) * up
  template <int MR>
  void store(float* const* y, int64_t panel, const __m512 (&acc)[MR][2]) const {
    for (int r = 0; r < MR; r++) {
      const __m512 one = _mm512_set1_ps(1.0f), gate = acc[r][0];
      // past -88 silu is 0 to f32, and exp would overflow
      const __m512 below = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), gate), _mm512_set1_ps(87.0f));
      const __m512 act = _mm512_div_ps(gate, _mm512_add_ps(one, exp512(below)));
      _mm512_storeu_ps(y[r] + panel * 16, _mm512_mul_ps(act, acc[r][1]));
    }
  }
};

template <typename W, typename Store, int MR = kRows>
void block(int rows, const float* const* x, float* const* y, const typename W::Element* w, const char* next,
           int64_t words, int64_t panel, const Store& store) {
  if constexpr (MR > 0) {
    if (rows < MR) return block<W, Store, MR - 1>(rows, x, y, w, next, words, panel, store);
    __m512 acc[MR][2];
    product<W, MR>(x, w, next, words, acc);
    store.template store<MR>(y, panel, acc);
  }
}

// All rows against one panel. What is read first waits for memory, so the panel `ahead` of this one is asked for in time,
// half of it during each of the first two blocks of rows. (One block: its first half, and the hardware does the rest.)
template <typename W, typename Store>
void panel(const std::vector<const float*>& x, const std::vector<float*>& y, int64_t first, int64_t rows,
           const typename W::Element* w, int64_t words, int64_t index, const Store& store, int64_t ahead = 0) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const auto* here = reinterpret_cast<const char*>(w);
  for (int64_t b = 0, at = 0; b < blocks; b++) {
    const int64_t n = (rows - at + blocks - b - 1) / (blocks - b);
    const char* next = b < 2 ? here + (2 * ahead + b) * words * 64 : here;
    block<W, Store>(n, x.data() + first + at, y.data() + first + at, w, next, words, index, store);
    at += n;
  }
}

// -- y[live] = x[live] @ w ---------------------------------------------------------------------------------------------

template <typename W>
void multiply_rows(ffi::ThreadPool& pool, const float* x, const uint8_t* live, const typename W::Element* w, float* y,
                   int64_t M, int64_t K, int64_t N) {
  static thread_local std::vector<float> packed;
  std::vector<const float*> rows;
  std::vector<float*> to;
  const int64_t words = W::words(K), panels = (N + 31) / 32;
  packed.resize(M * words);
  for (int64_t m = 0; m < M; m++) {
    if (!live[m]) {
      std::memset(y + m * N, 0, N * sizeof(float));
      continue;
    }
    float* row = packed.data() + rows.size() * words;
    W::rows(x + m * K, row, K, words);
    rows.push_back(row);
    to.push_back(y + m * N);
  }
  if (rows.empty()) return;
  const Plain store{N};
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  parallel(pool, panels, 2.0 * rows.size() * K * N, [&](int64_t p) {
    const int64_t ahead = p + threads < panels ? threads : 0;  // the panel this thread is likely to take next
    panel<W>(rows, to, 0, rows.size(), w + p * words * 32 * W::kStep, words, p, store, ahead);
  });
}

ffi::Error Multiply(ffi::ThreadPool pool, Any x, Any live, Any w, Out y) {
  const int64_t K = x.dimensions().back(), N = y->dimensions().back(), M = x.element_count() / K;
  auto* mask = static_cast<const uint8_t*>(live.untyped_data());
  auto* from = static_cast<const float*>(x.untyped_data());
  auto* to = static_cast<float*>(y->untyped_data());
  if (w.element_type() == ffi::F32)
    multiply_rows<F32>(pool, from, mask, static_cast<const float*>(w.untyped_data()), to, M, K, N);
  else
    multiply_rows<BF16>(pool, from, mask, static_cast<const uint16_t*>(w.untyped_data()), to, M, K, N);
  return ffi::Error::Success();
}

// -- sparse feed-forward -----------------------------------------------------------------------------------------------

template <typename W>
void experts_rows(ffi::ThreadPool& pool, const float* x, const int32_t* routes, const float* gates,
                  const typename W::Element* up, const typename W::Element* down, float* out, int64_t N, int64_t C,
                  int64_t D, int64_t E, int64_t P) {
  // P panels of gate and up: F rounded up to 16 P, the padding computes 0
  static thread_local std::vector<float> packed, hidden, hidden_packed, result;
  const int64_t S = N * C, F = 16 * P, words = W::words(D), words_F = W::words(F), out_panels = (D + 31) / 32;
  std::vector<int64_t> first(E + 1, 0), place(S, -1);
  for (int64_t s = 0; s < S; s++)
    if (routes[s] >= 0 && routes[s] < E) first[routes[s] + 1]++;
  for (int64_t e = 0; e < E; e++) first[e + 1] += first[e];
  const int64_t rows = first[E];
  std::memset(out, 0, N * D * sizeof(float));
  if (!rows) return;
  packed.resize(rows * words), hidden.resize(rows * F), hidden_packed.resize(rows * words_F), result.resize(rows * D);
  std::vector<const float*> x_rows(rows), h_rows(rows);
  std::vector<float*> h_to(rows), y_to(rows);
  std::vector<int64_t> fill(first.begin(), first.end() - 1), live;
  for (int64_t s = 0; s < S; s++) {
    if (routes[s] < 0 || routes[s] >= E) continue;
    const int64_t at = place[s] = fill[routes[s]]++;
    W::rows(x + s / C * D, packed.data() + at * words, D, words);
    x_rows[at] = packed.data() + at * words, h_to[at] = hidden.data() + at * F;
    h_rows[at] = hidden_packed.data() + at * words_F, y_to[at] = result.data() + at * D;
  }
  for (int64_t e = 0; e < E; e++)
    if (first[e + 1] > first[e]) live.push_back(e);
  const int64_t n = live.size(), parts = std::min<int64_t>(P, 4), out_parts = std::min<int64_t>(out_panels, 4);
  const Gated gated;
  parallel(pool, n * parts, 4.0 * rows * D * F, [&](int64_t t) {
    const int64_t e = live[t / parts], part = t % parts;
    for (int64_t p = part * P / parts, end = (part + 1) * P / parts; p < end; p++)
      panel<W>(x_rows, h_to, first[e], first[e + 1] - first[e], up + (e * P + p) * words * 32 * W::kStep, words, p, gated,
               p + 1 < end);
  });
  for (int64_t r = 0; r < rows; r++) W::rows(hidden.data() + r * F, hidden_packed.data() + r * words_F, F, words_F);
  const Plain store{D};
  parallel(pool, n * out_parts, 2.0 * rows * D * F, [&](int64_t t) {
    const int64_t e = live[t / out_parts], part = t % out_parts;
    for (int64_t p = part * out_panels / out_parts, end = (part + 1) * out_panels / out_parts; p < end; p++)
      panel<W>(h_rows, y_to, first[e], first[e + 1] - first[e], down + (e * out_panels + p) * words_F * 32 * W::kStep,
               words_F, p, store, p + 1 < end);
  });
  for (int64_t s = 0; s < S; s++) {
    if (place[s] < 0) continue;
    const float gate = gates[s], *y = result.data() + place[s] * D;
    for (int64_t d = 0; d < D; d++) out[s / C * D + d] += gate * y[d];
  }
}

ffi::Error Experts(ffi::ThreadPool pool, Any x, Any routes, Any gates, Any up, Any down, Out out) {
  const int64_t N = routes.dimensions()[0], C = routes.dimensions()[1], D = x.dimensions().back();
  const int64_t E = up.dimensions()[0], P = up.dimensions()[1];
  auto* from = static_cast<const float*>(x.untyped_data());
  auto* to = static_cast<float*>(out->untyped_data());
  auto* route = static_cast<const int32_t*>(routes.untyped_data());
  auto* gate = static_cast<const float*>(gates.untyped_data());
  if (up.element_type() == ffi::F32)
    experts_rows<F32>(pool, from, route, gate, static_cast<const float*>(up.untyped_data()),
                      static_cast<const float*>(down.untyped_data()), to, N, C, D, E, P);
  else
    experts_rows<BF16>(pool, from, route, gate, static_cast<const uint16_t*>(up.untyped_data()),
                       static_cast<const uint16_t*>(down.untyped_data()), to, N, C, D, E, P);
  return ffi::Error::Success();
}

// -- attention over a cache --------------------------------------------------------------------------------------------

__m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
__m512 load(const uint16_t* p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}

// One query head: keys and values [first, last) of [S, H], H in R registers of 16, the last one masked.
template <typename T, int R>
void head(const float* q, const T* k, const T* v, int64_t first, int64_t last, int64_t H, float scale, float* score,
          float* out) {
  const __mmask16 end = H % 16 ? (1 << H % 16) - 1 : 0xffff;
  const int64_t n = last - first;
  __m512 query[R], sum[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
    query[i] = _mm512_mul_ps(load(q + 16 * i, i == R - 1 ? end : 0xffff), _mm512_set1_ps(scale));
    sum[i] = _mm512_setzero_ps();
  }
  float most = -INFINITY;
  for (int64_t s = 0; s < n; s++) {
    const T* key = k + (first + s) * H;
    __m512 dot = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) dot = _mm512_fmadd_ps(query[i], load(key + 16 * i, i == R - 1 ? end : 0xffff), dot);
    score[s] = _mm512_reduce_add_ps(dot);
    most = std::max(most, score[s]);
  }
  __m512 totals = _mm512_setzero_ps();
  for (int64_t s = 0; s < n; s += 16) {
    const __mmask16 m = n - s >= 16 ? 0xffff : (1 << (n - s)) - 1;
    const __m512 w = _mm512_maskz_mov_ps(m, exp512(_mm512_sub_ps(load(score + s, m), _mm512_set1_ps(most))));
    _mm512_mask_storeu_ps(score + s, m, w);
    totals = _mm512_add_ps(totals, w);
  }
  for (int64_t s = 0; s < n; s++) {
    const T* value = v + (first + s) * H;
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
      sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(score[s]), load(value + 16 * i, i == R - 1 ? end : 0xffff), sum[i]);
  }
  const __m512 whole = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(totals));
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
    _mm512_mask_storeu_ps(out + 16 * i, i == R - 1 ? end : 0xffff, _mm512_mul_ps(sum[i], whole));
}

template <typename T, int R = 16>
void any_head(const float* q, const T* k, const T* v, int64_t first, int64_t last, int64_t H, float scale, float* score,
              float* out) {
  if constexpr (R > 0) {
    if (H > 16 * (R - 1)) return head<T, R>(q, k, v, first, last, H, scale, score, out);
    any_head<T, R - 1>(q, k, v, first, last, H, scale, score, out);
  }
}

template <typename Cache>
void attend_rows(ffi::ThreadPool& pool, const float* q, const Cache* k, const Cache* v, const int32_t* position,
                 const uint8_t* live, float* out, int64_t B, int64_t T, int64_t K, int64_t G, int64_t H, int64_t S,
                 float scale, int64_t window) {
  double flops = 0;
  for (int64_t i = 0; i < B * T; i++) flops += live[i] ? 4.0 * (position[i] + 1) * K * G * H : 0;
  const int64_t piece = std::max<int64_t>(1, std::min<int64_t>(T, 16)), pieces = (T + piece - 1) / piece;
  parallel(pool, B * K * pieces, flops, [&](int64_t task) {
    static thread_local std::vector<float> score;
    score.resize(S);
    const int64_t b = task / (K * pieces), kv = task / pieces % K, t0 = task % pieces * piece;
    const Cache *keys = k + (b * K + kv) * S * H, *values = v + (b * K + kv) * S * H;
    for (int64_t t = t0; t < std::min(T, t0 + piece); t++) {
      const int64_t at = ((b * T + t) * K + kv) * G * H;
      if (!live[b * T + t]) {
        std::memset(out + at, 0, G * H * sizeof(float));
        continue;
      }
      const int64_t last = std::min<int64_t>(position[b * T + t] + 1, S);
      const int64_t first = window ? std::max<int64_t>(0, last - window) : 0;
      for (int64_t g = 0; g < G; g++)
        any_head<Cache>(q + at + g * H, keys, values, first, last, H, scale, score.data(), out + at + g * H);
    }
  });
}

ffi::Error Attend(ffi::ThreadPool pool, Any q, Any k, Any v, Any position, Any live, Out out, float scale,
                  int64_t window) {
  auto d = q.dimensions();  // [B, T, K, G, H] against [B, K, S, H]
  const int64_t S = k.dimensions()[2];
  auto run = [&](auto* type) {
    using Cache = std::remove_pointer_t<decltype(type)>;
    attend_rows<Cache>(pool, static_cast<const float*>(q.untyped_data()), static_cast<const Cache*>(k.untyped_data()),
                       static_cast<const Cache*>(v.untyped_data()), static_cast<const int32_t*>(position.untyped_data()),
                       static_cast<const uint8_t*>(live.untyped_data()), static_cast<float*>(out->untyped_data()), d[0],
                       d[1], d[2], d[3], d[4], S, scale, window);
  };
  if (k.element_type() == ffi::F32) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cabochon_multiply, Multiply,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cabochon_experts, Experts,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cabochon_attend, Attend,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>()
                                  .Arg<Any>().Ret<Any>().Attr<float>("scale").Attr<int64_t>("window"));
