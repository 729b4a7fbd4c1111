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
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, MOST = 3, OUTPUTS = 5;
#else
constexpr int LANES = 8, ROWS = 4, MOST = 2, OUTPUTS = 2;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Block __attribute__((vector_size(ROWS * 4), aligned(4), may_alias));

constexpr int64_t TILE_BYTES = 640 * 1024;  // of unfolded patches, to stay in the second-level cache
constexpr int64_t TILE_POSITIONS = 128;     // so that a panel of them stays in the first-level cache

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Layer {
  const float *x, *g;           // [images, h, w, in] and [images, oh, ow, out]
  int64_t h, w, in, oh, ow, out;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t views;                // images of each example
  int64_t bias;                 // whether there is one
  int64_t rank_one;             // one position, whose gradient g xᵀ is added without ever being computed
  const float *standard, *gain, *scale;  // of a standardised weight [out, kh, kw, in], [out], [out]; or null
  const uint8_t *unclamped;     // [out]: whether the scale depends on the weight
  double *sum, *bias_sum, *gain_sum;     // results: [out, kh, kw, in], [out], [out]

  int64_t patch() const { return kh * kw * in; }
  int64_t width() const { return round_up(patch(), LANES); }
  int64_t height() const { return round_up(out, ROWS); }
  int64_t buffer() const { return height() * (width() + 2); }
  // A buffer holds the weight's gradient [height, width], then the bias's and the gain's.
  int64_t bias_at() const { return height() * width(); }
  int64_t gain_at() const { return bias_at() + height(); }
  bool short_rows() const { return dw == 1 && kw * in <= 2 * LANES && !plain_patches(); }
  int64_t padded() const { return (h + 2 * ph) * (w + 2 * pw) * in + 2 * LANES; }
  int64_t tile() const {
    return std::min({oh * ow, TILE_POSITIONS, std::max<int64_t>(16, TILE_BYTES / (width() * 4))});
  }
  bool plain_patches() const {
    return kh == 1 && kw == 1 && sh == 1 && sw == 1 && ph == 0 && pw == 0;
  }
};

struct Free { void operator()(float *p) const { std::free(p); } };
using Buffer = std::unique_ptr<float[], Free>;
Buffer floats(int64_t n) {
  constexpr int64_t HUGE_PAGE = 2 << 20;
  const int64_t unit = n * 4 >= 2 * HUGE_PAGE ? HUGE_PAGE : 64, bytes = round_up(std::max<int64_t>(n, 16) * 4, unit);
  void *p = std::aligned_alloc(unit, bytes);
  if (!p) throw std::bad_alloc();
#ifdef __linux__
  if (unit == HUGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);  // thousands of pages fewer to fault and look up
#endif
  return Buffer(static_cast<float *>(p));
}

