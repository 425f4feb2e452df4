// What layer_norm and add_layer_norm share: how rows lie on threads, sums over a row, parameters of either dtype, and
// the second reduction of the gradients of parameters.
//
// A row is `blockDim.x` threads wide: 8, 16 or 32 lanes of a warp, or several warps. Each thread holds V pieces of N
// elements; piece v of thread t is piece v * blockDim.x + t of the row, so that neighbours read neighbours. N elements
// are 16 bytes, or one element (N = 1) where a pointer, a stride or the width is no multiple of 16 bytes. `blockDim.y`
// rows lie in a block side by side, and each thread works on R rows at a time, to have loads enough under way.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host.h"
#include "mma.cuh"
#include "vec.cuh"

namespace norm_rows {

constexpr int WIDEST = 8192;

template <class T>
constexpr int CODE = sizeof(T) == 4 ? Float32 : BFloat16;
template <>
inline constexpr int CODE<__half> = Float16;

// Where rows start: row r at r / inner * outer + r % inner * stride, in elements; below 2^32 rows unless inner is all
// of them (a division of 64 bits is a long subroutine).
struct Rows {
    int64_t inner;
    int64_t outer;
    int64_t stride;

    __device__ __forceinline__ int64_t start(int64_t row) const {
        if (row < inner) return row * stride;  // every row, where one stride serves all
        const uint32_t quotient = uint32_t(row) / uint32_t(inner);
        return quotient * outer + (row - quotient * inner) * stride;
    }
};

// A parameter, (width,) or one number a sample: null, or of dtype `code`.
struct Parameter {
    const void* data;
    int code;
};

// ---------------------------------------------------------------- pieces of a row
// N elements as they lie in memory, in whole registers: of halves of registers the compiler makes twice the
// instructions. Where T is float they may be 16-bit ones, in the first half: which, `code` says. It is the same for a
// whole launch, so asking costs a branch and no divergence.
template <class T, int N>
struct Piece {
    static constexpr int WORDS = N * int(sizeof(T)) / 4;
    unsigned words[WORDS];
};

template <int Bytes>
__device__ __forceinline__ void load_words(const void* p, unsigned* words) {
    check_aligned(p, Bytes);
    const auto found = __ldg(static_cast<const typename Word<Bytes>::type*>(p));
    if constexpr (Bytes == 2) {
        words[0] = found;
    } else {
        memcpy(words, &found, Bytes);
    }
}

// Elements start + offset and so on of `data`; zeros, and no load, unless `valid`.
template <class T, int N>
__device__ __forceinline__ Piece<T, N> load_piece(
    const void* data, int code, int64_t start, int offset, bool valid = true) {
    Piece<T, N> piece = {};
    if (sizeof(T) == 4 && code != Float32) {
        if (valid) load_words<2 * N>(static_cast<const __half*>(data) + start + offset, piece.words);
    } else {
        if (valid) load_words<N * int(sizeof(T))>(static_cast<const T*>(data) + start + offset, piece.words);
    }
    return piece;
}

// This thread's own copy in shared memory.
template <class T, int N>
__device__ __forceinline__ Piece<T, N> load_copied(const T* slot) {
    static_assert(N * sizeof(T) == 16);
    check_aligned(slot, 16);
    const uint4 found = *reinterpret_cast<const uint4*>(slot);
    Piece<T, N> piece;
    memcpy(piece.words, &found, sizeof(found));
    return piece;
}

template <class Half, int N>
__device__ __forceinline__ void unpack_words(const unsigned* words, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const float2 pair = unpack<Half>(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

template <class T, int N>
__device__ __forceinline__ void piece_to_floats(const Piece<T, N>& piece, int code, float (&out)[N]) {
    if constexpr (sizeof(T) == 2) {
        unpack_words<T>(piece.words, out);
    } else if constexpr (N == 1) {  // the three conversions cost less than branches between them
        const unsigned bits = piece.words[0];
        out[0] = code == Float32   ? __uint_as_float(bits)
                 : code == Float16 ? unpack<__half>(bits).x
                                   : unpack<__nv_bfloat16>(bits).x;
    } else if (code == Float16) {
        unpack_words<__half>(piece.words, out);
    } else if (code == BFloat16) {
        unpack_words<__nv_bfloat16>(piece.words, out);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = __uint_as_float(piece.words[i]);
    }
}

template <class Half, int N>
__device__ __forceinline__ void pack_words(const float (&values)[N], unsigned* words) {
#pragma unroll
    for (int i = 0; i < (N + 1) / 2; ++i) words[i] = pack<Half>(values[2 * i], N == 1 ? 0.0f : values[2 * i + (N > 1)]);
}

// Rounds to `code`: T's own dtype, or (T float) a 16-bit one.
template <class T, int N>
__device__ __forceinline__ Piece<T, N> floats_to_piece(const float (&values)[N], int code) {
    Piece<T, N> piece = {};
    if constexpr (sizeof(T) == 2) {
        pack_words<T>(values, piece.words);
    } else if (code == Float16) {
        pack_words<__half>(values, piece.words);
    } else if (code == BFloat16) {
        pack_words<__nv_bfloat16>(values, piece.words);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) piece.words[i] = __float_as_uint(values[i]);
    }
    return piece;
}

template <int Bytes>
__device__ __forceinline__ void store_words(void* p, const unsigned* words) {
    check_aligned(p, Bytes);
    typename Word<Bytes>::type word;
    if constexpr (Bytes == 2) {
        word = static_cast<unsigned short>(words[0]);
    } else {
        memcpy(&word, words, Bytes);
    }
    *static_cast<typename Word<Bytes>::type*>(p) = word;
}

template <class T, int N>
__device__ __forceinline__ void write_piece(void* data, int code, int64_t start, int offset, const Piece<T, N>& piece) {
    if (sizeof(T) == 4 && code != Float32) {
        store_words<2 * N>(static_cast<__half*>(data) + start + offset, piece.words);
    } else {
        store_words<N * int(sizeof(T))>(static_cast<T*>(data) + start + offset, piece.words);
    }
}

// Rounds to `code`: T's own dtype, float32, or (T float) a 16-bit one.
template <class T, int N>
__device__ __forceinline__ void store_piece(void* data, int code, int64_t start, int offset, const float (&values)[N]) {
    if (sizeof(T) == 2 && code == Float32) {
        store_vec(static_cast<float*>(data) + start + offset, from_floats<float, N>(values));
    } else {
        write_piece<T, N>(data, code, start, offset, floats_to_piece<T, N>(values, code));
    }
}

// N elements of a parameter of T's dtype or float32, or, with Any, of a 16-bit one beside T = float; `otherwise` where
// there is none.
template <class T, int N, bool Any = N == 1>
__device__ __forceinline__ void load_parameter(const Parameter& p, int offset, float otherwise, float (&out)[N]) {
    if (p.data == nullptr) {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = otherwise;
    } else if (sizeof(T) == 2 && p.code == Float32) {
        to_floats(load_vec_readonly<float, N>(static_cast<const float*>(p.data) + offset), out);
    } else {
        const int code = Any && sizeof(T) == 4 ? p.code : CODE<T>;
        piece_to_floats<T, N>(load_piece<T, N>(p.data, code, 0, offset), code, out);
    }
}

// In pairs: shorter chains of additions, and less rounding.
template <int N>
__device__ __forceinline__ float sum_of(const float (&values)[N]) {
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = values[i];
#pragma unroll
    for (int step = N / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
    }
    return sums[0];
}

// The factor of a row, 1 where there is none.
__device__ __forceinline__ float sample_of(const Parameter& sample, int64_t row, int64_t rows_per_sample) {
    float value[1] = {1.0f};
    if (sample.data != nullptr) {
        const int64_t index = rows_per_sample == 1 ? row : int64_t(uint32_t(row) / uint32_t(rows_per_sample));
        piece_to_floats<float, 1>(load_piece<float, 1>(sample.data, sample.code, index, 0), sample.code, value);
    }
    return value[0];
}

// ---------------------------------------------------------------- sums over a row
// Replaces each value by its sum over the threads of a row, in a fixed order; all threads of the block call it.
// `partial` is shared memory, [warps of the block][K]; the next call must be given other memory, the one after may
// reuse it.
template <int K>
__device__ __forceinline__ void row_sums(float (&values)[K], float* partial) {
    const int threads = int(blockDim.x);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        if (step < 8 || step < threads) {
#pragma unroll
            for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(0xFFFFFFFFu, values[k], step);
        }
    }
    if (threads <= 32) return;
    const int warps = threads / 32;
    const int lane = int(threadIdx.x) % 32;
    partial += int(threadIdx.y) * warps * K;
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) partial[int(threadIdx.x) / 32 * K + k] = values[k];
    }
    __syncthreads();
    int steps = 2;
    while (steps < warps) steps *= 2;
    const int warp = lane & (steps - 1);
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = warp < warps ? partial[warp * K + k] : 0.0f;
    for (int step = 1; step < steps; step *= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(0xFFFFFFFFu, values[k], step);
    }
}

