// What a block of sm_90 works on: items of rows, one after another, and for each the stream of tiles of columns that
// one warp plans and copies, and the others compute.
#pragma once

#include "../core/key_tiles.cuh"
#include "shared.h"
#include "tma.h"

namespace attnfuse::sm90 {

// Params, with the maps of all tensors beside them; only the copying warp knows that there is more than one source.
struct ForwardArguments : ForwardParams {
    TensorMap query_map;
    TensorMap out_map;
    TensorMap key_maps[kMaxSources];
    TensorMap value_maps[kMaxSources];
    int32_t tiles = 0;    // of rows, of a head
    int32_t section = 0;  // heads whose keys and values are walked side by side
};
static_assert(sizeof(ForwardArguments) <= 4096, "more than a kernel's params may be before CUDA 12.1");

// The backward's, likewise. More than 4096 bytes: launchers.cpp asks the driver.
struct BackwardArguments : BackwardParams {
    TensorMap query_map;
    TensorMap grad_out_map;
    TensorMap grad_query_map;
    TensorMap key_maps[kMaxSources];
    TensorMap value_maps[kMaxSources];
    TensorMap grad_key_maps[kMaxSources];
    TensorMap grad_value_maps[kMaxSources];
    int32_t tiles = 0;
    int32_t section = 0;
};
static_assert(sizeof(BackwardArguments) <= 32764, "more than a kernel's params may be since CUDA 12.1");
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201
#error "Hopper's kernels need nvcc 12.1 or later: TORCH_CUDA_ARCH_LIST without 9.0 leaves them out"
#endif

// ROWS rows of one head.
struct Item {
    int head;  // of the B Hq
    int first;
};

// The items of a block of a persistent grid. Sections of heads, as many as share the L2 cache, come one after another;
// in each the last rows of all heads come first, since under a causal mask they have the most to do. Blocks take items
// in turns, forwards and backwards, so that what each has to do adds up to nearly the same:
//
//     block      0   1   2         item in the order of falling cost
//     round 0    0   1   2
//     round 1    5   4   3
//     round 2    6   7   8
struct Items {
    int round = 0;

    __device__ __forceinline__ int number() const {
        const int turn = round % 2 == 0 ? block_index() : block_count() - 1 - block_index();
        return round * block_count() + turn;
    }
    template <typename Arguments>
    __device__ __forceinline__ bool valid(const Arguments& p) const {
        return number() < p.tiles * p.shape.heads * p.shape.batch;
    }
    template <int ROWS, typename Arguments>
    __device__ __forceinline__ Item item(const Arguments& p) const {
        const int section = number() / (p.section * p.tiles), within = number() % (p.section * p.tiles);
        const int begin = section * p.section;
        const int heads = least(p.section, p.shape.heads * p.shape.batch - begin);
        return {begin + within % heads, (p.tiles - 1 - within / heads) * ROWS};
    }
};

// A tile of columns as it is told to the computing warps: 32 bytes of shared memory.
struct Told {
    static constexpr uint32_t kSource = 0xff, kFull = 1 << 8, kEndsSource = 1 << 9, kEndsItem = 1 << 10,
                              kEmpty = 1 << 11;
    static constexpr int kBytes = 32;

    uint32_t flags;
    int lower, upper;  // row i sees the columns from i + lower to i + upper - 1 of the tile, less those not seen
    Word seen[2];      // bit j: column j is seen by some row

    __device__ __forceinline__ void store(SharedAddress to) const {
        store_shared_128(to, {flags, static_cast<uint32_t>(lower), static_cast<uint32_t>(upper), 0});
        store_shared_128(
            to + 16, {static_cast<uint32_t>(seen[0]), static_cast<uint32_t>(seen[0] >> 32),
                      static_cast<uint32_t>(seen[1]), static_cast<uint32_t>(seen[1] >> 32)});
    }
    __device__ __forceinline__ static uint32_t load_flags(SharedAddress from) { return load_shared_16(from); }
    // What only tiles that are not full need.
    __device__ __forceinline__ void load_columns(SharedAddress from) {
        const Words4 words = load_shared_128(from);
        lower = static_cast<int>(words.word[1]);
        upper = static_cast<int>(words.word[2]);
        load_seen(from);
    }
    __device__ __forceinline__ void load_seen(SharedAddress from) {
        const Words4 words = load_shared_128(from + 16);
        seen[0] = words.word[0] | static_cast<Word>(words.word[1]) << 32;
        seen[1] = words.word[2] | static_cast<Word>(words.word[3]) << 32;
    }
    // Of columns 64 part .. + 64 of the tile, those that row i sees.
    __device__ __forceinline__ Word seen_by(int i, int part) const {
        return seen[part] & between(i + lower - 64 * part, i + upper - 64 * part);
    }
};

// The tiles of up to 128 columns that rows first .. last visit, source after source: masks.cuh's ColumnTiles, but for
// where a source's first tile begins, which a tensor copy leaves free.
template <int COLUMNS>
struct WideColumnTiles {
    static_assert(COLUMNS % 16 == 0 && COLUMNS <= 128);

    int source = -1;
    int start = 0;
    int end = 0;
    Word seen[2] = {0, 0};

    template <typename Arguments>
    __device__ __forceinline__ bool valid(const Arguments& p) const {
        return source < p.shape.source_count;
    }