// c[i, :] (+)= Σ_p g[p, i]·a[p, :] for ROWS rows and N vectors of columns; g and a are panels without gaps.
template <int N>
inline void multiply(const float *g, const float *a, int64_t positions, float *c, int64_t ldc, bool first) {
  Vec sum[ROWS][N];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v)
      sum[i][v] = first ? Vec{} : *reinterpret_cast<const Vec *>(c + i * ldc + v * LANES);
  for (int64_t p = 0; p < positions; ++p, g += ROWS, a += N * LANES) {
    Vec row[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) row[v] = *reinterpret_cast<const Vec *>(a + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sum[i][v] += g[i] * row[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) *reinterpret_cast<Vec *>(c + i * ldc + v * LANES) = sum[i][v];
}

// Vectors of columns in the panel that begins when `left` of them remain.
inline int64_t panel(int64_t left) { return left == MOST + 1 ? 2 : std::min<int64_t>(left, MOST); }

// One row of `width` numbers (and readable beyond, unless they fill whole vectors) into the panels' row p of n.
void into_panels(const float *row, int64_t width, int64_t p, int64_t n, float *panels) {
  for (int64_t left = round_up(width, LANES) / LANES; left > 0;) {
    const int64_t vectors = panel(left);
    float *to = panels + p * vectors * LANES;
    for (int64_t v = 0; v < vectors; ++v, row += LANES, to += LANES)
      *reinterpret_cast<Vec *>(to) = *reinterpret_cast<const Vec *>(row);
    panels += n * vectors * LANES;
    left -= vectors;
  }
}

// Rows of g into blocks of ROWS columns, the last one filled with zeros; adds the sum of the rows to `sum`.
void into_blocks(const float *g, int64_t width, int64_t n, float *blocks, float *sum) {
  for (int64_t at = 0; at < width; at += ROWS, blocks += n * ROWS) {
    const int64_t filled = std::min<int64_t>(ROWS, width - at);
    Block total{};
    for (int64_t p = 0; p < n; ++p) {
      const float *from = g + p * width + at;
      Block row{};
      if (filled == ROWS) row = *reinterpret_cast<const Block *>(from);
      else std::memcpy(&row, from, filled * 4);
      *reinterpret_cast<Block *>(blocks + p * ROWS) = row;
      total += row;
    }
    *reinterpret_cast<Block *>(sum + at) += total;
  }
}

// Copies the patch of an output position of an image.
void unfold(const Layer &l, const float *x, int64_t oy, int64_t ox, float *to) {
  const int64_t y0 = oy * l.sh - l.ph, x0 = ox * l.sw - l.pw;
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
}

// The image with its padding around it, and room to read beyond its end.
void pad(const Layer &l, const float *x, float *out) {
  const int64_t row = (l.w + 2 * l.pw) * l.in;
  std::memset(out, 0, l.padded() * 4);
  for (int64_t y = 0; y < l.h; ++y)
    std::memcpy(out + (y + l.ph) * row + l.pw * l.in, x + y * l.w * l.in, l.w * l.in * 4);
}

// As `unfold`, for short rows of a padded image: each is copied as N floats, a fixed number, and the
// surplus overwritten.
template <int N>
inline void unfold_short(const Layer &l, const float *x, int64_t oy, int64_t ox, float *to) {
  const int64_t line = (l.w + 2 * l.pw) * l.in, n = l.kw * l.in;
  const float *from = x + oy * l.sh * line + ox * l.sw * l.in;
  for (int64_t r = 0; r < l.kh; ++r, to += n, from += l.dh * line)
    std::memcpy(to, from, N * sizeof(float));
}

// The patches of n positions from p on, in panels.
void patches(const Layer &l, const float *x, int64_t p, int64_t n, float *row, float *panels) {
  const int64_t width = l.width(), patch = l.patch();
  const bool whole = l.plain_patches() && l.in % LANES == 0;
  const int64_t run = l.kw * l.in;  // half a vector, where that is enough, seldom lies across two cache lines
  int64_t oy = p / l.ow, ox = p % l.ow;
  for (int64_t q = 0; q < n; ++q, ++ox) {
    if (ox == l.ow) { ox = 0; ++oy; }
    const float *from = row;
    if (whole) {
      from = x + (p + q) * l.in;
    } else {
      if (l.plain_patches()) std::memcpy(row, x + (p + q) * l.in, l.in * 4);
      else if (!l.short_rows()) unfold(l, x, oy, ox, row);
      else if (run <= LANES / 2) unfold_short<LANES / 2>(l, x, oy, ox, row);
      else if (run <= LANES) unfold_short<LANES>(l, x, oy, ox, row);
      else unfold_short<2 * LANES>(l, x, oy, ox, row);
      for (int64_t i = patch; i < width; ++i) row[i] = 0;
    }
    into_panels(from, width, q, n, panels);
  }
}

double squared_norm(const float *c, int64_t n) {
  constexpr int64_t STEP = 4 * LANES;  // four sums at once, because each waits for its last addition
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {
    const int64_t end = std::min<int64_t>(n, start + 4096), whole = start + (end - start) / STEP * STEP;
    Vec part[4] = {};
    for (int64_t k = start; k < whole; k += STEP)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec row = *reinterpret_cast<const Vec *>(c + k + v * LANES);
        part[v] += row * row;
      }
    const Vec sum = (part[0] + part[1]) + (part[2] + part[3]);
    float rest = 0;
    for (int64_t k = whole; k < end; ++k) rest += c[k] * c[k];
    for (int i = 0; i < LANES; ++i) rest += sum[i];
    total += rest;
  }
  return total;
}

