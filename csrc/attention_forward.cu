// The host side of attention's forward: how the work is cut, checks, and the kernel of a head_dim and a dtype.
#include "attention_forward.cuh"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>

#include "attention.h"
#include "host.h"

namespace attention {

struct Plan {
    int rows, warps, units_a_block, splits, items_a_block;
    int64_t shared;
};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32 rows an item where that leaves every multiprocessor four, heads side by side in a block until it has four items,
// and warps until a multiprocessor has as many as registers allow. Blocks share a head where that shortens the time,
// counted in items that a warp does one after another, and one more for a block's keys and values.
static Plan plan_forward(int64_t units, int64_t group, int64_t n_q, int64_t n_k, int64_t head_dim, int64_t processors,
                         int64_t limit) {
    Plan plan;
    const int64_t most = head_dim > 64 && head_dim <= 80 ? MAX_WARPS<80> : MAX_WARPS<64>;
    const int64_t keys = 4 * ceil_div(n_k, 8) * 8 * head_dim;  // bytes of the keys and values of a head
    const int64_t large = group * ceil_div(n_q, 32);
    const bool wide = head_dim <= 64 && n_q > 16 && (large >= 4 || n_k <= 64) && units * large >= 4 * processors &&
                      keys + 8 * 64 * head_dim <= limit;
    plan.rows = wide ? 32 : 16;
    const int64_t each = group * ceil_div(n_q, plan.rows);
    const int64_t queries = 2 * plan.rows * head_dim;  // bytes of a warp's
    plan.units_a_block = 1;
    if (each < 4) {  // of a third of a multiprocessor's shared memory at most
        const int64_t fit = (limit / 3 - 4 * queries) / keys;
        const int64_t filled = units / (3 * processors);
        plan.units_a_block = int(std::max<int64_t>(1, std::min({ceil_div(4, each), fit, filled})));
    }
    const int64_t items = plan.units_a_block * each;
    const int64_t held = plan.units_a_block * keys;
    // Blocks of a multiprocessor, which has 1 KiB more than a block may have and takes as much of each.
    const auto resident = [&](int64_t warps) {
        return std::max<int64_t>(1, std::min(most / warps, (limit + 1024) / (held + warps * queries + 1024)));
    };
    int64_t warps = 4;
    for (const int64_t more : {int64_t(6), int64_t(8), most}) {
        if (resident(warps) * warps < most && held + more * queries <= limit) warps = more;
    }
    warps = std::max<int64_t>(1, std::min({warps, items, (limit - held) / queries}));
    int64_t share = items;
    if (plan.units_a_block == 1) {
        const int64_t slots = processors * resident(warps);
        int64_t least = INT64_MAX;
        for (int64_t splits = 1; splits <= ceil_div(items, warps); ++splits) {
            const int64_t time = ceil_div(units * splits, slots) * (1 + ceil_div(ceil_div(items, splits), warps));
            if (time < least) {
                least = time;
                share = ceil_div(items, splits);
            }
        }
        if (least == 2) share = std::clamp(ceil_div(units * items, processors), std::min<int64_t>(4, share), share);
    }
    plan.items_a_block = int(share);
    plan.splits = int(ceil_div(items, share));
    plan.warps = int(ceil_div(share, ceil_div(share, warps)));  // no more than those rounds need
    plan.shared = held + plan.warps * queries;
    return plan;
}

template <int D, class T>
static void run(const Forward<T>& p, const Plan& plan, cudaStream_t stream) {
    const int64_t blocks = ceil_div(p.units, plan.units_a_block) * plan.splits;
    launch(attention_forward_kernel<D, T>, dim3(unsigned(blocks)), dim3(plan.warps * 32), plan.shared, stream, p);
}

template <class T, int... Dims>
static void run_width(int64_t head_dim, const Forward<T>& p, const Plan& plan, cudaStream_t stream) {
    const bool found = ((head_dim == Dims && (run<Dims>(p, plan, stream), true)) || ...);
    require(found, "attention_forward: no kernel for head_dim ", head_dim);
}

}  // namespace attention

int64_t attention_shared_limit(int device) { return shared_limit(device); }