// ---------------------------------------------------------------- which shape of block a width gets
struct Plan {
    int pieces;  // of a row
    int held;    // pieces of a row a thread, at most V
    dim3 block;  // threads a row, rows side by side
};

// `most` is the largest V; blocks have about `threads` threads. Depends on the width alone, so that a row gives the
// same bits in any batch.
inline Plan plan_rows(int64_t width, int n, int most, int threads) {
    const int pieces = int(width / n);
    const int narrow = n == 1 ? most : 1;  // single elements are held by fewer threads
    int across = 32;
    if (pieces <= 8 * narrow) {
        across = 8;
    } else if (pieces <= 16 * narrow) {
        across = 16;
    } else if (pieces > 32 * most) {
        across = 32 * ((pieces + 32 * most - 1) / (32 * most));
    }
    const int side_by_side = threads > across ? threads / across : 1;
    return {pieces, (pieces + across - 1) / across, dim3(unsigned(across), unsigned(side_by_side))};
}

// Calls `run` with T and N: 16-byte pieces, or single elements of any dtype, as the kernel's `code` says.
template <class Run>
void with_elements(const char* op, int dtype, bool vectors, Run run) {
    if (!vectors) {
        run(float{}, std::integral_constant<int, 1>{});
    } else {
        with_dtype(op, dtype, [&](auto zero) { run(zero, std::integral_constant<int, 16 / int(sizeof(zero))>{}); });
    }
}

