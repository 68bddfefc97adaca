// Experts, and routers' scores, in bf16 on a CPU that multiplies pairs of bf16 (AVX512-BF16). cpu_bf16.py builds and calls
// this.
//
// Shapes: E experts, D model width, F expert hidden width; I = 2F for a gated activation (the first F rows of an expert
// are the gate), else F; N rows sorted by expert, R of them of one expert, n one of them. D and F are multiples of 32.
//
// The instruction, vdpbf16ps, adds the products of *pairs* of neighbours to sums in fp32. So a product with the sum over
// k takes both of its sides as pairs of k: [k / 2][m] on the left, of which one pair at a time is broadcast, and
// [k / 2][n] on the right, of which 32 columns are in registers. How a matrix comes to lie like that depends on which of
// its dimensions is summed over: `pack_rows` transposes, `pack_columns` interleaves two rows.
//
// An expert has few rows, so what counts is that its weights come from memory once in a pass (once for every 192 rows). A
// panel of 32 of their columns is packed into the cache, and is multiplied with all those rows while the next is fetched.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

using bf16 = uint16_t;
using pairs = uint32_t;  // two bf16, neighbours in the dimension that is summed over

constexpr int64_t LANES = 16;   // numbers in fp32 of a register
constexpr int64_t LINE = 64;    // bytes that memory is read and written in
constexpr int64_t PANEL = 32;   // columns of the right side at a time: a line of bf16
constexpr int64_t ROWS = 12;    // rows of the left side at a time: 24 of the 32 registers are sums
constexpr int64_t BLOCK = 192;  // rows of an expert at a time, so that they stay in the second cache
constexpr int64_t SCORED = 128;  // tokens that a router scores at a time: fewer, as threads share them out

enum Activation : int64_t { SWIGLU, GELU, RELU };

}  // namespace

// Mirrored by `_Call` in cpu_bf16.py. A null pointer to a gradient says that it is not wanted.
struct Call {
    int64_t num_experts, d_model, hidden_size, activation, threads;
    const int64_t* counts;      // [E] rows of each expert
    const int64_t* token;       // [N] which row of x a row is; null: itself
    const float* weight;        // [N] factor of each row's output; null: 1
    const bf16 *x, *up, *down;  // [T, D] or without tokens [N, D]; [E, I, D]; [E, D, F]
    bf16* hidden;               // [N, I] what stands before the activation: the forward pass writes it
    char* scratch;              // as many bytes as moe_experts_scratch says, aligned to 64
    // The forward pass alone:
    bf16* y;  // [N, D] the rows' weighted outputs
    // The backward pass alone:
    const bf16* grad;           // [T, D] or [N, D], gradient of each token's sum
    bf16* grad_x;               // [N, D]
    float* grad_weight;         // [N]
    bf16 *grad_up, *grad_down;  // as up and down; aligned to 64

    int64_t inner_size() const { return activation == SWIGLU ? 2 * hidden_size : hidden_size; }
};
static_assert(sizeof(Call) == 19 * 8, "as the structure in cpu_bf16.py");

namespace {

// --- numbers

inline __m512 load_wide(const bf16* from) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void store_narrow(bf16* to, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

inline __m512 broadcast(float value) { return _mm512_set1_ps(value); }

// e^x to within the rounding of fp32. Cody and Waite's reduction by ln 2 in two parts; the polynomial is that of Cephes.
inline __m512 exponential(__m512 x) {
    // The bounds are where the result is 0 and infinite. Of two numbers one of which is none, these instructions take the
    // second: so x stands there, and a NaN stays one.
    x = _mm512_max_ps(broadcast(-104.0f), _mm512_min_ps(broadcast(104.0f), x));
    __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, broadcast(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 rest = _mm512_fnmadd_ps(power, broadcast(0.693359375f), x);
    rest = _mm512_fnmadd_ps(power, broadcast(-2.12194440e-4f), rest);
    __m512 sum = broadcast(1.9875691500e-4f);
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        sum = _mm512_fmadd_ps(sum, rest, broadcast(coefficient));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(sum, rest), rest, _mm512_add_ps(rest, broadcast(1.0f)));
    return _mm512_scalef_ps(sum, power);
}

struct Activated {
    __m512 value, by_first, by_second;  // with its derivatives by the gate (or the only input) and by the other half
};

template <Activation kind> inline Activated activate(__m512 first, __m512 second);

template <> inline Activated activate<SWIGLU>(__m512 gate, __m512 up) {
    __m512 one = broadcast(1.0f);
    __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
    __m512 silu = _mm512_mul_ps(gate, sigmoid);
    __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, sigmoid), sigmoid);
    return {_mm512_mul_ps(silu, up), _mm512_mul_ps(slope, up), silu};
}

