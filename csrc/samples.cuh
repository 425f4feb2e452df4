// How a kernel sees a batch of samples (B, ...): patches of one sample, with their noise and their coefficients.
//
// A block works on tiles of one sample. Its seed, timestep and coefficients are computed by one thread and shared; a
// tile is a patch of elements for each thread. Elements are numbered within the sample in (C, H, W) order, whatever the
// memory layout, and noise depends on that number alone: four consecutive elements are a chunk, one Philox. There are
// four ways to lay patches over a sample, and in each a thread uses all four normals of its chunks:
//
//     WIDE       contiguous, vectors of 16 bytes: 8 elements a thread, two chunks.
//     ROWS       channels_last, H x W a multiple of 4: 4 pixels by the channels of a vector; a channel's 4 pixels are a
//                chunk, a pixel's channels a vector, so that nothing changes threads.
//     LINE       channels_last with 4 channels of 16 bits: 4 pixels are 16 consecutive elements, two vectors.
//     SCATTERED  anything else, element by element.
//
// The schedule's table holds alpha-bar as a pair of float32 numbers (mmfast.NoiseSchedule.alpha_table), so that
// 1 - alpha-bar and differences of two keep their digits. An out-of-range timestep gives NaN.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "host.h"
#include "launch.cuh"
#include "philox.cuh"
#include "vec.cuh"

namespace samples {

enum class Layout { Wide, Rows, Line, Scattered };

enum class Order : int {  // what elements a thread of SCATTERED takes
    Contiguous,           // a chunk
    Last,                 // channels_last, H x W a multiple of 4: a chunk, threads side by side along the channels
    LastOdd,              // channels_last, else: a chunk, which may go over to the next channel
};

constexpr int THREADS = 128;
constexpr unsigned LARGEST = 1u << 30;  // elements of a sample: they are counted in 32 bits

// ---------------------------------------------------------------- division by a number that the host knows
struct Divider {
    unsigned multiplier;
    unsigned shift;
    unsigned divisor;

