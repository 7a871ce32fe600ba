// What the CUDA experiments share: checked calls, device memory, medians of event times, inputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <source_location>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace bench {

inline void check(cudaError_t error, std::source_location where = std::source_location::current()) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s:%u: %s\n", where.file_name(), where.line(), cudaGetErrorString(error));
    std::exit(1);
  }
}

/// Device memory, filled with NaN (all bits set).
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : size_(size) {
    check(cudaMalloc(&data_, static_cast<std::size_t>(size) * sizeof(T)));
    poison();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void poison() { check(cudaMemset(data_, 0xFF, static_cast<std::size_t>(size_) * sizeof(T))); }
  void clear() { check(cudaMemset(data_, 0, static_cast<std::size_t>(size_) * sizeof(T))); }
  T* data() const { return data_; }
  std::int64_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> values(static_cast<std::size_t>(size_));
    check(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  std::int64_t size_;
};

/// Uniform in [-amplitude, amplitude), a function of (seed, index) alone.
__host__ __device__ inline float value_at(std::uint64_t seed, std::uint64_t index,
                                          float amplitude) {
  std::uint64_t z = (seed << 40) + index + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return amplitude * (static_cast<float>(z >> 40) * 0x1p-23f - 1.0f);
}

template <typename T>
__global__ void fill_kernel(T* data, std::int64_t size, std::uint64_t seed, float amplitude) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    data[i] = static_cast<T>(value_at(seed, static_cast<std::uint64_t>(i), amplitude));
  }
}

template <typename T>
void fill(Buffer<T>& buffer, std::uint64_t seed, float amplitude) {
  fill_kernel<<<1024, 256>>>(buffer.data(), buffer.size(), seed, amplitude);
  check(cudaGetLastError());
}

/// Median of `repeats` times of body() in milliseconds, after two calls that do not count.
template <typename Body>
double median_ms(const Body& body, int repeats = 11) {
  cudaEvent_t begin;
  cudaEvent_t end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    check(cudaEventRecord(begin));
    body();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) {
      times.push_back(ms);
    }
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<std::size_t>(repeats / 2)];
}

inline int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

}  // namespace bench