// x times the normal distribution's cdf, whose tail is Abramowitz and Stegun's 7.1.26: off by 1.5e-7 at most.
template <> inline Activated activate<GELU>(__m512 x, __m512) {
    __m512 one = broadcast(1.0f), size = _mm512_mul_ps(_mm512_abs_ps(x), broadcast(0.70710678118654752f));
    __m512 bell = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), broadcast(-0.5f)));
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, broadcast(0.3275911f), one));
    __m512 sum = broadcast(1.061405429f);
    for (float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        sum = _mm512_fmadd_ps(sum, t, broadcast(coefficient));
    __m512 tail = _mm512_mul_ps(_mm512_mul_ps(broadcast(0.5f), _mm512_mul_ps(sum, t)), bell);
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512 cdf = _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), negative, tail);
    return {_mm512_mul_ps(x, cdf), _mm512_fmadd_ps(_mm512_mul_ps(x, broadcast(0.39894228040143268f)), bell, cdf), one};
}

template <> inline Activated activate<RELU>(__m512 x, __m512) {
    // Not a maximum, which would make a NaN 0.
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ);
    return {_mm512_maskz_mov_ps(positive, x), _mm512_maskz_mov_ps(positive, broadcast(1.0f)), broadcast(1.0f)};
}

// --- how matrices are laid out for a product

// A 16 x 16 matrix of pairs, transposed in registers.
inline void transpose(__m512i (&row)[16]) {
    __m512i other[16];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 16; half += 8) {
            other[i + half] = _mm512_shuffle_i32x4(row[i + half], row[i + half + 4], 0x88);
            other[i + half + 4] = _mm512_shuffle_i32x4(row[i + half], row[i + half + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        row[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
    }
}

// The left side of a product, in groups of at most `ROWS` rows, as even as can be.
struct Left {
    const pairs* data;
    int64_t rows;
    int64_t stride;  // from one pair of k to the next, as in a panel; 0: each group is packed by itself

    int64_t groups() const { return (rows + ROWS - 1) / ROWS; }
    int64_t begin(int64_t group) const { return group * rows / groups(); }
};

// The left side from rows [K], of which `row(m)` gives the m-th.
template <class Row> Left pack_left(int64_t rows, int64_t k_pairs, Row row, pairs* to) {
    Left left{to, rows, 0};
    for (int64_t group = 0; group < left.groups(); ++group) {
        int64_t first = left.begin(group), size = left.begin(group + 1) - first;
        for (int64_t k = 0; k < k_pairs; k += LANES) {
            __m512i block[16];
            for (int64_t m = 0; m < LANES; ++m)
                block[m] = m < size ? _mm512_loadu_si512(reinterpret_cast<const pairs*>(row(first + m)) + k)
                                    : _mm512_setzero_si512();
            transpose(block);
            // Stores of 16 where `size` are meant: what is over is written again by the next, or is room at the end.
            for (int64_t i = 0; i < LANES; ++i) _mm512_storeu_si512(to + first * k_pairs + (k + i) * size, block[i]);
        }
    }
    return left;
}

// A panel of a right side whose columns are rows [K] in memory: those from `from` on.
inline void pack_rows(const pairs* from, int64_t k_pairs, pairs* panel) {
    for (int64_t half = 0; half < PANEL; half += LANES)
        for (int64_t k = 0; k < k_pairs; k += LANES) {
            __m512i block[16];
            for (int64_t i = 0; i < LANES; ++i) {
                block[i] = _mm512_loadu_si512(from + (half + i) * k_pairs + k);
            }
            transpose(block);
            for (int64_t i = 0; i < LANES; ++i) _mm512_store_si512(panel + (k + i) * PANEL + half, block[i]);
        }
}

// A panel, 32 columns from `column` on, of rows that are the summed dimension: `row(k)` gives the k-th of `size`.
template <class Row> inline void pack_columns(int64_t size, int64_t column, Row row, pairs* panel) {
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
    };
    __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t k = 0; k < size; k += 2, panel += PANEL) {
        __m512i pair[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // an odd number of rows: 0 at the end
        for (int64_t i = 0; i < std::min<int64_t>(2, size - k); ++i) {
            pair[i] = _mm512_loadu_si512(row(k + i) + column);
        }
        _mm512_store_si512(panel, _mm512_permutex2var_epi16(pair[0], low, pair[1]));
        _mm512_store_si512(panel + LANES, _mm512_permutex2var_epi16(pair[0], high, pair[1]));
    }
}

// --- products

// Where the next panel will be packed from: a line of memory for each k of it. The products fetch them, one with every
// pair of k, and so hide the time that this takes; two groups of rows fetch all.
struct Upcoming {
    const char* line;
    int64_t step;

    Upcoming of_group(int64_t group, int64_t k_pairs) const {
        return group < 2 ? Upcoming{line + group * k_pairs * step, step} : Upcoming{line, 0};
    }
};

// `size` rows by a panel: store(m, sums of columns 0 to 15, of 16 to 31).
template <int64_t size, class Store>
inline void multiply(const pairs* left, int64_t stride, const pairs* panel, int64_t k_pairs, int64_t row,
                     Upcoming upcoming, Store& store) {
    __m512 sum[size][2];
#pragma GCC unroll 12
    for (int64_t m = 0; m < size; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < k_pairs; ++k, left += stride, panel += PANEL, upcoming.line += upcoming.step) {
        _mm_prefetch(upcoming.line, _MM_HINT_T0);
        __m512bh first = (__m512bh)_mm512_load_si512(panel), second = (__m512bh)_mm512_load_si512(panel + LANES);
#pragma GCC unroll 12
        for (int64_t m = 0; m < size; ++m) {
            __m512bh one = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[m]));
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], one, first);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], one, second);
        }
    }
