// The clipped sum of several layers' per-example weight gradients, one example after the other.
//
// For each example the gradients of all layers are computed into a buffer that stays in the cache, their
// norm is taken from the very numbers that are then scaled and added. Nothing of an example is kept.
// Built on first use by dpml/gradients/native.py, which describes the arguments.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, MOST = 3;
#else
constexpr int LANES = 8, ROWS = 4, MOST = 2;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

constexpr int64_t TILE_BYTES = 192 * 1024;  // of unfolded patches, to stay in the second-level cache

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Layer {
  const float *x, *g;           // [images, h, w, in] and [images, oh, ow, out]
  int64_t h, w, in, oh, ow, out;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t views;                // images of each example
  int64_t bias;                 // whether there is one
  const float *standard, *gain, *scale;  // of a standardised weight [out, kh, kw, in], [out], [out]; or null
  const uint8_t *unclamped;     // [out]: whether the scale depends on the weight
  double *sum, *bias_sum, *gain_sum;     // results: [out, kh, kw, in], [out], [out]

  int64_t patch() const { return kh * kw * in; }
  int64_t width() const { return round_up(patch(), LANES); }
  int64_t height() const { return round_up(out, ROWS); }
  int64_t buffer() const { return height() * (width() + 2 * LANES); }
  // A buffer holds the weight's gradient [height, width], then the bias's and the gain's.
  int64_t bias_at() const { return height() * width(); }
  int64_t gain_at() const { return bias_at() + height() * LANES; }
  bool plain_patches() const {
    return kh == 1 && kw == 1 && sh == 1 && sw == 1 && ph == 0 && pw == 0 && in % LANES == 0;
  }
};

struct Free { void operator()(float *p) const { std::free(p); } };
using Buffer = std::unique_ptr<float[], Free>;
Buffer floats(int64_t n) {
  void *p = std::aligned_alloc(64, round_up(std::max<int64_t>(n, 16) * 4, 64));
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<float *>(p));
}

// c[i, :] += Σ_p g[p, i]·a[p, :] for ROWS rows and N vectors of columns.
template <int N>
inline void multiply(const float *g, int64_t ldg, const float *a, int64_t lda, int64_t positions, float *c,
                     int64_t ldc) {
  Vec sum[ROWS][N];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < N; ++v) sum[i][v] = *reinterpret_cast<const Vec *>(c + i * ldc + v * LANES);
  for (int64_t p = 0; p < positions; ++p, g += ldg, a += lda) {
    Vec row[N];
    for (int v = 0; v < N; ++v) row[v] = *reinterpret_cast<const Vec *>(a + v * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < N; ++v) sum[i][v] += g[i] * row[v];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < N; ++v) *reinterpret_cast<Vec *>(c + i * ldc + v * LANES) = sum[i][v];
}

void outer_products(const float *g, int64_t ldg, const float *a, int64_t lda, int64_t positions, float *c,
                    int64_t ldc, int64_t rows) {
  for (int64_t left = ldc / LANES, at = 0; left > 0;) {
    int n = static_cast<int>(std::min<int64_t>(left, left == MOST + 1 ? 2 : MOST));
    for (int64_t i = 0; i < rows; i += ROWS) {
      const float *gi = g + i, *ai = a + at * LANES;
      float *ci = c + i * ldc + at * LANES;
      if (n == 1) multiply<1>(gi, ldg, ai, lda, positions, ci, ldc);
      else if (n == 2) multiply<2>(gi, ldg, ai, lda, positions, ci, ldc);
      else multiply<MOST>(gi, ldg, ai, lda, positions, ci, ldc);
    }
    left -= n;
    at += n;
  }
}

// Copies the patches of output positions first … first + count − 1 of one image into rows of `width` floats.
void unfold(const Layer &l, const float *x, int64_t first, int64_t count, float *out) {
  const int64_t width = l.width(), tail = width - l.patch();
  for (int64_t p = first; p < first + count; ++p, out += width) {
    const int64_t y0 = p / l.ow * l.sh - l.ph, x0 = p % l.ow * l.sw - l.pw;
    float *to = out;
    for (int64_t r = 0; r < l.kh; ++r, to += l.kw * l.in) {
      const int64_t y = y0 + r * l.dh;
      const float *row = x + y * l.w * l.in;
      if (y < 0 || y >= l.h) {
        std::memset(to, 0, l.kw * l.in * 4);
      } else if (l.dw == 1 && x0 >= 0 && x0 + l.kw <= l.w) {
        const float *from = row + x0 * l.in;
        for (int64_t i = 0; i < l.kw * l.in; ++i) to[i] = from[i];
      } else {
        for (int64_t s = 0; s < l.kw; ++s) {
          const int64_t column = x0 + s * l.dw;
          if (column < 0 || column >= l.w) std::memset(to + s * l.in, 0, l.in * 4);
          else std::memcpy(to + s * l.in, row + column * l.in, l.in * 4);
        }
      }
    }
    if (tail) std::memset(to, 0, tail * 4);
  }
}

