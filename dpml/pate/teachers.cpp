// Trains small convolutional networks, each on records of its own, and lets them vote.
//
// A network is a chain of layers with ReLU between them, and a thread takes a network through all of its steps:
// weights, momentum and activations of one network fit the second-level cache, and networks share nothing but
// the images that they read. Built on first use by dpml/pate/native.py.
//
// Layout: images and activations are [image, y, x, channel]; a layer's weight is [patch, outputs] with the patch in
// the order (y, x, channel), and its outputs fill whole vectors. With tables of offsets, forward pass and both
// backward passes of convolutions and of the linear layer are the same product of broadcast numbers and rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 8;  // rows at once: as many sums as it takes to hide the latency of one
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef std::vector<int64_t> Offsets;

inline Vec &vec(float *p) { return *reinterpret_cast<Vec *>(p); }
inline const Vec &vec(const float *p) { return *reinterpret_cast<const Vec *>(p); }

// to[c[r] + lane] += Σ_j x[a[r] + b[j]]·m[j·stride + lane], for R rows and one vector of lanes.
template <int R>
inline void multiply(const float *x, const int64_t *a, const int64_t *b, int64_t n, const float *m, int64_t stride,
                     float *to, const int64_t *c) {
  const float *from[R];
  Vec sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    from[r] = x + a[r];
    sum[r] = vec(to + c[r]);
  }
  for (int64_t j = 0; j < n; ++j, m += stride) {
    const int64_t at = b[j];
    const Vec row = vec(m);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] += from[r][at] * row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) vec(to + c[r]) = sum[r];
}

// The same for any number of rows.
void add_product(const float *x, const int64_t *a, int64_t rows, const int64_t *b, int64_t n, const float *m,
                 int64_t stride, float *to, const int64_t *c) {
  int64_t r = 0;
  for (; r + BLOCK <= rows; r += BLOCK) multiply<BLOCK>(x, a + r, b, n, m, stride, to, c + r);
  for (; r + 4 <= rows; r += 4) multiply<4>(x, a + r, b, n, m, stride, to, c + r);
  for (; r < rows; ++r) multiply<1>(x, a + r, b, n, m, stride, to, c + r);
}

Offsets multiples(int64_t n, int64_t unit) {
  Offsets at(n);
  for (int64_t i = 0; i < n; ++i) at[i] = i * unit;
  return at;
}

// A convolution without padding; a linear layer is one whose kernel is as large as its input.
struct Layer {
  int64_t inputs, outputs, positions, patch;  // numbers of an image, channels, positions of an image, numbers
  int64_t weight, bias;                       // where they lie among the network's parameters
  Offsets origin, offset;                     // of each position's patch, for all images; within a patch
  Offsets row, column, weight_row;            // multiples of `outputs`, for positions and patch; 0, 1, 2 …

  Layer(int64_t images, int64_t h, int64_t w, int64_t channels, int64_t kh, int64_t kw, int64_t stride, int64_t out,
        int64_t start)
      : inputs(h * w * channels), outputs(out), patch(kh * kw * channels), weight(start),
        bias(start + patch * out) {
    const int64_t oh = (h - kh) / stride + 1, ow = (w - kw) / stride + 1;
    positions = oh * ow;
    for (int64_t image = 0; image < images; ++image)
      for (int64_t y = 0; y < oh; ++y)
        for (int64_t x = 0; x < ow; ++x) origin.push_back(image * inputs + (y * w + x) * stride * channels);
    for (int64_t y = 0; y < kh; ++y)
      for (int64_t i = 0; i < kw * channels; ++i) offset.push_back(y * w * channels + i);
    row = multiples(images * positions, out);
    weight_row = multiples(patch, out);
    column = multiples(out, 1);
  }

  int64_t end() const { return bias + outputs; }

  // y [images, positions, outputs] from x [images, inputs].
  void forward(const float *parameters, const float *x, int64_t images, float *y) const {
    const int64_t rows = images * positions;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(y + r * outputs, parameters + bias, outputs * 4);
    for (int64_t o = 0; o < outputs; o += LANES)
      add_product(x, origin.data(), rows, offset.data(), patch, parameters + weight + o, outputs, y + o, row.data());
  }