std::tuple<int, int, int, int, int64_t> attention_forward_plan(int64_t batch, int64_t heads, int64_t kv_heads,
                                                               int64_t n_q, int64_t n_k, int64_t head_dim,
                                                               int processors, int64_t limit) {
    const attention::Plan plan =
        attention::plan_forward(batch * kv_heads, heads / kv_heads, n_q, n_k, head_dim, processors, limit);
    return {plan.rows, plan.warps, plan.units_a_block, plan.splits, plan.shared};
}

void attention_forward(Pointer q, Pointer k, Pointer v, Pointer o, Pointer lse, int64_t batch, int64_t heads,
                       int64_t kv_heads, int64_t n_q, int64_t n_k, int64_t head_dim, HeadStrides stride_q,
                       HeadStrides stride_k, HeadStrides stride_v, HeadStrides stride_o, double scale, int processors,
                       int dtype, int device, Pointer stream) {
    using namespace attention;
    const char* op = "attention_forward";
    require(batch > 0 && heads > 0 && n_q > 0 && n_k > 0, op, ": sizes must be positive, got batch ", batch, ", heads ",
            heads, ", n_q ", n_q, ", n_k ", n_k);
    require(head_dim % 8 == 0 && head_dim >= 32 && head_dim <= 128, op,
            ": head_dim must be a multiple of 8 from 32 to 128, got ", head_dim);
    require(kv_heads > 0 && heads % kv_heads == 0, op, ": kv_heads must divide heads ", heads, ", got ", kv_heads);
    require(dtype == Float16 || dtype == BFloat16, op, ": dtype must be 1 (float16) or 2 (bfloat16), got ", dtype);
    require(std::isfinite(scale), op, ": scale must be finite, got ", scale);
    require((q | k | v | o) % 16 == 0, op, ": q, k, v and o must be aligned to 16 bytes");
    for (const HeadStrides& strides : {stride_q, stride_k, stride_v, stride_o}) {
        for (int i = 0; i < 3; ++i) {
            require(strides[i] % 8 == 0, op, ": strides must be multiples of 8, got ", strides[i]);
        }
    }
    DeviceGuard guard(device);
    const int64_t limit = shared_limit(device);
    const int64_t units = batch * kv_heads;
    require(n_q < 1 << 30 && n_k < 1 << 30 && batch * heads * (n_q / 16 + 1) < int64_t(1) << 31, op,
            ": too many rows: batch ", batch, ", heads ", heads, ", n_q ", n_q);
    const Plan plan = plan_forward(units, heads / kv_heads, n_q, n_k, head_dim, std::max(1, processors), limit);
    require(plan.shared <= limit, op, ": ", n_k, " keys of ", head_dim, " columns do not fit in ", limit, " bytes");

    auto strides = [](const HeadStrides& s) { return Strides{s[0], s[1], s[2]}; };
    auto start = [&]<class T>(T) {
        Forward<T> p = {};
        p.q = at<const T>(q);
        p.k = at<const T>(k);
        p.v = at<const T>(v);
        p.o = at<T>(o);
        p.lse = at<float>(lse);
        p.stride_q = strides(stride_q);
        p.stride_k = strides(stride_k);
        p.stride_v = strides(stride_v);
        p.stride_o = strides(stride_o);
        p.kv_heads = int(kv_heads);
        p.group = int(heads / kv_heads);
        p.n_q = int(n_q);
        p.n_k = int(n_k);
        p.units = int(units);
        p.units_a_block = plan.units_a_block;
        p.splits = plan.splits;
        p.rows = plan.rows;
        p.tiles = int(ceil_div(n_q, plan.rows));
        p.items_a_block = plan.items_a_block;
        p.scale = std::max(float(std::fabs(scale) * LOG2E), FLT_MIN);  // never 0, by which a hidden score is NaN
        p.negate = scale < 0;
        run_width<T, MMFAST_HEAD_DIMS>(head_dim, p, plan, as_stream(stream));
    };
    if (dtype == Float16) {
        start(__half{});
    } else {
        start(__nv_bfloat16{});
    }
}
