// Called from XLA, f32, row-major: `rows` and `outer` of grouped.py, products of rows grouped by expert, and
// `swiglu_grad`, which XLA would make of as many passes over its inputs as it has results.
//
// An expert's product is cut by columns of the result into pieces of about equal work, each one BLAS call on one
// thread: a piece then packs few of the weights, and XLA's own threads do the work, none spin beside them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"
#include "vector.h"

namespace {

using Any = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

Sgemm sgemm = nullptr;

// A row-major matrix, or one that is to be read as its transpose.
struct Matrix {
  const float* at;
  int step;  // from one row to the next, as it lies
  bool turned;
  const float* row(int64_t n) const { return at + (turned ? n : n * step); }
  const float* column(int64_t n) const { return at + (turned ? n * step : n); }
};

// c [M,N], rows `step` apart, = a [M,K] times b [K,N]. BLAS counts columns first, so it is given c' = b' a'.
// Sums of at most `longest` are added up: shorter ones round less.
void product(const Matrix& a, const Matrix& b, float* c, int step, int M, int N, int K, int longest) {
  const float one = 1, zero = 0;
  const int parts = (K + longest - 1) / longest;
  for (int p = 0; p < parts; p++) {
    const int64_t k = int64_t(p) * K / parts;
    const int n = int64_t(p + 1) * K / parts - k;
    sgemm(b.turned ? "T" : "N", a.turned ? "T" : "N", &N, &M, &n, &one, b.row(k), &b.step, a.column(k), &a.step,
          p ? &one : &zero, c, &step);
  }
}

struct Piece {  // columns [first, last) of expert e's result; its rows begin at `row`
  int64_t e, row, first, last;
};

// Four pieces a thread and more: one that is held up leaves the others something to do.
std::vector<Piece> pieces(const int32_t* count, int64_t E, int64_t columns, int64_t threads) {
  constexpr int64_t kLeast = 64;  // columns
  int64_t row = 0, total = 0;
  for (int64_t e = 0; e < E; e++) total += count[e];
  std::vector<Piece> out;
  for (int64_t e = 0; e < E; row += count[e], e++) {
    const int64_t share = total ? (4 * threads * count[e] + total - 1) / total : 1;
    const int64_t n = std::max<int64_t>(1, std::min(share, columns / kLeast));
    for (int64_t p = 0; p < n; p++) out.push_back({e, row, p * columns / n, (p + 1) * columns / n});
  }
  return out;
}

// y [S,O] = x [S,I] times w[e] [I,O] (or [O,I] if turned) for the rows of each expert; rows past the last group are 0.
// Values are summed in short pieces: SmolLM2's first token has activations in the thousands, and whole sums put its
// logits half as far again off f64 (docs/log.md). What is turned is a gradient, and needs no such care.
ffi::Error Rows(ffi::ThreadPool pool, Any x, Any w, Any counts, Out y, bool turned) {
  constexpr int kShort = 64;
  const int64_t S = x.dimensions()[0], I = x.dimensions()[1], O = y->dimensions()[1], E = w.dimensions()[0];
  auto *from = static_cast<const float*>(x.untyped_data()), *weights = static_cast<const float*>(w.untyped_data());
  auto* to = static_cast<float*>(y->untyped_data());
  auto* count = static_cast<const int32_t*>(counts.untyped_data());
  const auto work = pieces(count, E, O, pool.num_threads());
  parallel(pool, work.size(), 2.0 * S * I * O, [&](int64_t t) {
    const Piece& p = work[t];
    if (!count[p.e]) return;
    const Matrix rows{from + p.row * I, int(I), false}, weight{weights + p.e * I * O, int(turned ? I : O), turned};
    const Matrix slice{weight.column(p.first), weight.step, turned};
    product(rows, slice, to + p.row * O + p.first, O, count[p.e], p.last - p.first, I, turned ? I : kShort);
  });
  const int64_t used = E ? work.back().row + count[E - 1] : 0;
  std::memset(to + used * O, 0, sizeof(float) * (S - used) * O);
  return ffi::Error::Success();
}

// w[e] [A,B] = the transpose of a [S,A] times b [S,B], over the rows of each expert; 0 for an expert without rows
ffi::Error Outer(ffi::ThreadPool pool, Any a, Any b, Any counts, Out w) {
  const int64_t A = a.dimensions()[1], B = b.dimensions()[1], E = w->dimensions()[0];
  auto *left = static_cast<const float*>(a.untyped_data()), *right = static_cast<const float*>(b.untyped_data());
  auto* to = static_cast<float*>(w->untyped_data());
  auto* count = static_cast<const int32_t*>(counts.untyped_data());
  const auto work = pieces(count, E, B, pool.num_threads());
  parallel(pool, work.size(), 2.0 * a.dimensions()[0] * A * B, [&](int64_t t) {
    const Piece& p = work[t];
    float* out = to + p.e * A * B;
    if (!count[p.e]) return void(std::memset(out, 0, sizeof(float) * A * B));  // in one piece
    const Matrix rows{left + p.row * A, int(A), true}, other{right + p.row * B + p.first, int(B), false};
    product(rows, other, out + p.first, B, A, p.last - p.first, count[p.e], count[p.e]);
  });
  return ffi::Error::Success();
}

inline Floats sigmoid(Floats x) { return 1 / (1 + exponential(-x)); }

// For h = [gate, up] and a = silu(gate) * up, with scale * from the gradient of a:
// scaled [S,F] = scale * a, dh [S,2F], dscale [S] = a . from.
ffi::Error SwigluGrad(ffi::ThreadPool pool, Any h, Any from, Any scale, Out scaled, Out dh, Out dscale) {
  constexpr int64_t kRows = 32;
  const int64_t S = from.dimensions()[0], F = from.dimensions()[1];
  auto *pre = static_cast<const float*>(h.untyped_data()), *grad = static_cast<const float*>(from.untyped_data());
  auto* by = static_cast<const float*>(scale.untyped_data());
  auto *to = static_cast<float*>(scaled->untyped_data()), *dpre = static_cast<float*>(dh->untyped_data());
  auto* dby = static_cast<float*>(dscale->untyped_data());
  parallel(pool, (S + kRows - 1) / kRows, 32.0 * S * F, [&](int64_t t) {
    for (int64_t s = t * kRows; s < std::min(S, (t + 1) * kRows); s++) {
      const float *gates = pre + s * 2 * F, *from_row = grad + s * F;
      float *to_row = to + s * F, *dgates = dpre + s * 2 * F;
      Floats sums = {};
      auto some = [&](int64_t i, int64_t n) {
        const Floats gate = load(gates + i, n), up = load(gates + F + i, n), u = load(from_row + i, n);
        const Floats sig = sigmoid(gate), silu = gate * sig, da = u * by[s];
        sums += silu * up * u;
        store(to_row + i, silu * up * by[s], n);
        store(dgates + i, da * up * (sig + silu * (1 - sig)), n);
        store(dgates + F + i, da * silu, n);
      };
      int64_t i = 0;
      for (; i + kLanes <= F; i += kLanes) some(i, kLanes);
      if (i < F) some(i, F - i);
      dby[s] = sum(sums);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" void cabochon_use_sgemm(void* function) { sgemm = reinterpret_cast<Sgemm>(function); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cabochon_rows, Rows,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Attr<bool>("turned"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cabochon_outer, Outer,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cabochon_swiglu_grad, SwigluGrad,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Ret<Any>().Ret<Any>());
