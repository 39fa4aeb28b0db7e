// cosine_monitor on the CPU, as norm_monitor needs it too: checks, and one chunk of tokens at a time.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>

namespace bkdfast {

constexpr int64_t kChunk = 32;           // tokens of a chunk: with all K directions the unit of work of a thread
constexpr int64_t kBlock = 1024;         // columns of x and of the directions that a tile reads before it adds up
constexpr int64_t kPitch = kBlock + 16;  // of packed x: rows a multiple of 4 KB apart share the same sets of the L1

// Pointers are to block `layer` of the state; strides count elements.
struct MonitorJob {
  const void* x;
  int64_t stride_block, stride_token, stride_column;
  int64_t blocks, tokens, width, count;
  const float* directions;
  const int32_t* table;
  int64_t table_row, table_token;
  const float* ranges;
  int64_t range_rows;
  float* extremes;
  int32_t* counts;
  int64_t segments;
};

// What a chunk leaves behind: cosines of its tokens, |x|^2, and whether they offend.
struct MonitorChunk {
  int64_t block, first, tokens;
  float* x;       // [kChunk, kPitch], scratch
  float* cosine;  // [kChunk, K]
  float square[kChunk];
  bool offends[kChunk];
};

class Monitor {
 public:
  // Checks everything; `op` begins the messages.
  Monitor(const char* op, const torch::stable::Tensor& x, const torch::stable::Tensor& directions,
          const torch::stable::Tensor& tokens, const torch::stable::Tensor& ranges, torch::stable::Tensor& extremes,
          torch::stable::Tensor& counts, int64_t layer);

  int64_t chunks() const { return job_.blocks * chunks_of_block_; }
  // For parallel_for over the chunks: all of them where waking a thread costs more than the work.
  int64_t grain() const;

  // Chunks from..to; `then(chunk)` runs after each.
  template <typename Then>
  void run(int64_t from, int64_t to, const Then& then) {
    const std::unique_ptr<float[]> scratch(new float[kChunk * (kPitch + job_.count) + 16]);
    for (int64_t i = from; i < to; ++i) then(observe(i, scratch.get()));
  }

 private:
  MonitorChunk observe(int64_t index, float* scratch);

  MonitorJob job_;
  int64_t chunks_of_block_;
  void (*cosines_)(const MonitorJob&, MonitorChunk&);
  void (*reduce_)(const MonitorJob&, const MonitorChunk&);
  std::mutex accumulators_;  // minimum, maximum and integer sums: the order of the threads does not show
};

}  // namespace bkdfast