    // n below 2^31.
    __device__ __forceinline__ unsigned operator()(unsigned n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

inline Divider divider(uint64_t divisor) {
    unsigned shift = 0;
    while ((uint64_t(1) << shift) < divisor) ++shift;
    const uint64_t multiplier = ((((uint64_t(1) << shift) - divisor) << 32) / divisor) + 1;
    return {static_cast<unsigned>(multiplier), shift, static_cast<unsigned>(divisor)};
}

// ---------------------------------------------------------------- the plan of a launch
struct Plan {
    unsigned batch;
    unsigned size;      // elements of a sample
    unsigned channels;  // of a sample, 1 where it has none
    unsigned pixels;    // size / channels
    unsigned units;     // patches of a sample
    unsigned tiles;     // of a sample
    unsigned tiles_a_block;
    Order order;
    Divider by_blocks;  // blocks of a sample
    Divider by_groups;  // ROWS: vectors of a pixel. SCATTERED: channels (Last) or pixels (LastOdd)
    Divider by_pixels;
};

// ---------------------------------------------------------------- what a thread holds
// V elements that lie side by side, R times; in sum E. `at` counts elements from where the sample begins.
template <class T, Layout L>
struct Patch {
    static constexpr int V = L == Layout::Scattered ? 1 : 16 / int(sizeof(T));
    static constexpr int R = L == Layout::Wide ? 8 / V : L == Layout::Line ? 2 : 4;
    static constexpr int E = R * V;

    unsigned at[R];
    unsigned channel[R];  // of a row's first element; in WIDE not known
    unsigned chunk;       // SCATTERED: the one. ROWS, LINE: that of the first channel
    bool inside[R];

    __device__ __forceinline__ Patch(const Plan& p, unsigned tile) {
        const unsigned unit = tile * blockDim.x + threadIdx.x;
        chunk = unit;
        if constexpr (L == Layout::Wide) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                at[r] = ((tile * R + r) * blockDim.x + threadIdx.x) * V;
                inside[r] = at[r] < p.size;
                channel[r] = 0;
            }
        } else if constexpr (L == Layout::Line) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                at[r] = unit * E + r * V;
                inside[r] = unit < p.units;
                channel[r] = 0;
            }
        } else if constexpr (L == Layout::Rows) {
            const unsigned four = p.by_groups(unit);
            const unsigned first = (unit - four * p.by_groups.divisor) * V;
            chunk = first * (p.pixels / 4) + four;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                at[r] = (four * 4 + r) * p.channels + first;
                inside[r] = unit < p.units;
                channel[r] = first;
            }
        } else if (p.order == Order::Last) {
            const unsigned four = p.by_groups(unit);
            const unsigned c = unit - four * p.channels;
            chunk = c * (p.pixels / 4) + four;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                at[r] = (four * 4 + r) * p.channels + c;
                inside[r] = unit < p.units;
                channel[r] = c;
            }
        } else {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const unsigned element = unit * 4 + r;
                const unsigned c = p.by_pixels(element);
                channel[r] = c;
                at[r] = p.order == Order::Contiguous ? element : (element - c * p.pixels) * p.channels + c;
                inside[r] = element < p.size;
            }
        }
    }

    // Whether any of it is inside the sample: the first row is.
    __device__ __forceinline__ bool any() const { return inside[0]; }

    // Standard normal numbers of its elements.
    __device__ __forceinline__ void noise(const Plan& p, const NoiseKey& key, float (&z)[E]) const {
        float four[4];
        if constexpr (L == Layout::Wide) {
#pragma unroll
            for (int i = 0; i < E / 4; ++i) {
                normals4(key, at[i / (V / 4)] / 4 + i % (V / 4), four);
#pragma unroll
                for (int k = 0; k < 4; ++k) z[i * 4 + k] = four[k];
            }
        } else if constexpr (L == Layout::Scattered) {
            normals4(key, chunk, z);
        } else {
            constexpr int CHANNELS = E / 4;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                normals4(key, chunk + c * (p.pixels / 4), four);
#pragma unroll
                for (int k = 0; k < 4; ++k) z[k * CHANNELS + c] = four[k];
            }
        }
    }

    // Add `scale` times one number a channel: offset noise. `numbers` is [C] float32, the sample's.
    __device__ __forceinline__ void add_channels(
        const Plan& p, const float* numbers, float scale, float (&z)[E]) const {
        if constexpr (L == Layout::Wide) {
            const bool whole = p.pixels % V == 0;  // a vector lies in one channel
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float number = inside[r] && whole ? numbers[p.by_pixels(at[r])] : 0.0f;
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    if (!whole) number = inside[r] ? numbers[p.by_pixels(at[r] + i)] : 0.0f;
                    z[r * V + i] = fmaf(scale, number, z[r * V + i]);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < E; ++i) {
                const unsigned c = L == Layout::Line ? i % 4 : channel[i / V] + i % V;
                z[i] = fmaf(scale, inside[i / V] ? numbers[c] : 0.0f, z[i]);
            }
        }
    }
};

// ---------------------------------------------------------------- which sample and tiles a block has
struct Block {
    unsigned sample;
    unsigned tile;  // the first
    unsigned end;   // one past the last

    __device__ __forceinline__ explicit Block(const Plan& p) {
        sample = p.by_blocks(blockIdx.x);
        tile = (blockIdx.x - sample * p.by_blocks.divisor) * p.tiles_a_block;
        end = min(tile + p.tiles_a_block, p.tiles);
    }

    // Where the sample begins in a tensor of the batch, in elements.
    __device__ __forceinline__ int64_t start(const Plan& p) const { return static_cast<int64_t>(sample) * p.size; }
};

// ---------------------------------------------------------------- rows of a patch
// N elements side by side, where `in` and `out` are part of a patch's registers.
template <class T, int N>
__device__ __forceinline__ void load_row(const T* data, float* out) {
    float row[N];
    to_floats(load_vec_readonly<T, N>(data), row);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = row[i];
}

template <class T, int N>
__device__ __forceinline__ void store_row(T* data, const float* in) {
    float row[N];
#pragma unroll
    for (int i = 0; i < N; ++i) row[i] = in[i];
    store_vec(data, from_floats<T>(row));
}

// A row of a tensor whose dtype the kernel is not compiled for. Beside samples of 16 bits it is theirs or float32;
// beside float32 samples it is any.
template <class T, int N>
__device__ __forceinline__ void load_any(const void* data, int dtype, int64_t at, float* out) {
    if (dtype == Float32) {
        load_row<float, N>(static_cast<const float*>(data) + at, out);
    } else if constexpr (sizeof(T) == 2) {
        load_row<T, N>(static_cast<const T*>(data) + at, out);
    } else if (dtype == Float16) {
        load_row<__half, N>(static_cast<const __half*>(data) + at, out);
    } else {
        load_row<__nv_bfloat16, N>(static_cast<const __nv_bfloat16*>(data) + at, out);
    }
}