#pragma GCC unroll 12
    for (int64_t m = 0; m < size; ++m) store(row + m, sum[m][0], sum[m][1]);
}

template <class Store>
void multiply_panel(const Left& left, const pairs* panel, int64_t k_pairs, Upcoming upcoming, Store store) {
    for (int64_t group = 0; group < left.groups(); ++group) {
        int64_t row = left.begin(group), size = left.begin(group + 1) - row;
        const pairs* data = left.data + (left.stride ? row : row * k_pairs);
        int64_t stride = left.stride ? left.stride : size;
        Upcoming lines = upcoming.of_group(group, k_pairs);
        static_assert(ROWS == 12, "a case for each size of a group");
        switch (size) {
            case 1: multiply<1>(data, stride, panel, k_pairs, row, lines, store); break;
            case 2: multiply<2>(data, stride, panel, k_pairs, row, lines, store); break;
            case 3: multiply<3>(data, stride, panel, k_pairs, row, lines, store); break;
            case 4: multiply<4>(data, stride, panel, k_pairs, row, lines, store); break;
            case 5: multiply<5>(data, stride, panel, k_pairs, row, lines, store); break;
            case 6: multiply<6>(data, stride, panel, k_pairs, row, lines, store); break;
            case 7: multiply<7>(data, stride, panel, k_pairs, row, lines, store); break;
            case 8: multiply<8>(data, stride, panel, k_pairs, row, lines, store); break;
            case 9: multiply<9>(data, stride, panel, k_pairs, row, lines, store); break;
            case 10: multiply<10>(data, stride, panel, k_pairs, row, lines, store); break;
            case 11: multiply<11>(data, stride, panel, k_pairs, row, lines, store); break;
            case 12: multiply<12>(data, stride, panel, k_pairs, row, lines, store); break;
        }
    }
}