  // The gradient of weight and bias, from that of y.
  void weight_gradient(const float *x, const float *dy, int64_t images, float *gradient) const {
    const int64_t rows = images * positions;
    std::memset(gradient + weight, 0, patch * outputs * 4);
    for (int64_t o = 0; o < outputs; o += LANES) {
      Vec sum = {};
      for (int64_t r = 0; r < rows; ++r) sum += vec(dy + r * outputs + o);
      vec(gradient + bias + o) = sum;
      add_product(x, offset.data(), patch, origin.data(), rows, dy + o, outputs, gradient + weight + o,
                  weight_row.data());
    }
  }

  // dx from dy. Channels of x fill whole vectors. `turned` has room for the weight.
  void input_gradient(const float *parameters, const float *dy, int64_t images, float *turned, float *dx) const {
    const float *w = parameters + weight;
    for (int64_t k = 0; k < patch; k += LANES)
      for (int64_t o = 0; o < outputs; ++o)
        for (int lane = 0; lane < LANES; ++lane) turned[o * patch + k + lane] = w[(k + lane) * outputs + o];
    std::memset(dx, 0, images * inputs * 4);
    for (int64_t k = 0; k < patch; k += LANES)
      add_product(dy, row.data(), images * positions, column.data(), outputs, turned + k, patch, dx + offset[k],
                  origin.data());
  }
};

int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Sizes { int64_t h, w, channels, first, second, classes; };

struct Network {
  int64_t h, w, channels, classes;
  std::vector<Layer> layers;

  Network(const Sizes &s, int64_t images) : h(s.h), w(s.w), channels(s.channels), classes(s.classes) {
    const int64_t h1 = (h - 5) / 2 + 1, w1 = (w - 5) / 2 + 1, h2 = (h1 - 3) / 2 + 1, w2 = (w1 - 3) / 2 + 1;
    layers.emplace_back(images, h, w, channels, 5, 5, 2, s.first, 0);
    layers.emplace_back(images, h1, w1, s.first, 3, 3, 2, s.second, layers[0].end());
    layers.emplace_back(images, h2, w2, s.second, h2, w2, 1, round_up(classes), layers[1].end());
  }

  int64_t parameters() const { return layers.back().end(); }
  int64_t pixels() const { return h * w * channels; }
};

// What one thread needs beside a network's parameters.
struct Workspace {
  std::vector<float> x, gradient, momentum, turned;
  std::vector<std::vector<float>> y, dy;  // outputs of each layer and their gradients

  Workspace(const Network &net, int64_t images, bool training) : x(images * net.pixels()) {
    for (const Layer &l : net.layers) {
      y.emplace_back(images * l.positions * l.outputs);
      if (!training) continue;
      dy.emplace_back(images * l.positions * l.outputs);
      if (l.patch * l.outputs > int64_t(turned.size())) turned.resize(l.patch * l.outputs);
    }
    if (training) gradient.resize(net.parameters());
    if (training) momentum.resize(net.parameters());
  }
};

// The outputs of all layers; what is not a number stays so.
void forward(const Network &net, const float *parameters, const float *x, int64_t images, Workspace &work) {
  for (size_t i = 0; i < net.layers.size(); ++i) {
    net.layers[i].forward(parameters, x, images, work.y[i].data());
    if (i + 1 == net.layers.size()) break;
    for (float &value : work.y[i]) value = value < 0 ? 0 : value;
    x = work.y[i].data();
  }
}

// The gradient of the mean cross entropy in the network's outputs. A row of -1 has none.
void loss_gradient(const Network &net, const int64_t *rows, const int64_t *labels, int64_t images, Workspace &work) {
  const int64_t width = net.layers.back().outputs;
  for (int64_t i = 0; i < images; ++i) {
    const float *z = work.y.back().data() + i * width;
    float *dz = work.dy.back().data() + i * width, total = 0;
    std::fill_n(dz, width, 0.0f);
    if (rows[i] < 0) continue;
    const float largest = *std::max_element(z, z + net.classes);
    for (int64_t c = 0; c < net.classes; ++c) total += dz[c] = std::exp(z[c] - largest);
    for (int64_t c = 0; c < net.classes; ++c) dz[c] = (dz[c] / total - (c == labels[rows[i]])) / images;
  }
}

void backward(const Network &net, const float *parameters, int64_t images, Workspace &work) {
  for (size_t i = net.layers.size(); i-- > 0;) {
    const float *x = i ? work.y[i - 1].data() : work.x.data();
    net.layers[i].weight_gradient(x, work.dy[i].data(), images, work.gradient.data());
    if (i == 0) break;
    std::vector<float> &dx = work.dy[i - 1];
    net.layers[i].input_gradient(parameters, work.dy[i].data(), images, work.turned.data(), dx.data());
    for (size_t k = 0; k < dx.size(); ++k) dx[k] = x[k] <= 0 ? 0 : dx[k];
  }
}

