// Which columns a row sees, and which rows see a column. A tile's columns (or rows) are the bits of one 64-bit word,
// the same in all threads, so that empty tiles are skipped and full ones are never looked at again.
//
//     rows  # # # # # . . .      row i sees columns i + offset - left .. i + offset + right,
//      |    . # # # # # . .      less what lies beyond the source's length and holes of its key mask
//      v    . . # # # # # .
#pragma once

#include "../attention.h"
#include "global.h"
#include "thread.h"

namespace attnfuse {

using Word = uint64_t;

// index * stride in 64 bits. An index is never negative: as such it needs no second register for its sign.
__device__ __forceinline__ int64_t stride_by(int index, int64_t stride) {
    return static_cast<uint32_t>(index) * stride;
}

// Bits 0 .. count - 1.
__device__ __forceinline__ Word below(int count) {
    return count <= 0 ? 0 : count >= 64 ? ~Word{0} : (Word{1} << count) - 1;
}
// Bits from .. to - 1.
__device__ __forceinline__ Word between(int from, int to) { return below(to) & ~below(from); }

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }

// How many leading columns of the source sample b may see at all: 0 where it is absent.
__device__ __forceinline__ int source_length(const SourceParams& source, int b) {
    int length = source.columns;
    if (source.lengths != nullptr) {
        length = most(least(load_global(source.lengths + stride_by(b, 1)), length), 0);
    }
    if (source.present != nullptr && load_global(source.present + stride_by(b, 1)) == 0) {
        length = 0;
    }
    return length;
}

__device__ __forceinline__ int source_offset(const SourceParams& source, int b) {
    return source.offsets == nullptr ? source.offset : load_global(source.offsets + stride_by(b, 1));
}

// Columns start .. start + COLUMNS that the key mask lets through. Every lane of the warp asks together.
template <int COLUMNS>
__device__ __forceinline__ Word kept_keys(const SourceParams& source, int b, int start) {
    if (source.key_mask == nullptr) {
        return ~Word{0};
    }
    const uint8_t* mask = source.key_mask + stride_by(b, source.key_mask_batch);
    Word kept = 0;
#pragma unroll
    for (int part = 0; part < COLUMNS; part += 32) {
        const int j = start + part + lane_index();
        const bool keeps = j < source.columns && load_global(mask + stride_by(j, source.key_mask_column)) != 0;
        kept |= Word{ballot(keeps)} << part;
    }
    return kept;
}

// The tiles of columns that rows first .. last visit, source after source, in the order they are computed.
template <int COLUMNS>
struct ColumnTiles {
    int source = -1;  // which one; source_count when there is no more
    int start = 0;    // the tile's first column
    int end = 0;      // the source's columns from here on are seen by none of the rows
    Word seen = 0;    // bit j: column start + j is seen by some row

    template <typename Params>
    __device__ __forceinline__ bool valid(const Params& p) const {
        return source < p.shape.source_count;
    }

    // On to the next tile in which anything is seen.
    template <typename Params>
    __device__ __forceinline__ void advance(const Params& p, int b, int first, int last) {
        start += COLUMNS;
        int skipped = 0;  // leading columns of a source's first tile that a window leaves behind
        while (true) {
            while (start >= end) {
                ++source;
                if (source >= p.shape.source_count) {
                    return;
                }
                const SourceParams& s = p.sources[source];
                const int offset = source_offset(s, b), begin = most(first + offset - s.left, 0);
                end = least(last + offset + s.right + 1, source_length(s, b));
                start = begin / COLUMNS * COLUMNS;
                skipped = begin - start;
            }
            seen = kept_keys<COLUMNS>(p.sources[source], b, start) & between(skipped, least(end - start, COLUMNS));
            if (seen != 0) {
                return;
            }
            skipped = 0;
            start += COLUMNS;
        }
    }

    // Whether every row from first to last sees every column of the tile.
    __device__ __forceinline__ bool full(const SourceParams& s, int b, int first, int last) const {
        const int offset = source_offset(s, b);
        // The last row reaches least far back, the first one least far ahead.
        return seen == below(COLUMNS) && start >= last + offset - s.left &&
               start + COLUMNS <= first + offset + s.right + 1;
    }

    // Of the tile's columns, those that row i sees.
    __device__ __forceinline__ Word seen_by(const SourceParams& s, int b, int i) const {
        const int own = i + source_offset(s, b) - start;
        return seen & between(own - s.left, own + s.right + 1);
    }
};

// The tiles of rows that see columns first .. last of one source, over every query head of the key head.
template <int ROWS>
struct RowTiles {
    int head = -1;  // which query head of the group; group when there is no more
    int start = 0;  // the tile's first row
    Word live = 0;  // bit r: row start + r sees a key somewhere

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
            const Word* words = p.live + stride_by(first_head + head, p.rows_padded / 64);
            live = load_global(words + start / 64) >> (start % 64) & below(ROWS);
            if (live != 0) {
                return;
            }
            start += ROWS;
        }
    }

    // Whether every row of the tile is there and sees every column from first to last.
    __device__ __forceinline__ bool full(const SourceParams& s, int offset, int first, int last, int rows) const {
        return start >= last - offset - s.right && start + ROWS <= least(first - offset + s.left + 1, rows);
    }

    // Of the tile's rows, those that see column j.
    __device__ __forceinline__ Word seeing(const SourceParams& s, int offset, int j) const {
        const int own = j - offset - start;
        return between(own - s.right, own + s.left + 1);
    }
};

}  // namespace attnfuse