// c[m][n] = sum over k of left[m][k] w[n][k], n < columns: store(m, n, sums of n to n + 15, of n + 16 to n + 31).
template <class Store>
void multiply_transposed(const Left& left, const bf16* w, int64_t columns, int64_t k_size, pairs* panel, Store store) {
    for (int64_t n = 0; n < columns; n += PANEL) {
        pack_rows(reinterpret_cast<const pairs*>(w + n * k_size), k_size / 2, panel);
        Upcoming next{reinterpret_cast<const char*>(w + (n + PANEL) * k_size), LINE};  // 32 rows of K: K lines
        multiply_panel(left, panel, k_size / 2, next, [&](int64_t m, __m512 low, __m512 high) { store(m, n, low, high); });
    }
}

// c[m][n] = sum over k of left[m][k] w[k][n], n < columns.
template <class Store>
void multiply_plain(const Left& left, const bf16* w, int64_t columns, int64_t k_size, pairs* panel, Store store) {
    for (int64_t n = 0; n < columns; n += PANEL) {
        pack_columns(k_size, n, [&](int64_t k) { return w + k * columns; }, panel);
        Upcoming next{reinterpret_cast<const char*>(w + n + PANEL), columns * static_cast<int64_t>(sizeof(bf16))};
        multiply_panel(left, panel, k_size / 2, next, [&](int64_t m, __m512 low, __m512 high) { store(m, n, low, high); });
    }
}

// c[m][n] = sum over k of left(k)[m] right(k)[n], of rows in memory, and of any number of them.
template <class LeftRow, class RightRow>
void multiply_outer(LeftRow left, int64_t height, RightRow right, int64_t width, int64_t k_size, pairs* panel,
                    pairs* right_panels, bf16* to) {
    int64_t k_pairs = (k_size + 1) / 2;
    for (int64_t n = 0; n < width; n += PANEL) pack_columns(k_size, n, right, right_panels + n * k_pairs);
    // Row by row of the result, as memory takes whole rows far faster than lines of one column after the other.
    for (int64_t row = 0; row < height; row += PANEL) {
        pack_columns(k_size, row, left, panel);
        for (int64_t n = 0; n < width; n += PANEL) {
            const pairs* of_columns = right_panels + n * k_pairs;
            Upcoming none{reinterpret_cast<const char*>(of_columns), 0};
            multiply_panel({panel, PANEL, PANEL}, of_columns, k_pairs, none, [&](int64_t m, __m512 low, __m512 high) {
                // Nobody reads it soon: past the caches, which then need not fetch the line before.
                _mm512_stream_si512(reinterpret_cast<__m512i*>(to + (row + m) * width + n), narrow(low, high));
            });
        }
    }
}

// --- one thread's memory

struct Scratch {
    pairs *panel, *left, *right;
    bf16 *active, *grad_hidden;
    float* grad_active;
    int64_t bytes;  // of all of it

    Scratch(const Call& call, int64_t most_rows, bool backward, char* base) : bytes(0) {
        int64_t inner = call.inner_size(), widest = std::max(call.d_model, inner);
        int64_t block = std::min(most_rows, BLOCK), row_pairs = (most_rows + 1) / 2;
        panel = take<pairs>(base, PANEL * std::max(widest / 2, backward ? row_pairs : 0));
        left = take<pairs>(base, block * widest / 2 + LANES);
        active = take<bf16>(base, (backward ? most_rows : block) * call.hidden_size);
        right = take<pairs>(base, backward ? row_pairs * widest : 0);
        grad_hidden = take<bf16>(base, backward ? most_rows * inner : 0);
        grad_active = take<float>(base, backward ? block * call.hidden_size : 0);
    }

    template <class T> T* take(char* base, int64_t count) {
        T* here = reinterpret_cast<T*>(base + bytes);
        bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return here;
    }
};

// --- one expert