inline void require_dtype(const char* op, const char* name, int dtype, int samples) {
    require(dtype == samples || dtype == Float32 || samples == Float32, op, ": ", name,
            " must be of the samples' dtype ", samples, " or float32, got ", dtype);
}

// ---------------------------------------------------------------- seeds, timesteps, coefficients
struct Seeds {
    const int64_t* each;     // [B], or null: `one` and the sample's index
    uint64_t one;
    const float* channels;   // [B, C], one number a channel, or null
    float offset;            // what they are multiplied by

    __device__ __forceinline__ void key(NoiseKey& out, unsigned sample, unsigned stream) const {
        make_noise_key(out, each ? static_cast<uint64_t>(each[sample]) : one, each ? 0 : sample, stream);
    }

    // The patch's noise, with the channels' part.
    template <class P>
    __device__ __forceinline__ void noise(
        const P& patch, const Plan& p, const NoiseKey& key, unsigned sample, float (&z)[P::E]) const {
        patch.noise(p, key, z);
        if (channels) patch.add_channels(p, channels + static_cast<int64_t>(sample) * p.channels, offset, z);
    }
};

enum Integer : int { Int64 = 0, Int32 = 1, Int16 = 2, Int8 = 3, UInt8 = 4 };

struct Timesteps {
    const void* data;  // [B], `stride` elements apart
    int64_t stride;
    int kind;          // Integer

    __device__ __forceinline__ int64_t operator[](unsigned sample) const {
        const int64_t i = sample * stride;
        if (kind == Int64) return static_cast<const int64_t*>(data)[i];
        if (kind == Int32) return static_cast<const int32_t*>(data)[i];
        if (kind == Int16) return static_cast<const int16_t*>(data)[i];
        if (kind == Int8) return static_cast<const int8_t*>(data)[i];
        return static_cast<const uint8_t*>(data)[i];
    }
};

// A schedule's alpha_table, [T + 1, 2] float32 from timestep -1.
struct Table {
    const float* pairs;
    int64_t last;  // T - 1

    // alpha-bar at t as (high, low); NaN where t is outside `first` to `last`.
    __device__ __forceinline__ float2 operator()(int64_t t, int64_t first = 0) const {
        if (t < first || t > last) return make_float2(NAN, NAN);
        return make_float2(pairs[2 * (t + 1)], pairs[2 * (t + 1) + 1]);
    }
};

// 1 - alpha-bar, with all its digits.
__device__ __forceinline__ float rest(float2 pair) { return (1.0f - pair.x) - pair.y; }

// sqrt(alpha-bar) and sqrt(1 - alpha-bar) at timestep t.
__device__ __forceinline__ float2 signal_and_sigma(const Table& table, int64_t t) {
    const float2 pair = table(t);
    return make_float2(sqrtf(pair.x + pair.y), sqrtf(rest(pair)));
}

// sqrt(1 - beta) and sqrt(beta) at timestep t, of the alpha-bars on both sides of it; before timestep 0 it is 1.
__device__ __forceinline__ float2 step_signal_and_sigma(const Table& table, int64_t t) {
    const float2 now = table(t);
    const float2 before = t == 0 ? make_float2(1.0f, 0.0f) : table(t - 1);
    const float beta = ((before.x - now.x) + (before.y - now.y)) / before.x;
    return make_float2(sqrtf(now.x / before.x), sqrtf(beta));
}

// ---------------------------------------------------------------- host
// A batch as Python describes it.
struct Shape {
    int64_t batch;
    int64_t size;       // elements of a sample
    int64_t channels;   // of a sample, 1 where it has none
    bool last;          // channels_last
};

constexpr int64_t BLOCKS = 1056;  // eight on each of 132 multiprocessors: from there on a block takes more tiles
constexpr unsigned MOST_TILES = 8;

inline bool aligned(std::initializer_list<Pointer> pointers) {
    for (Pointer p : pointers)
        if (p % 16 != 0) return false;
    return true;
}