// The gradients of one example, summed over its images, into `c`.
void gradient(const Layer &l, int64_t example, float *c, float *patches, float *packed) {
  const int64_t width = l.width(), positions = l.oh * l.ow, height = l.height();
  std::memset(c, 0, l.buffer() * 4);
  float *bias = c + l.bias_at();
  const int64_t tile = std::min(positions, std::max<int64_t>(16, TILE_BYTES / (width * 4)));
  for (int64_t image = example * l.views; image < (example + 1) * l.views; ++image) {
    const float *x = l.x + image * l.h * l.w * l.in, *g = l.g + image * positions * l.out;
    for (int64_t p = 0; p < positions; p += tile) {
      const int64_t n = std::min(tile, positions - p);
      const float *a = patches, *rows = g + p * l.out;
      if (l.plain_patches()) a = x + p * l.in;
      else unfold(l, x, p, n, patches);
      if (l.bias)
        for (int64_t q = 0; q < n; ++q)
          for (int64_t o = 0; o < l.out; ++o) bias[o] += rows[q * l.out + o];
      if (height != l.out) {
        for (int64_t q = 0; q < n; ++q) {
          std::memcpy(packed + q * height, rows + q * l.out, l.out * 4);
          std::memset(packed + q * height + l.out, 0, (height - l.out) * 4);
        }
        rows = packed;
      }
      outer_products(rows, height, a, width, n, c, width, height);
    }
  }
  if (!l.standard) return;
  // The weight is gain·v with v = scale·(w − mean): from the gradient of gain·v to those of gain and w.
  float *gain = c + l.gain_at();
  const int64_t patch = l.patch();
  for (int64_t o = 0; o < l.out; ++o) {
    float *row = c + o * width;
    const float *v = l.standard + o * patch;
    float total = 0, inner = 0;
#pragma omp simd reduction(+ : total, inner)
    for (int64_t k = 0; k < patch; ++k) { total += row[k]; inner += row[k] * v[k]; }
    gain[o] = inner;
    const float mean = total / patch, along = l.unclamped[o] ? inner : 0, factor = l.gain[o] * l.scale[o];
#pragma omp simd
    for (int64_t k = 0; k < patch; ++k) row[k] = factor * (row[k] - mean - v[k] * along);
  }
}

double squared_norm(const float *c, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {
    const int64_t end = std::min(n, start + 4096);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = start; k < end; ++k) part += c[k] * c[k];
    total += part;
  }
  return total;
}

}  // namespace

extern "C" {

int64_t dpml_layer_bytes() { return sizeof(Layer); }

// Sets norms and weights [examples] and adds to the layers' results; 0, or 1 if memory is short.
// `squares` are the examples' squared norms in other layers. Flat: weight = min(1, clip/norm); automatic
// (stabiliser > 0): clip/(norm + stabiliser). Examples that do not count, or whose norm is not finite, have 0.
int dpml_clipped_sums(const Layer *layers, int64_t count, int64_t examples, const double *squares,
                      const uint8_t *counted, double clip, double stabiliser,
                      double *norms, double *weights, int64_t threads) {
  int64_t total = 0, patches = 0, packed = 0;
  std::vector<int64_t> at(count);
  for (int64_t i = 0; i < count; ++i) {
    const Layer &l = layers[i];
    at[i] = total;
    total += round_up(l.buffer(), 16);
    const int64_t tile = std::min(l.oh * l.ow, std::max<int64_t>(16, TILE_BYTES / (l.width() * 4)));
    patches = std::max(patches, tile * l.width());
    packed = std::max(packed, tile * l.height());
  }
  threads = std::max<int64_t>(1, std::min(threads, examples));
  std::vector<Buffer> sums(threads);
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
  for (int64_t t = 0; t < threads; ++t) {
    try {
      sums[t] = floats(total);
      Buffer one = floats(total), tile = floats(patches), rows = floats(packed);
      float *sum = sums[t].get(), *c = one.get();
      std::memset(sum, 0, total * 4);
      for (int64_t e = examples * t / threads; e < examples * (t + 1) / threads; ++e) {
        double square = squares[e];
        for (int64_t i = 0; i < count; ++i) {
          gradient(layers[i], e, c + at[i], tile.get(), rows.get());
          square += squared_norm(c + at[i], layers[i].buffer());
        }
        const double norm = norms[e] = std::sqrt(square);
        weights[e] = 0;
        if (!counted[e] || !std::isfinite(norm)) continue;
        weights[e] = stabiliser > 0 ? clip / (norm + stabiliser) : (norm > clip ? clip / norm : 1.0);
        const float weight = static_cast<float>(weights[e]);
#pragma omp simd
        for (int64_t k = 0; k < total; ++k) sum[k] += weight * c[k];
      }
    } catch (const std::bad_alloc &) {
      failed |= 1;
    }
  }
  if (failed) return 1;
  for (int64_t i = 0; i < count; ++i) {
    const Layer &l = layers[i];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < l.out; ++o) {
      for (int64_t t = 0; t < threads; ++t) {
        const float *sum = sums[t].get() + at[i];
        for (int64_t k = 0; k < l.patch(); ++k) l.sum[o * l.patch() + k] += sum[o * l.width() + k];
        if (l.bias) l.bias_sum[o] += sum[l.bias_at() + o];
        if (l.standard) l.gain_sum[o] += sum[l.gain_at() + o];
      }
    }
  }
  return 0;
}
}