// From the gradient of gain·v, v = scale·(w − mean) of output channel o, to those of w (in place) and of gain.
void pull_back(const Layer &l, int64_t o, float *row, float *gain) {
  const int64_t patch = l.patch();
  const float *v = l.standard + o * patch;
  float total = 0, inner = 0;
#pragma omp simd reduction(+ : total, inner)
  for (int64_t k = 0; k < patch; ++k) { total += row[k]; inner += row[k] * v[k]; }
  *gain = inner;
  const float mean = total / patch, along = l.unclamped[o] ? inner : 0, factor = l.gain[o] * l.scale[o];
#pragma omp simd
  for (int64_t k = 0; k < patch; ++k) row[k] = factor * (row[k] - mean - v[k] * along);
}

struct Scratch { float *row, *panels, *blocks, *image; };

// The gradients of one example, summed over its images, into `c`. Returns their squared norm.
double gradient(const Layer &l, int64_t example, float *c, const Scratch &scratch) {
  const int64_t width = l.width(), positions = l.oh * l.ow, tile = l.tile();
  float *bias = c + l.bias_at(), *gain = c + l.gain_at();
  std::memset(bias, 0, (l.buffer() - l.bias_at()) * 4);  // the gain's, too
  double square = 0;
  for (int64_t image = example * l.views; image < (example + 1) * l.views; ++image) {
    const float *x = l.x + image * l.h * l.w * l.in;
    const float *g = l.g + image * positions * l.out;
    if (l.short_rows()) {
      pad(l, x, scratch.image);
      x = scratch.image;
    }
    for (int64_t p = 0; p < positions; p += tile) {
      const int64_t n = std::min(tile, positions - p);
      const bool first = p == 0 && image == example * l.views;
      const bool last = p + n == positions && image + 1 == (example + 1) * l.views;
      patches(l, x, p, n, scratch.row, scratch.panels);
      into_blocks(g + p * l.out, l.out, n, scratch.blocks, bias);
      for (int64_t o = 0; o < l.out; o += ROWS) {
        const float *block = scratch.blocks + o * n, *a = scratch.panels;
        for (int64_t left = width / LANES, at = 0; left > 0;) {
          const int64_t vectors = panel(left);
          float *to = c + o * width + at;
          if (vectors == 1) multiply<1>(block, a, n, to, width, first);
          else if (vectors == 2) multiply<2>(block, a, n, to, width, first);
          else multiply<MOST>(block, a, n, to, width, first);
          a += n * vectors * LANES;
          at += vectors * LANES;
          left -= vectors;
        }
        if (!last) continue;
        if (l.standard)
          for (int64_t r = o; r < std::min(l.out, o + ROWS); ++r) pull_back(l, r, c + r * width, gain + r);
        square += squared_norm(c + o * width, ROWS * width);  // while they are in the cache
      }
    }
  }
  if (!l.bias) std::memset(bias, 0, l.height() * 4);
  return square + squared_norm(bias, l.buffer() - l.bias_at());
}

constexpr int64_t IN_FLOAT = 128;  // examples that a thread adds in float before they are added in double
constexpr int TOGETHER = 4;            // examples whose rank-one gradients are added at once
constexpr int WAITING = 4 * TOGETHER;  // for which a part of the sum is fetched into the first-level cache