// The layout of patches. `any_order`: no noise is made and channels are not asked for, so that any dense layout is one
// run of memory.
inline Layout layout_of(const Shape& s, int dtype, bool any_order, bool is_aligned) {
    const int64_t vector = dtype == Float32 ? 4 : 8;
    if (!is_aligned || s.size % vector != 0) return Layout::Scattered;
    if (!s.last || any_order) return Layout::Wide;
    if (s.size / s.channels % 4 != 0) return Layout::Scattered;
    if (s.channels % vector == 0) return Layout::Rows;
    return s.channels == 4 ? Layout::Line : Layout::Scattered;
}

// `most_blocks`: of a sample; 0: as leave enough blocks for a GPU.
inline Plan plan(const char* op, const Shape& s, Layout layout, int dtype, bool any_order, int threads,
                 int64_t most_blocks = 0) {
    require(s.batch > 0 && s.size > 0, op, ": batch and size must be positive, got ", s.batch, " and ", s.size);
    require(s.size < int64_t(LARGEST), op, ": a sample must have fewer than ", LARGEST, " elements, got ", s.size);
    require(s.channels > 0 && s.size % s.channels == 0, op, ": size must be a multiple of channels, got ", s.size,
            " and ", s.channels);
    const int64_t vector = dtype == Float32 ? 4 : 8;
    int64_t each = 4;  // elements of a patch
    if (layout == Layout::Wide) each = 8;
    if (layout == Layout::Line) each = 16;
    if (layout == Layout::Rows) each = 4 * vector;
    Plan p = {};
    p.batch = static_cast<unsigned>(s.batch);
    p.size = static_cast<unsigned>(s.size);
    p.channels = static_cast<unsigned>(s.channels);
    p.pixels = p.size / p.channels;
    p.order = !s.last || any_order ? Order::Contiguous : p.pixels % 4 == 0 ? Order::Last : Order::LastOdd;
    p.units = static_cast<unsigned>((s.size + each - 1) / each);
    p.tiles = (p.units + threads - 1) / threads;
    if (most_blocks > 0) {
        p.tiles_a_block = static_cast<unsigned>((p.tiles + most_blocks - 1) / most_blocks);
    } else {
        const int64_t even = s.batch * p.tiles / BLOCKS;
        p.tiles_a_block = even < 1 ? 1 : even > MOST_TILES ? MOST_TILES : static_cast<unsigned>(even);
    }
    const unsigned blocks = (p.tiles + p.tiles_a_block - 1) / p.tiles_a_block;
    require(s.batch * blocks < (int64_t(1) << 31), op, ": too large a batch, ", s.batch, " samples of ", s.size);
    p.by_blocks = divider(blocks);
    p.by_groups = divider(layout == Layout::Rows ? p.channels / vector : p.channels);
    p.by_pixels = divider(p.pixels);
    return p;
}

inline unsigned blocks(const Plan& p) { return p.batch * p.by_blocks.divisor; }

// Threads of a block: fewer where a sample is small.
inline int threads_of(const Shape& s) {
    const int64_t wanted = (s.size / 8 + 31) / 32 * 32;
    return wanted < 32 ? 32 : wanted > THREADS ? THREADS : static_cast<int>(wanted);
}

// Call `body(T{}, std::integral_constant<Layout, ...>{})` for a dtype code and a layout.
template <class Body>
void with_layout(const char* op, int dtype, Layout layout, Body body) {
    with_dtype(op, dtype, [&](auto element) {
        using T = decltype(element);
        if (layout == Layout::Wide) {
            body(element, std::integral_constant<Layout, Layout::Wide>{});
        } else if (layout == Layout::Rows) {
            body(element, std::integral_constant<Layout, Layout::Rows>{});
        } else if (layout == Layout::Scattered) {
            body(element, std::integral_constant<Layout, Layout::Scattered>{});
        } else if constexpr (sizeof(T) == 2) {
            body(element, std::integral_constant<Layout, Layout::Line>{});
        }
    });
}

// The same for kernels that make no noise: any dense layout is WIDE or SCATTERED.
template <class Body>
void with_line(const char* op, int dtype, Layout layout, Body body) {
    with_dtype(op, dtype, [&](auto element) {
        if (layout == Layout::Wide) {
            body(element, std::integral_constant<Layout, Layout::Wide>{});
        } else {
            body(element, std::integral_constant<Layout, Layout::Scattered>{});
        }
    });
}

}  // namespace samples
