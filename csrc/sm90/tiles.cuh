// What a block of sm_90 works on: items of rows, one after another, and for each the stream of tiles of columns that
// one warp plans and copies, and the others compute.
#pragma once

#include "../core/masks.cuh"
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
    __device__ __forceinline__ bool valid(const ForwardArguments& p) const {
        return number() < p.tiles * p.shape.heads * p.shape.batch;
    }
    template <int ROWS>
    __device__ __forceinline__ Item item(const ForwardArguments& p) const {
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
    static_assert(COLUMNS > 64 && COLUMNS <= 128);

    int source = -1;
    int start = 0;
    int end = 0;
    Word seen[2] = {0, 0};

    __device__ __forceinline__ bool valid(const ForwardArguments& p) const { return source < p.shape.source_count; }

    __device__ __forceinline__ void advance(const ForwardArguments& p, int b, int first, int last) {
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
            seen[1] = kept_keys<64>(s, b, start + 64) & below(least(end - start, COLUMNS) - 64);
            if ((seen[0] | seen[1]) != 0) {
                return;
            }
            start += COLUMNS;
        }
    }

    // Whether columns that the copy brings along are seen by none of the rows: what they hold must not be computed
    // with.
    __device__ __forceinline__ bool brings_unseen(const ForwardArguments& p) const {
        const int there = least(p.sources[source].columns - start, COLUMNS);
        return seen[0] != below(there) || seen[1] != below(there - 64);
    }

    // All but what depends on the tile after.
    __device__ __forceinline__ Told told(const ForwardArguments& p, int b, int first, int last) const {
        const SourceParams& s = p.sources[source];
        const int offset = source_offset(s, b);
        const int lower = offset - s.left - start, upper = offset + s.right + 1 - start;
        // The last row reaches least far back, the first one least far ahead.
        const bool full = !p.shape.logits.prepared && seen[0] == below(COLUMNS) && seen[1] == below(COLUMNS - 64) &&
                          last + lower <= 0 && first + upper >= COLUMNS;
        return {static_cast<uint32_t>(source) | (full ? Told::kFull : 0), lower, upper, {seen[0], seen[1]}};
    }
};

}  // namespace attnfuse::sm90