    template <typename Arguments>
    __device__ __forceinline__ void advance(const Arguments& p, int b, int first, int last) {
        start += COLUMNS;
        while (true) {
            while (start >= end) {
                ++source;
                if (source >= p.shape.source_count) {
                    return;
                }
                const SourceParams& s = p.sources[source];
                const int offset = source_offset(s, b);
                start = most(first + offset - s.left, 0);
                end = least(last + offset + s.right + 1, source_length(s, b));
            }
            const SourceParams& s = p.sources[source];
            seen[0] = kept_keys<64>(s, b, start) & below(least(end - start, COLUMNS));
            seen[1] = COLUMNS > 64 ? kept_keys<64>(s, b, start + 64) & below(least(end - start, COLUMNS) - 64) : 0;
            if ((seen[0] | seen[1]) != 0) {
                return;
            }
            start += COLUMNS;
        }
    }

    // Whether columns that the copy brings along are seen by none of the rows: what they hold must not be computed
    // with.
    template <typename Arguments>
    __device__ __forceinline__ bool brings_unseen(const Arguments& p) const {
        const int there = least(p.sources[source].columns - start, COLUMNS);
        return seen[0] != below(there) || seen[1] != below(there - 64);
    }

    // All but what depends on the tile after.
    template <typename Arguments>
    __device__ __forceinline__ Told told(const Arguments& p, int b, int first, int last) const {
        const SourceParams& s = p.sources[source];
        const int offset = source_offset(s, b);
        const int lower = offset - s.left - start, upper = offset + s.right + 1 - start;
        // The last row reaches least far back, the first one least far ahead.
        const bool full = !p.shape.logits.prepared && seen[0] == below(COLUMNS) && seen[1] == below(COLUMNS - 64) &&
                          last + lower <= 0 && first + upper >= COLUMNS;
        return {static_cast<uint32_t>(source) | (full ? Told::kFull : 0), lower, upper, {seen[0], seen[1]}};
    }
};

// Zeros in the rows of a tile (ROWS, 64 BOXES) that are not kept, by a warp, four at a time: where in its row a chunk
// stands does not matter.
template <int ROWS, int BOXES>
__device__ __forceinline__ void clear_rows(SharedAddress tile, const Word (&kept)[2]) {
#pragma unroll 1
    for (int row = lane_index() / 8; row < ROWS; row += 4) {
        if (!((row < 64 ? kept[0] : kept[1]) >> (row % 64) & 1)) {
#pragma unroll
            for (int box = 0; box < BOXES; ++box) {
                store_shared_128(tile + box * ROWS * 128 + row * 128 + lane_index() % 8 * 16, {});
            }
        }
    }
}

// Bits start .. start + 63 of a row of words, and 0 behind its end.
__device__ __forceinline__ Word bits_from(const Word* words, int count, int start) {
    const int word = start / 64, within = start % 64;
    const auto load = [&](int i) { return i < count ? load_global(words + i) : Word{0}; };
    return within == 0 ? load(word) : load(word) >> within | load(word + 1) << (64 - within);
}

// The tiles of up to 128 rows that see a block's columns, over every query head of the key head: masks.cuh's RowTiles,
// but for tiles that begin on any multiple of ROWS.
template <int ROWS>
struct WideRowTiles {
    static_assert(ROWS % 16 == 0 && ROWS <= 128);

    int head = -1;  // which query head of the group; group when there is no more
    int start = 0;
    Word live[2] = {0, 0};  // bit r: row start + r sees a key somewhere

    __device__ __forceinline__ bool valid(const BackwardParams& p) const { return head < p.shape.group; }

    // On to the next tile of rows lo .. hi - 1 with one that lives. first_head is the group's first, of the B Hq.
    __device__ __forceinline__ void advance(const BackwardParams& p, int first_head, int lo, int hi) {
        start += ROWS;
        while (true) {
            while (head < 0 || start >= hi) {
                ++head;
                if (head >= p.shape.group || lo >= hi) {
                    head = p.shape.group;
                    return;
                }
                start = lo / ROWS * ROWS;
            }
            const int count = p.rows_padded / 64;
            const Word* words = p.live + stride_by(first_head + head, count);
            live[0] = bits_from(words, count, start) & below(ROWS);
            live[1] = ROWS > 64 ? bits_from(words, count, start + 64) & below(ROWS - 64) : 0;
            if ((live[0] | live[1]) != 0) {
                return;
            }
            start += ROWS;
        }
    }

    // Whether the copy brings rows along that are dead: what they hold must not be computed with.
    __device__ __forceinline__ bool brings_dead(const BackwardParams& p) const {
        const int there = least(p.shape.rows - start, ROWS);
        return live[0] != below(there) || live[1] != below(there - 64);
    }

    // Whether every row of the tile sees every column of the block; rows past the last count as if they did, since
    // their lse is +inf.
    template <int COLUMNS>
    __device__ __forceinline__ bool full(const BackwardParams& p, const OwnedKeys<COLUMNS>& mine) const {
        const SourceParams& s = p.sources[mine.source];
        return mine.all_seen && start >= mine.first + COLUMNS - 1 - mine.offset - s.right &&
               start + ROWS <= mine.first - mine.offset + s.left + 1;
    }
};

}  // namespace attnfuse::sm90