// to[o, k] += Σ_e w[o, e]·x[e][k] for N rows o: every x[e][k] is fetched once for all of them.
template <int N>
inline void add_outer(const float *const *x, const float *w, int64_t stride, int64_t start, int64_t end, float *to,
                      int64_t ldt) {
  const int64_t whole = start + (end - start) / LANES * LANES;
  for (int64_t k = start; k < whole; k += LANES) {
    Vec total[N];
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) total[o] = *reinterpret_cast<const Vec *>(to + o * ldt + k);
#pragma GCC unroll 8
    for (int e = 0; e < TOGETHER; ++e) {
      const Vec row = *reinterpret_cast<const Vec *>(x[e] + k);
#pragma GCC unroll 8
      for (int o = 0; o < N; ++o) total[o] += w[o * stride + e] * row;
    }
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) *reinterpret_cast<Vec *>(to + o * ldt + k) = total[o];
  }
  for (int64_t k = whole; k < end; ++k)
    for (int o = 0; o < N; ++o)
      for (int e = 0; e < TOGETHER; ++e) to[o * ldt + k] += w[o * stride + e] * x[e][k];
}

// sum += Σ_e weight_e·g_e x_eᵀ over `count` examples.
void add_rank_one(const Layer &l, const int64_t *examples, const double *weights, int64_t count, float *sum) {
  constexpr int64_t CHUNK = 16 * LANES;
  const float *x[WAITING];
  for (int e = 0; e < WAITING; ++e) x[e] = l.x + examples[e < count ? e : 0] * l.in;
  std::vector<float> scaled(l.out * WAITING);  // zero for examples that are not there
  for (int64_t o = 0; o < l.out; ++o)
    for (int64_t e = 0; e < count; ++e) {
      scaled[o * WAITING + e] = static_cast<float>(weights[e] * l.g[examples[e] * l.out + o]);
      if (l.bias) sum[l.bias_at() + o] += scaled[o * WAITING + e];
    }
  for (int64_t start = 0; start < l.in; start += CHUNK) {
    const int64_t end = std::min(l.in, start + CHUNK);
    for (int64_t first = 0; first < count; first += TOGETHER)
      for (int64_t o = 0, n; o < l.out; o += n) {
        n = o + OUTPUTS <= l.out ? OUTPUTS : 1;
        const float *w = scaled.data() + o * WAITING + first;
        float *to = sum + o * l.width();
        if (n == OUTPUTS) add_outer<OUTPUTS>(x + first, w, WAITING, start, end, to, l.width());
        else add_outer<1>(x + first, w, WAITING, start, end, to, l.width());
      }
  }
}

// Where each layer's numbers lie in a buffer for all layers, and how large the other buffers must be.
struct Plan {
  const Layer *layers;
  int64_t count;
  std::vector<int64_t> at;
  int64_t computed = 0, all = 0;  // without and with rank-one layers, of which there are sums alone
  int64_t row = 0, panels = 0, blocks = 0, padded = 0;

  Plan(const Layer *these, int64_t number) : layers(these), count(number), at(number) {
    for (const int64_t rank_one : {0, 1}) {
      for (int64_t i = 0; i < count; ++i) {
        const Layer &l = layers[i];
        if (l.rank_one != rank_one) continue;
        at[i] = all;
        all += round_up(l.buffer(), 16);
        if (rank_one) continue;
        row = std::max(row, l.width() + 2 * LANES);
        panels = std::max(panels, l.tile() * l.width());
        blocks = std::max(blocks, l.tile() * l.height());
        if (l.short_rows()) padded = std::max(padded, l.padded());
      }
      if (!rank_one) computed = all;
    }
  }
};

struct Clip { const double *squares; const uint8_t *counted; double norm, stabiliser, *norms, *weights; };