// Calls `run` with the first V of the list, ascending, that is enough: a piece that no thread has costs a branch.
template <int V, int... More, class Run>
void with_held(int held, Run run) {
    if constexpr (sizeof...(More) > 0) {
        if (held > V) return with_held<More...>(held, run);
    }
    run(std::integral_constant<int, V>{});
}

inline void check_rows(const char* op, int64_t rows, int64_t width, int dtype, const Rows& strides) {
    require(rows > 0, op, ": rows must be positive, got ", rows);
    require(width > 0 && width <= WIDEST, op, ": width must be 1 to ", WIDEST, ", got ", width);
    require(dtype >= Float32 && dtype <= BFloat16, op,
            ": dtype must be 0 (float32), 1 (float16) or 2 (bfloat16), got ", dtype);
    require(strides.inner >= rows || (strides.inner > 0 && rows < int64_t(1) << 32), op,
            ": rows with two strides must be fewer than 2^32, and the inner ones at least one, got ", rows, " and ",
            strides.inner);
}

// Whether 16-byte pieces serve: where rows start and how long they are, and addresses, or'ed together.
inline bool whole(int dtype, const Rows& rows, int64_t width) {
    return (rows.outer | rows.stride | width) % (dtype == Float32 ? 4 : 8) == 0;
}
inline bool whole(Pointer addresses) { return addresses % 16 == 0; }