template <Activation kind> struct Expert {
    const Call& call;
    const Scratch& scratch;
    int64_t index, first, rows;  // which expert, and which of the N rows are its

    int64_t d_model() const { return call.d_model; }
    int64_t hidden_size() const { return call.hidden_size; }
    int64_t inner_size() const { return kind == SWIGLU ? 2 * hidden_size() : hidden_size(); }
    const bf16* up() const { return call.up + index * inner_size() * d_model(); }
    const bf16* down() const { return call.down + index * d_model() * hidden_size(); }
    float weight(int64_t row) const { return call.weight ? call.weight[first + row] : 1.0f; }
    const bf16* of_token(const bf16* tokens, int64_t row) const {
        return tokens + (call.token ? call.token[first + row] : first + row) * d_model();
    }
    const bf16* hidden(int64_t row) const { return call.hidden + (first + row) * inner_size(); }

    void forward() const {
        for (int64_t start = 0; start < rows; start += BLOCK) {
            int64_t block = std::min(BLOCK, rows - start);
            auto token = [&](int64_t m) { return of_token(call.x, start + m); };
            Left left = pack_left(block, d_model() / 2, token, scratch.left);
            multiply_transposed(left, up(), inner_size(), d_model(), scratch.panel,
                                to_rows(call.hidden + (first + start) * inner_size(), inner_size()));
            for (int64_t row = 0; row < block; ++row) activate_row(start + row, scratch.active + row * hidden_size());
            auto active = [&](int64_t m) { return scratch.active + m * hidden_size(); };
            left = pack_left(block, hidden_size() / 2, active, scratch.left);
            multiply_transposed(left, down(), d_model(), hidden_size(), scratch.panel,
                                to_rows(call.y + (first + start) * d_model(), d_model()));
        }
    }

    void backward() const {
        for (int64_t start = 0; start < rows; start += BLOCK) {
            int64_t block = std::min(BLOCK, rows - start);
            auto grad = [&](int64_t m) { return of_token(call.grad, start + m); };
            Left left = pack_left(block, d_model() / 2, grad, scratch.left);
            multiply_plain(left, down(), hidden_size(), d_model(), scratch.panel,
                           [&](int64_t m, int64_t n, __m512 low, __m512 high) {
                               float* to = scratch.grad_active + m * hidden_size() + n;
                               _mm512_store_ps(to, low);
                               _mm512_store_ps(to + LANES, high);
                           });
            for (int64_t row = 0; row < block; ++row)
                activate_row_backward(start + row, scratch.grad_active + row * hidden_size());
            if (call.grad_x) {
                auto grad_hidden = [&](int64_t m) { return scratch.grad_hidden + (start + m) * inner_size(); };
                left = pack_left(block, inner_size() / 2, grad_hidden, scratch.left);
                multiply_plain(left, up(), d_model(), inner_size(), scratch.panel,
                               to_rows(call.grad_x + (first + start) * d_model(), d_model()));
            }
        }
        auto grad = [&](int64_t k) { return of_token(call.grad, k); };
        auto active = [&](int64_t k) { return scratch.active + k * hidden_size(); };
        auto grad_hidden = [&](int64_t k) { return scratch.grad_hidden + k * inner_size(); };
        auto token = [&](int64_t k) { return of_token(call.x, k); };
        if (call.grad_down) weight_grad(grad, d_model(), active, hidden_size(), call.grad_down);
        if (call.grad_up) weight_grad(grad_hidden, inner_size(), token, d_model(), call.grad_up);
    }

    // This expert's part of [E, height, width]: the sum over its rows of outer products of left(row) and right(row).
    template <class LeftRow, class RightRow>
    void weight_grad(LeftRow left, int64_t height, RightRow right, int64_t width, bf16* grad) const {
        grad += index * height * width;
        if (rows)
            multiply_outer(left, height, right, width, rows, scratch.panel, scratch.right, grad);
        else
            std::memset(grad, 0, height * width * sizeof(bf16));
    }

    // The weighted activation of one row. It takes what is stored, rounded, as the backward pass will.
    void activate_row(int64_t row, bf16* active) const {
        __m512 factor = broadcast(weight(row));
        for (int64_t f = 0; f < hidden_size(); f += LANES)
            store_narrow(active + f, _mm512_mul_ps(activated(row, f).value, factor));
    }

    // From the gradient of the second map's input, without the row's weight: what scratch keeps for the maps'
    // gradients, and the weight's gradient, which is the product of that input and this gradient.
    void activate_row_backward(int64_t row, const float* grad_active) const {
        __m512 factor = broadcast(weight(row)), grad_factor = _mm512_setzero_ps();
        bf16* grad = scratch.grad_hidden + row * inner_size();
        for (int64_t f = 0; f < hidden_size(); f += LANES) {
            __m512 above = _mm512_load_ps(grad_active + f);
            Activated here = activated(row, f);
            grad_factor = _mm512_fmadd_ps(above, here.value, grad_factor);
            store_narrow(scratch.active + row * hidden_size() + f, _mm512_mul_ps(here.value, factor));
            above = _mm512_mul_ps(above, factor);
            store_narrow(grad + f, _mm512_mul_ps(above, here.by_first));
            if (kind == SWIGLU) store_narrow(grad + hidden_size() + f, _mm512_mul_ps(above, here.by_second));
        }
        if (call.grad_weight) call.grad_weight[first + row] = _mm512_reduce_add_ps(grad_factor);
    }

    Activated activated(int64_t row, int64_t f) const {
        const bf16* at = hidden(row) + f;
        return activate<kind>(load_wide(at), kind == SWIGLU ? load_wide(at + hidden_size()) : _mm512_setzero_ps());
    }

    static auto to_rows(bf16* to, int64_t width) {
        return [=](int64_t m, int64_t n, __m512 low, __m512 high) {
            _mm512_storeu_si512(to + m * width + n, narrow(low, high));
        };
    }
};