// The image, moved: what was at (y + dy, x + dx) comes to (y, x), and zeros from outside.
void moved(const Network &net, const float *image, int64_t dy, int64_t dx, float *to) {
  const int64_t line = net.w * net.channels, first = std::max<int64_t>(0, -dx);
  const int64_t last = std::min(net.w, net.w - dx);
  std::memset(to, 0, net.pixels() * 4);
  for (int64_t y = std::max<int64_t>(0, -dy); y < std::min(net.h, net.h - dy) && first < last; ++y)
    std::memcpy(to + y * line + first * net.channels, image + (y + dy) * line + (first + dx) * net.channels,
                (last - first) * net.channels * 4);
}

struct Training {
  const float *images;           // [n, h, w, channels]
  const int64_t *labels, *rows;  // [n]; [teachers, steps, batch], -1 for none
  const int64_t *moves;          // [teachers, steps, batch, 2]
  const double *rates;           // [steps]
  int64_t steps, batch;
  double momentum, decay;
};

void train(const Network &net, const Training &t, int64_t teacher, float *parameters, Workspace &work) {
  const float momentum = t.momentum, decay = t.decay;
  std::fill(work.momentum.begin(), work.momentum.end(), 0.0f);
  for (int64_t step = 0; step < t.steps; ++step) {
    const int64_t at = (teacher * t.steps + step) * t.batch;
    for (int64_t i = 0; i < t.batch; ++i) {
      float *to = work.x.data() + i * net.pixels();
      const int64_t row = t.rows[at + i], *move = t.moves + 2 * (at + i);
      if (row < 0) std::memset(to, 0, net.pixels() * 4);
      else moved(net, t.images + row * net.pixels(), move[0], move[1], to);
    }
    forward(net, parameters, work.x.data(), t.batch, work);
    loss_gradient(net, t.rows + at, t.labels, t.batch, work);
    backward(net, parameters, t.batch, work);
    const float rate = t.rates[step], *gradient = work.gradient.data();
    float *memory = work.momentum.data();
    for (int64_t k = 0; k < net.parameters(); ++k) {  // Nesterov's, as torch.optim.SGD
      const float g = gradient[k] + decay * parameters[k];
      memory[k] = momentum * memory[k] + g;
      parameters[k] -= rate * (g + momentum * memory[k]);
    }
  }
}

// The first of the largest; what is not a number counts as larger, as in torch.argmax.
int64_t largest(const float *z, int64_t n) {
  int64_t best = 0;
  for (int64_t c = 1; c < n && !std::isnan(z[best]); ++c)
    if (!(z[c] <= z[best])) best = c;
  return best;
}

constexpr int64_t VOTING = 16;  // images at once

}  // namespace

extern "C" {

int64_t dpml_teacher_lanes() { return LANES; }

// Trains `teachers` networks from their parameters [teachers, size], in place; 0, or 1 if memory is short.
int dpml_train_teachers(const Sizes *sizes, const Training *training, int64_t teachers, float *parameters,
                        int64_t threads) {
  try {
    const Network net(*sizes, training->batch);
    std::vector<Workspace> work(threads, Workspace(net, training->batch, true));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < teachers; ++t)
      train(net, *training, t, parameters + t * net.parameters(), work[omp_get_thread_num()]);
  } catch (const std::exception &) {
    return 1;
  }
  return 0;
}

// Sets classes [images, teachers] to what each network says of each image [images, h, w, channels]; 0 or 1 as above.
int dpml_teachers_votes(const Sizes *sizes, int64_t teachers, const float *parameters, const float *images,
                        int64_t count, int64_t *classes, int64_t threads) {
  try {
    const Network net(*sizes, VOTING);
    const int64_t width = net.layers.back().outputs;
    std::vector<Workspace> workspaces(threads, Workspace(net, VOTING, false));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < teachers; ++t) {
      Workspace &work = workspaces[omp_get_thread_num()];
      for (int64_t start = 0; start < count; start += VOTING) {
        const int64_t n = std::min(VOTING, count - start);
        forward(net, parameters + t * net.parameters(), images + start * net.pixels(), n, work);
        for (int64_t i = 0; i < n; ++i)
          classes[(start + i) * teachers + t] = largest(work.y.back().data() + i * width, net.classes);
      }
    }
  } catch (const std::exception &) {
    return 1;
  }
  return 0;
}
}