inline void check_samples(const char* op, Pointer sample, int64_t rows, int64_t rows_per_sample) {
    require(!sample || rows_per_sample == 1 || (rows_per_sample > 0 && rows < int64_t(1) << 32), op,
            ": rows with factors of samples must be fewer than 2^32, and at least one a sample, got ", rows, " and ",
            rows_per_sample);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr size_t EVERYWHERE = 92 << 10;  // bytes of dynamic shared memory that a block may have on any device

// As many as `device` allows beside static shared memory and what the driver takes.
inline size_t dynamic_limit(int device) { return size_t(shared_limit(device)) - 4096; }

// ---------------------------------------------------------------- the second reduction
// Up to three tables of partial sums, one row a block of the first kernel, and where their sums go.
struct ColumnSums {
    const float* tables[3];  // each [count, width] float32, or null
    void* sums[3];           // each [width], of dtype `codes`
    int codes[3];
    int count;
    int width;
};

constexpr int SUM_COLUMNS = 32;
constexpr int SUM_ROWS = 16;

// A block sums 32 columns of one table: 16 rows of threads, then their sums in a fixed order.
static __global__ void __launch_bounds__(SUM_COLUMNS* SUM_ROWS) column_sums_kernel(ColumnSums a) {
    SHARED(float, rows, [SUM_ROWS][SUM_COLUMNS]);
    const int which = int(blockIdx.y);  // indexing the arguments would copy them to memory
    const float* table = which == 0 ? a.tables[0] : which == 1 ? a.tables[1] : a.tables[2];
    void* sums = which == 0 ? a.sums[0] : which == 1 ? a.sums[1] : a.sums[2];
    const int code = which == 0 ? a.codes[0] : which == 1 ? a.codes[1] : a.codes[2];
    const int column = int(blockIdx.x) * SUM_COLUMNS + int(threadIdx.x);
    float sum = 0.0f;
    if (table != nullptr && column < a.width) {
#pragma unroll 8
        for (int row = int(threadIdx.y); row < a.count; row += SUM_ROWS) {
            sum += __ldg(table + int64_t(row) * a.width + column);
        }
    }
    rows[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && table != nullptr && column < a.width) {
        float total = rows[0][threadIdx.x];
#pragma unroll
        for (int row = 1; row < SUM_ROWS; ++row) total += rows[row][threadIdx.x];
        const float value[1] = {total};
        store_piece<float, 1>(sums, code, 0, column, value);
    }
}

inline void column_sums(const ColumnSums& a, cudaStream_t stream) {
    int tables = 3;
    while (tables > 0 && a.tables[tables - 1] == nullptr) --tables;
    if (tables == 0) return;
    const dim3 grid(unsigned(ceil_div(a.width, SUM_COLUMNS)), unsigned(tables));
    launch(column_sums_kernel, grid, dim3(SUM_COLUMNS, SUM_ROWS), 0, stream, a);
}

// ---------------------------------------------------------------- gradients of parameters
// Adds up the partial sums of the rows side by side, and writes them to `out`, one row of a table. `room` is shared
// memory for V * N floats a thread, which no one uses any more; all threads of the block call it.
template <int N, int V>
__device__ __forceinline__ void write_partial(const float (&sums)[V * N], float* room, float* out, int pieces) {
    constexpr int FLOATS = N < 4 ? N : 4;  // 16 bytes: neighbours in different banks
    const int across = int(blockDim.x);
    const int down = int(blockDim.y);
    const int thread = int(threadIdx.y) * across + int(threadIdx.x);
    const int threads = across * down;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V * N / FLOATS; ++i) {
        Vec<float, FLOATS> some;
#pragma unroll
        for (int j = 0; j < FLOATS; ++j) some[j] = sums[i * FLOATS + j];
        store_vec(room + (i * threads + thread) * FLOATS, some);
    }
    __syncthreads();
    for (int v = int(threadIdx.y); v < V; v += down) {
        const int piece = v * across + int(threadIdx.x);
        if (piece >= pieces) continue;
#pragma unroll
        for (int part = 0; part < N / FLOATS; ++part) {
            float total[FLOATS] = {};
#pragma unroll 1
            for (int y = 0; y < down; ++y) {
                const int at = ((v * (N / FLOATS) + part) * threads + y * across + int(threadIdx.x)) * FLOATS;
                const Vec<float, FLOATS> some = load_vec<float, FLOATS>(room + at);
#pragma unroll
                for (int j = 0; j < FLOATS; ++j) total[j] += some[j];
            }
            store_vec(out + int64_t(piece) * N + part * FLOATS, from_floats<float, FLOATS>(total));
        }
    }
}

}  // namespace norm_rows
