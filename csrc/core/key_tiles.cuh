// The blocks of a backward that owns keys: a block for each tile of columns of every source, side by side, and which
// rows and columns of it see each other.
#pragma once

#include "masks.cuh"

namespace attnfuse {

// Which gradients a launch makes: where head dims are so wide that dk and dv do not fit the registers together, each
// has a launch of its own.
enum class Wanted { kBoth, kKey, kValue };

// How many blocks a key head of source s needs.
template <int COLUMNS, Wanted WANTED>
__host__ __device__ __forceinline__ int key_tiles(const BackwardParams& p, int s) {
    const BackwardSource& source = p.sources[s];
    const bool key = WANTED != Wanted::kValue && (source.grad_key.data != nullptr || p.dq_sum != nullptr);
    const bool value = WANTED != Wanted::kKey && source.grad_value.data != nullptr;
    return key || value ? (source.columns + COLUMNS - 1) / COLUMNS : 0;
}

template <int COLUMNS, Wanted WANTED>
__host__ __device__ __forceinline__ int all_key_tiles(const BackwardParams& p) {
    int tiles = 0;
    for (int s = 0; s < p.shape.source_count; ++s) {
        tiles += key_tiles<COLUMNS, WANTED>(p, s);
    }
    return tiles;
}

// What this block owns, the same in all threads.
template <int COLUMNS>
struct OwnedKeys {
    static_assert(COLUMNS <= 128);

    int source;
    int b;
    int key_head;
    int first;      // column
    int offset;     // of the source in this sample
    Word seen[2];   // bit j: column first + j is seen by some row
    bool all_seen;  // every one of COLUMNS
    int row_begin;  // the rows that see some of them
    int row_end;

    template <Wanted WANTED>
    __device__ __forceinline__ static OwnedKeys own(const BackwardParams& p) {
        OwnedKeys tile;
        const int tiles = all_key_tiles<COLUMNS, WANTED>(p);
        tile.b = block_index() / tiles / p.shape.key_heads;
        tile.key_head = block_index() / tiles % p.shape.key_heads;
        tile.source = 0;
        int of_source = block_index() % tiles;
        while (of_source >= key_tiles<COLUMNS, WANTED>(p, tile.source)) {
            of_source -= key_tiles<COLUMNS, WANTED>(p, tile.source);
            ++tile.source;
        }
        tile.first = of_source * COLUMNS;
        const BackwardSource& source = p.sources[tile.source];
        tile.offset = source_offset(source, tile.b);
        const int begin = tile.offset - source.left;
        const int end = least(source_length(source, tile.b), p.shape.rows + tile.offset + source.right);
        tile.all_seen = true;
        tile.seen[0] = tile.seen[1] = 0;
#pragma unroll
        for (int part = 0; part < COLUMNS / 64; ++part) {
            const int start = tile.first + 64 * part;
            tile.seen[part] = kept_keys<64>(source, tile.b, start) & between(begin - start, end - start);
            tile.all_seen = tile.all_seen && tile.seen[part] == ~Word{0};
        }
        tile.row_begin = most(tile.first - tile.offset - source.right, 0);
        tile.row_end = (tile.seen[0] | tile.seen[1]) == 0
                           ? 0
                           : least(least(tile.first + COLUMNS, end) - tile.offset + source.left, p.shape.rows);
        return tile;
    }

    __device__ __forceinline__ bool sees(int j) const { return (j < 64 ? seen[0] : seen[1]) >> (j % 64) & 1; }
    // Of the B Hq heads, the first of the key head's group.
    __device__ __forceinline__ int first_head(const BackwardParams& p) const {
        return b * p.shape.heads + key_head * p.shape.group;
    }
};

}  // namespace attnfuse