int64_t most_rows(const Call& call) { return *std::max_element(call.counts, call.counts + call.num_experts); }

// All experts on all threads, those with most rows first.
template <Activation kind> void run_experts(const Call& call, bool backward) {
    std::vector<int64_t> first(call.num_experts), order(call.num_experts);
    for (int64_t expert = 1; expert < call.num_experts; ++expert)
        first[expert] = first[expert - 1] + call.counts[expert - 1];
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return call.counts[a] > call.counts[b]; });
    int64_t most = most_rows(call), bytes = Scratch(call, most, backward, nullptr).bytes;
#pragma omp parallel num_threads(static_cast<int>(call.threads))
    {
        Scratch scratch(call, most, backward, call.scratch + omp_get_thread_num() * bytes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t place = 0; place < call.num_experts; ++place) {
            int64_t index = order[place];
            Expert<kind> expert{call, scratch, index, first[index], call.counts[index]};
            backward ? expert.backward() : expert.forward();
        }
        _mm_sfence();  // before others read what went past the caches
    }
}

void run(const Call& call, bool backward) {
    switch (call.activation) {
        case SWIGLU: return run_experts<SWIGLU>(call, backward);
        case GELU: return run_experts<GELU>(call, backward);
        case RELU: return run_experts<RELU>(call, backward);
    }
}

}  // namespace

extern "C" int64_t moe_experts_scratch(const Call* call, int backward) {
    return Scratch(*call, most_rows(*call), backward, nullptr).bytes * call->threads;
}

extern "C" void moe_experts_forward(const Call* call) { run(*call, false); }

extern "C" void moe_experts_backward(const Call* call) { run(*call, true); }

extern "C" int64_t moe_scores_scratch(int64_t d_model, int64_t threads) {
    return threads * (PANEL * d_model / 2 + SCORED * d_model / 2 + LANES) * static_cast<int64_t>(sizeof(pairs));
}

// scores[t][o] = sum over d of x[t][d] w[o][d]. `w` has room for whole panels of rows.
extern "C" void moe_scores(int64_t tokens, int64_t d_model, int64_t outputs, const bf16* x, const bf16* w, float* scores,
                           int64_t threads, char* scratch) {
    int64_t left_size = SCORED * d_model / 2 + LANES, panel_size = PANEL * d_model / 2;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        pairs* panel = reinterpret_cast<pairs*>(scratch) + omp_get_thread_num() * (panel_size + left_size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < tokens; start += SCORED) {
            auto token = [&](int64_t m) { return x + (start + m) * d_model; };
            Left left = pack_left(std::min(SCORED, tokens - start), d_model / 2, token, panel + panel_size);
            multiply_transposed(left, w, outputs, d_model, panel, [&](int64_t m, int64_t n, __m512 low, __m512 high) {
                float* to = scores + (start + m) * outputs + n;
                uint64_t inside = outputs - n < PANEL ? (uint64_t{1} << (outputs - n)) - 1 : ~uint64_t{0};
                _mm512_mask_storeu_ps(to, static_cast<__mmask16>(inside), low);
                _mm512_mask_storeu_ps(to + LANES, static_cast<__mmask16>(inside >> LANES), high);
            });
        }
    }
}
