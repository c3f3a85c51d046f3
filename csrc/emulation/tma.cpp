// Bulk copies: where their numbers lie in both memories, and when they move.
#include "tma.h"

#include <cstring>
#include <variant>

#include "global.h"

namespace attnfuse::emulation {
namespace {

constexpr uint32_t kMagic = 0x7e4502a9;

uint32_t bytes_of(const Region& region) {
    const Box* const box = std::get_if<Box>(&region);
    return box != nullptr ? box->map.box_rows * 128 : std::get<Stretch>(region).bytes;
}

// Calls move(shared address, global address or null outside the tensor, bytes) for each piece that lies in a row in
// both memories: the numbers of a box ...
template <typename Move>
void for_each_piece(const Box& box, uint32_t shared, Move move) {
    const TensorMapFields& map = box.map;
    for (uint32_t r = 0; r < map.box_rows; ++r) {
        const int64_t row = box.at[1] + static_cast<int64_t>(r);
        const auto inside = [](int64_t index, uint64_t size) {
            return index >= 0 && static_cast<uint64_t>(index) < size;
        };
        const bool is_row =
            inside(row, map.sizes[1]) && inside(box.at[2], map.sizes[2]) && inside(box.at[3], map.sizes[3]);
        unsigned char* const begin = is_row ? map.data + row * static_cast<int64_t>(map.strides[0]) +
                                                  box.at[2] * static_cast<int64_t>(map.strides[1]) +
                                                  box.at[3] * static_cast<int64_t>(map.strides[2])
                                            : nullptr;
        for (int c = 0; c < 64; ++c) {
            const int64_t column = box.at[0] + static_cast<int64_t>(c);
            const bool is_inside = is_row && inside(column, map.sizes[0]);
            move(swizzled(shared + r * 128 + c * 2), is_inside ? begin + column * 2 : nullptr, 2);
        }
    }
}
// ... and a stretch as a whole.
template <typename Move>
void for_each_piece(const Stretch& stretch, uint32_t shared, Move move) {
    move(shared, stretch.begin, stretch.bytes);
}
template <typename Move>
void for_each_piece(const Region& region, uint32_t shared, Move move) {
    std::visit([&](const auto& one) { for_each_piece(one, shared, move); }, region);
}

// A box's address in shared memory; a stretch's is checked by SharedMemory.
void check_box(const char* verb, const Region& region, uint32_t address, Where where) {
    if (std::holds_alternative<Box>(region) && address % 1024 != 0) {
        fail(
            who(*current) + " at " + place(where) + " " + verb + " a box at byte " +
            std::to_string(static_cast<int64_t>(address) - kSharedBase) + ", which is not a multiple of 1024");
    }
}

void add_floats(const Thread& thread, unsigned char* to, const unsigned char* from, uint32_t bytes, Where where) {
    for (uint32_t i = 0; i < bytes; i += sizeof(float)) {
        global_writes.add(thread, to + i, where, true);
        float sum, x;
        std::memcpy(&sum, to + i, sizeof sum);
        std::memcpy(&x, from + i, sizeof x);
        sum += x;
        std::memcpy(to + i, &sum, sizeof sum);
    }
}

}  // namespace

TensorMapFields make_tensor_map(
    void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3], uint32_t box_rows) {
    TensorMapFields fields{static_cast<unsigned char*>(data), {}, {}, box_rows, kMagic};
    std::memcpy(fields.sizes, sizes, sizeof sizes);
    std::memcpy(fields.strides, strides, sizeof strides);
    bool accepted = data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
    for (const uint64_t size : sizes) {
        accepted &= size >= 1 && size <= uint64_t{1} << 32;
    }
    for (const uint64_t stride : strides) {
        accepted &= stride % 16 == 0 && stride > 0 && stride < uint64_t{1} << 40;
    }
    if (!has_context) {
        fail("a tensor map was asked for in a thread that has made no device current");
    }
    if (!accepted) {
        fail("a tensor map was asked for of a tensor that no driver would make one of");
    }
    return fields;
}

TensorMap packed(const TensorMapFields& fields) {
    static_assert(sizeof fields <= sizeof(TensorMap));
    TensorMap map{};
    std::memcpy(&map, &fields, sizeof fields);
    return map;
}

