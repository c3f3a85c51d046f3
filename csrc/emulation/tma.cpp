// Boxes of tensors: where their numbers lie in both memories, and when they move.
#include "tma.h"

#include <cstring>

#include "global.h"

namespace attnfuse::emulation {
namespace {

constexpr uint32_t kMagic = 0x7e4502a9;

// Calls move(shared address, global address, whether it is inside the tensor) for each number of the box.
template <typename Move>
void for_each_number(const Box& box, uint32_t shared, Move move) {
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
            move(swizzled(shared + r * 128 + c * 2), is_inside ? begin + column * 2 : nullptr);
        }
    }
}

Box box_of(const TensorMap& map, const int (&at)[4], Where where) {
    Box box{unpacked(map, where), {}};
    std::memcpy(box.at, at, sizeof at);
    return box;
}

void check_box(const char* verb, uint32_t address, Where where) {
    if (address % 1024 != 0) {
        fail(
            who(*current) + " at " + place(where) + " " + verb + " a box at byte " +
            std::to_string(static_cast<int64_t>(address) - kSharedBase) + ", which is not a multiple of 1024");
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

void begin_tensor_copy(SharedAddress to, const TensorMap& map, SharedAddress address, const int (&at)[4], Where where) {
    maybe_yield();
    Thread& thread = *current;
    Block& block = *thread.block;
    Mbarrier& barrier = find_mbarrier(address, where);
    check_box("copies", to, where);
    if (!block.shared.fenced(thread, barrier.made)) {
        fail(
            who(thread) + " at " + place(where) + " gives a copy the mbarrier made at " + place(barrier.where) +
            ", after which thread " + std::to_string(barrier.made.thread) + " called no proxy_fence");
    }
    TensorCopy copy{to, box_of(map, at, where), barrier.index, barrier.phase, where};
    block.shared.begin_tensor_copy(thread, to, copy.box.bytes(), where);
    block.tensor_copies.push_back(copy);
}

bool land_some_copy(Block& block) {
    if (block.tensor_copies.empty()) {
        return false;
    }
    const uint32_t chosen = random_below(block.tensor_copies.size());
    const TensorCopy copy = block.tensor_copies[chosen];
    block.tensor_copies.erase(block.tensor_copies.begin() + chosen);
    Mbarrier& barrier = block.mbarriers[copy.mbarrier];
    ++barrier.landed;
    block.shared.land_tensor_copy(block, copy.to, copy.box.bytes(), barrier.index, barrier.landed, copy.where);
    for_each_number(copy.box, copy.to, [&](uint32_t to, const unsigned char* from) {
        unsigned char* const bytes = block.shared.bytes_at(to);
        if (from == nullptr) {
            std::memset(bytes, 0, 2);
        } else {
            global_writes.load(block.threads[0], from, 2, copy.where);
            std::memcpy(bytes, from, 2);
        }
    });
    bytes_landed(block, barrier, copy.box.bytes(), copy.where);
    return true;
}

void maybe_land_copy(Block& block) {
    if (!block.tensor_copies.empty() && random_below(4) == 0) {
        land_some_copy(block);
    }
}

void begin_tensor_store(SharedAddress from, const TensorMap& map, const int (&at)[4], Where where) {
    maybe_yield();
    Thread& thread = *current;
    check_box("stores", from, where);
    TensorStore store{from, box_of(map, at, where), false, std::make_shared<AsyncDone>(), where};
    store.done->first_thread = thread.index;
    store.done->times.resize(1);
    thread.block->shared.begin_async_read(thread, from, store.box.bytes(), store.done, where);
    thread.stores.push_back(store);
}

void commit_tensor_stores() {
    for (TensorStore& store : current->stores) {
        store.committed = true;
    }
}

void wait_for_tensor_stores() {
    yield();
    Thread& thread = *current;
    for (const TensorStore& store : thread.stores) {
        if (!store.committed) {
            continue;
        }
        for_each_number(store.box, store.from, [&](uint32_t from, unsigned char* to) {
            if (to != nullptr) {
                global_writes.store(thread, to, 2, store.where);
                std::memcpy(to, thread.block->shared.bytes_at(from), 2);
            }
        });
        store.done->complete = true;
        store.done->times[0] = thread.clock.empty() ? 0 : thread.clock[thread.index];
    }
    std::erase_if(thread.stores, [](const TensorStore& store) { return store.committed; });
}

}  // namespace attnfuse::emulation