// Adds the clipped gradients of examples first … last − 1 to `sum`.
void add_clipped(const Plan &plan, const Clip &clip, int64_t first, int64_t last, float *sum) {
  const Buffer one = floats(plan.computed), row = floats(plan.row), panels = floats(plan.panels);
  const Buffer blocks = floats(plan.blocks), image = floats(plan.padded);
  const Scratch scratch{row.get(), panels.get(), blocks.get(), image.get()};
  float *c = one.get();
  int64_t waiting[WAITING], many = 0;
  double weights[WAITING];
  for (int64_t e = first; e < last; ++e) {
    double square = clip.squares[e];
    for (int64_t i = 0; i < plan.count; ++i) {
      const Layer &l = plan.layers[i];
      if (l.rank_one) square += (squared_norm(l.x + e * l.in, l.in) + l.bias) * squared_norm(l.g + e * l.out, l.out);
      else square += gradient(l, e, c + plan.at[i], scratch);
    }
    const double norm = clip.norms[e] = std::sqrt(square);
    double &weight = clip.weights[e] = 0;
    if (clip.counted[e] && std::isfinite(norm)) {
      weight = clip.stabiliser > 0 ? clip.norm / (norm + clip.stabiliser) : norm > clip.norm ? clip.norm / norm : 1;
      const float factor = static_cast<float>(weight);
#pragma omp simd
      for (int64_t k = 0; k < plan.computed; ++k) sum[k] += factor * c[k];
      waiting[many] = e;
      weights[many++] = weight;
    }
    if (many == WAITING || (many && e + 1 == last)) {
      for (int64_t i = 0; i < plan.count; ++i)
        if (plan.layers[i].rank_one) add_rank_one(plan.layers[i], waiting, weights, many, sum + plan.at[i]);
      many = 0;
    }
  }
}

// Adds a thread's sums to the totals, for output channel o of a layer.
void collect(const Layer &l, const float *sum, int64_t o) {
  for (int64_t k = 0; k < l.patch(); ++k) l.sum[o * l.patch() + k] += sum[o * l.width() + k];
  if (l.bias) l.bias_sum[o] += sum[l.bias_at() + o];
  if (l.standard) l.gain_sum[o] += sum[l.gain_at() + o];
}

}  // namespace

extern "C" {

int64_t dpml_layer_bytes() { return sizeof(Layer); }

// Sets norms and weights [examples] and adds to the layers' results; 0, or 1 if memory is short.
// `squares` are the examples' squared norms in other layers. Flat: weight = min(1, clip/norm); automatic
// (stabiliser > 0): clip/(norm + stabiliser). Examples that do not count, or whose norm is not finite, have 0.
int dpml_clipped_sums(const Layer *layers, int64_t count, int64_t examples, const double *squares,
                      const uint8_t *counted, double norm, double stabiliser, double *norms, double *weights,
                      int64_t threads) {
  const Plan plan(layers, count);
  const Clip clip{squares, counted, norm, stabiliser, norms, weights};
  threads = std::max<int64_t>(1, std::min(threads, examples));
  std::vector<Buffer> sums(threads);
  int failed = 0;
  for (int64_t start = 0; start < examples && !failed; start += threads * IN_FLOAT) {
    const int64_t n = std::min(examples - start, threads * IN_FLOAT);
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
    for (int64_t t = 0; t < threads; ++t) {
      try {
        if (!sums[t]) sums[t] = floats(plan.all);
        std::memset(sums[t].get(), 0, plan.all * 4);
        add_clipped(plan, clip, start + n * t / threads, start + n * (t + 1) / threads, sums[t].get());
      } catch (const std::bad_alloc &) {
        failed |= 1;
      }
    }
    for (int64_t i = 0; i < count && !failed; ++i) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t o = 0; o < layers[i].out; ++o)
        for (int64_t t = 0; t < threads; ++t) collect(layers[i], sums[t].get() + plan.at[i], o);
    }
  }
  return failed;
}