TensorMapFields unpacked(const TensorMap& map, Where where) {
    TensorMapFields fields;
    std::memcpy(&fields, &map, sizeof fields);
    if (fields.magic != kMagic) {
        fail(who(*current) + " at " + place(where) + " uses a tensor map that was never made");
    }
    return fields;
}

Region region_of(const TensorMap& map, const int (&at)[4], Where where) {
    Box box{unpacked(map, where), {}};
    std::memcpy(box.at, at, sizeof at);
    return box;
}

Region region_of(const void* begin, int bytes, Where where) {
    check_aligned(begin, 16, where);
    if (bytes <= 0 || bytes % 16 != 0) {
        fail(
            who(*current) + " at " + place(where) + " moves " + std::to_string(bytes) +
            " bytes, which is not a positive multiple of 16");
    }
    // Only stores and additions write there, which were given a pointer to what is not const.
    return Stretch{static_cast<unsigned char*>(const_cast<void*>(begin)), static_cast<uint32_t>(bytes)};
}

void begin_bulk_copy(SharedAddress to, const Region& region, SharedAddress address, Where where) {
    maybe_yield();
    Thread& thread = *current;
    Block& block = *thread.block;
    Mbarrier& barrier = find_mbarrier(address, where);
    check_box("copies", region, to, where);
    if (!block.shared.fenced(thread, barrier.made)) {
        fail(
            who(thread) + " at " + place(where) + " gives a copy the mbarrier made at " + place(barrier.where) +
            ", after which thread " + std::to_string(barrier.made.thread) + " called no proxy_fence");
    }
    block.shared.begin_bulk_copy(thread, to, bytes_of(region), where);
    block.bulk_copies.push_back({to, region, barrier.index, barrier.phase, where});
}

bool land_some_copy(Block& block) {
    if (block.bulk_copies.empty()) {
        return false;
    }
    const uint32_t chosen = random_below(block.bulk_copies.size());
    const BulkCopy copy = block.bulk_copies[chosen];
    block.bulk_copies.erase(block.bulk_copies.begin() + chosen);
    Mbarrier& barrier = block.mbarriers[copy.mbarrier];
    ++barrier.landed;
    const uint32_t all = bytes_of(copy.region);
    block.shared.land_bulk_copy(block, copy.to, all, barrier.index, barrier.landed, copy.where);
    for_each_piece(copy.region, copy.to, [&](uint32_t to, const unsigned char* from, uint32_t bytes) {
        if (from == nullptr) {
            std::memset(block.shared.bytes_at(to), 0, bytes);
        } else {
            global_writes.load(block.threads[0], from, bytes, copy.where);
            std::memcpy(block.shared.bytes_at(to), from, bytes);
        }
    });
    bytes_landed(block, barrier, all, copy.where);
    return true;
}

void maybe_land_copy(Block& block) {
    if (!block.bulk_copies.empty() && random_below(4) == 0) {
        land_some_copy(block);
    }
}

void begin_bulk_store(SharedAddress from, const Region& region, bool adds, Where where) {
    maybe_yield();
    Thread& thread = *current;
    start_clocks(*thread.block);
    check_box("stores", region, from, where);
    BulkStore store{from, region, adds, false, std::make_shared<AsyncDone>(), where};
    store.done->first_thread = thread.index;
    store.done->times.resize(1);
    thread.block->shared.begin_async_read(thread, from, bytes_of(region), store.done, where);
    thread.stores.push_back(store);
}

void commit_bulk_stores() {
    for (BulkStore& store : current->stores) {
        store.committed = true;
    }
}

void wait_for_bulk_stores() {
    yield();
    Thread& thread = *current;
    for (const BulkStore& store : thread.stores) {
        if (!store.committed) {
            continue;
        }
        for_each_piece(store.region, store.from, [&](uint32_t from, unsigned char* to, uint32_t bytes) {
            const unsigned char* const numbers = thread.block->shared.bytes_at(from);
            if (store.adds) {
                add_floats(thread, to, numbers, bytes, store.where);
            } else if (to != nullptr) {
                global_writes.store(thread, to, bytes, store.where, true);
                std::memcpy(to, numbers, bytes);
            }
        });
        store.done->complete = true;
        store.done->times[0] = thread.clock[thread.index];
    }
    std::erase_if(thread.stores, [](const BulkStore& store) { return store.committed; });
}

}  // namespace attnfuse::emulation
