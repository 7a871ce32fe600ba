// Dilated attention forward and backward on a small problem, with nothing but the installed C++
// library.
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <dilated/attention.h>
#include <dilated/backend.h>
#include <dilated/options.h>

int main() {
  constexpr std::int64_t n = 1000, heads = 4, dim = 32;
  const dilated::Problem problem = dilated::make_problem(
      {.segments = {128, 512}, .dilations = {1, 4}, .is_causal = true},
      {.seqlen = n, .num_heads = heads, .num_kv_heads = heads, .head_dim = dim});
  const dilated::Plan plan = dilated::make_plan(problem);
  std::puts(dilated::explain(problem).c_str());

  // Self-attention of x: query, key and value are views of one array. Any strides will do.
  std::vector<float> x(n * heads * dim), out(x.size()), lse(heads * n);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(i % 97) / 97.0f - 0.5f;
  }
  constexpr dilated::DType f32 = dilated::DType::kFloat32;
  constexpr std::array<std::int64_t, 4> shape{1, n, heads, dim},
      strides{n * heads * dim, heads * dim, dim, 1};
  dilated::ForwardTensors tensors;
  tensors.query = tensors.key = tensors.value = {x.data(), f32, shape, strides};
  tensors.out = {out.data(), f32, shape, strides};
  tensors.lse = {lse.data(), f32, {1, heads, n}, {heads * n, n, 1}};
  dilated::forward(plan, tensors);

  // Gradients of sum(out).
  std::vector<float> ones(x.size(), 1.0f), dquery(x.size()), dkey(x.size()), dvalue(x.size());
  dilated::BackwardTensors gradients;
  gradients.dout = {ones.data(), f32, shape, strides};
  gradients.query = gradients.key = gradients.value = tensors.query;
  gradients.out = {out.data(), f32, shape, strides};
  gradients.lse = {lse.data(), f32, {1, heads, n}, {heads * n, n, 1}};
  gradients.dquery = {dquery.data(), f32, shape, strides};
  gradients.dkey = {dkey.data(), f32, shape, strides};
  gradients.dvalue = {dvalue.data(), f32, shape, strides};
  dilated::backward(plan, gradients);

  std::printf("out[0] = %.6f, lse[0] = %.6f, dvalue[0] = %.6f\n", out[0], lse[0], dvalue[0]);
}