// The backward pass of a GroupNorm: the gradients of its input, and those of scale and shift for each image.
// x, g and dx: [images, positions, channels]; mean and factor (1/deviation): [images, groups]; weight [channels].
// Sets scale and shift [images, channels] to Σ g·(x − mean)·factor and Σ g over positions.
int dpml_group_norm_backward(const float *x, const float *g, const float *mean, const float *factor,
                             const float *weight, int64_t images, int64_t positions, int64_t channels,
                             int64_t groups, float *dx, float *scale, float *shift, int64_t threads) {
  const int64_t run = channels / groups;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  try {
    const Buffer numbers = floats(6 * round_up(channels, LANES));
    float *m = numbers.get(), *a = m + round_up(channels, LANES), *b = a + round_up(channels, LANES);
    float *of_g = b + round_up(channels, LANES), *of_x = of_g + round_up(channels, LANES);
    float *rest = of_x + round_up(channels, LANES);
    std::vector<double> sums(2 * channels);
#pragma omp for schedule(static)
    for (int64_t image = 0; image < images; ++image) {
      const float *xi = x + image * positions * channels, *gi = g + image * positions * channels;
      for (int64_t c = 0; c < channels; ++c) m[c] = mean[image * groups + c / run];
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t start = 0; start < positions; start += 64) {  // 64 positions in float, all of them in double
        std::memset(a, 0, channels * 4);
        std::memset(b, 0, channels * 4);
        for (int64_t p = start; p < std::min(positions, start + 64); ++p) {
          const float *xp = xi + p * channels, *gp = gi + p * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) { a[c] += gp[c] * (xp[c] - m[c]); b[c] += gp[c]; }
        }
        for (int64_t c = 0; c < channels; ++c) { sums[c] += a[c]; sums[channels + c] += b[c]; }
      }
      for (int64_t first = 0; first < channels; first += run) {
        const double f = factor[image * groups + first / run];
        double along = 0, total = 0;
        for (int64_t c = first; c < first + run; ++c) {
          along += weight[c] * f * sums[c] / (run * positions);
          total += weight[c] * sums[channels + c] / (run * positions);
        }
        for (int64_t c = first; c < first + run; ++c) {
          scale[image * channels + c] = static_cast<float>(f * sums[c]);
          shift[image * channels + c] = static_cast<float>(sums[channels + c]);
          of_g[c] = static_cast<float>(f * weight[c]);
          of_x[c] = static_cast<float>(-f * f * along);
          rest[c] = static_cast<float>(-f * total);
        }
      }
      for (int64_t p = 0; p < positions; ++p) {
        const float *xp = xi + p * channels, *gp = gi + p * channels;
        float *to = dx + (image * positions + p) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] = of_g[c] * gp[c] + of_x[c] * (xp[c] - m[c]) + rest[c];
      }
    }
  } catch (const std::bad_alloc &) {
    failed |= 1;
  }
  return failed;
}

// The gradients of a LayerNorm's scale and shift for each image: Σ g·(x − mean)/deviation and Σ g over positions,
// each of which is normalised over its channels. x and g: [images, positions, channels].
void dpml_layer_norm(const float *x, const float *g, int64_t images, int64_t positions, int64_t channels,
                     double epsilon, float *scale, float *shift, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t image = 0; image < images; ++image) {
    float *a = scale + image * channels, *b = shift + image * channels;
    std::fill_n(a, channels, 0.0f);
    std::fill_n(b, channels, 0.0f);
    for (int64_t p = 0; p < positions; ++p) {
      const float *xp = x + (image * positions + p) * channels, *gp = g + (image * positions + p) * channels;
      float total = 0, square = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t c = 0; c < channels; ++c) total += xp[c];
      const float mean = total / channels;
#pragma omp simd reduction(+ : square)
      for (int64_t c = 0; c < channels; ++c) square += (xp[c] - mean) * (xp[c] - mean);
      const float factor = static_cast<float>(1 / std::sqrt(square / channels + epsilon));
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) { a[c] += gp[c] * ((xp[c] - mean) * factor); b[c] += gp[c]; }
    }
  }
}
}
