// Products of a warpgroup, a warp's 16 rows at a time: the four warps need not issue a product at one moment.
#include "wgmma.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace attnfuse::emulation {
namespace {

struct Named {
    const Registers* registers;
    int count;
    int pending;
    Where where;
};

struct Issued {
    ProductOperands operands;
    Where where;
};

// Not the NaN of unwritten memory or of a conversion, so that a register which was written is told from one that waits.
constexpr uint32_t kWaiting = 0x7fa5a5a5;

uint64_t hash(const void* begin, std::size_t bytes) {
    uint64_t sum = 0x9e3779b97f4a7c15u;
    for (std::size_t i = 0; i < bytes; i += 4) {
        uint32_t word;
        std::memcpy(&word, static_cast<const unsigned char*>(begin) + i, 4);
        sum = (sum ^ word) * 0x100000001b3u;
        sum ^= sum >> 29;
    }
    return sum;
}

// Whether a fence has named these registers, and nothing has been written to any that it named with them.
bool is_fenced(const Thread& thread, const void* begin, std::size_t bytes) {
    const auto* const first = static_cast<const unsigned char*>(begin);
    for (const FencedRegisters& range : thread.fenced) {
        const auto* const start = static_cast<const unsigned char*>(range.begin);
        if (first >= start && first + bytes <= start + range.bytes) {
            return hash(range.begin, range.bytes) == range.hash;
        }
    }
    return false;
}

[[noreturn]] void complain(const Thread& thread, Where where, const std::string& what) {
    fail(who(thread) + " at " + place(where) + " " + what);
}

struct Layout {
    uint32_t start, leading, stride;
};

Layout decoded(const Thread& thread, uint64_t descriptor, Where where) {
    if (descriptor >> 62 != 1) {
        complain(thread, where, "issues a product of a matrix whose descriptor is not of the 128-byte swizzle");
    }
    if ((descriptor >> 49 & 7) != 0) {
        complain(thread, where, "issues a product of a matrix whose atoms do not begin on 1024 bytes");
    }
    return {
        static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4,
        static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4};
}

// Where 8 numbers of one row of 128 bytes are: of row r of K-major operands, at k = 0 or 8 ...
uint32_t along_k(const Layout& at, int r, int k) {
    return swizzled(at.start + r / 8 * at.stride + r % 8 * 128 + k * 2);
}
// ... and of row k of an M- or N-major one, at column i.
uint32_t across_k(const Layout& at, int k, int i) {
    return swizzled(at.start + i / 64 * at.leading + k / 8 * at.stride + k % 8 * 128 + i % 64 * 2);
}

// Nobody may write to what the product reads until it is done. Atoms of eight rows count as a whole: of each row a
// product reads 32 bytes, and nothing but the same operand lies between them.
class Reads {
  public:
    Reads(Thread& thread, const Product& product) : thread_(thread), product_(product) {}
    void add_atom(uint32_t address) {
        if (address != begin_ + bytes_) {
            begin();
            begin_ = address;
            bytes_ = 0;
        }
        bytes_ += 1024;
    }

    // The last stretch; others begin as soon as they end.
    void begin() {
        if (bytes_ != 0) {
            const uint32_t bytes = std::exchange(bytes_, 0);
            thread_.block->shared.begin_async_read(thread_, begin_, bytes, product_.done, product_.where);
        }
    }

  private:
    Thread& thread_;
    const Product& product_;
    uint32_t begin_ = 0;
    uint32_t bytes_ = 0;
};

// A K-major operand of so many rows.
void read_along_k(Reads& reads, const Layout& at, int rows) {
    for (int r = 0; r < rows; r += 8) {
        reads.add_atom((at.start + r / 8 * at.stride) & ~1023u);
    }
}

// An M- or N-major operand of so many columns, called `name`.
void read_across_k(
    Reads& reads, const Thread& thread, const Product& product, const Layout& at, int columns, const char* name) {
    for (int i = 0; i < columns; i += 64) {
        for (int k = 0; k < 16; k += 8) {
            const uint32_t begin = at.start + i / 64 * at.leading + k / 8 * at.stride;
            if (begin % 1024 != 0) {
                complain(
                    thread, product.where,
                    std::string("issues a product whose ") + name + " operand has atoms off 1024 bytes");
            }
            reads.add_atom(begin);
        }
    }
}

void begin_reads(Thread& thread, const Product& product, int columns) {
    Reads reads(thread, product);
    const Layout b = decoded(thread, product.b, product.where);
    if (product.form.b_along_n) {
        read_across_k(reads, thread, product, b, columns, "right");
    } else {
        read_along_k(reads, b, columns);
    }
    // All 64 rows of A: nothing says which warp's part of the product reads which.
    if (product.form.a_along_m) {
        read_across_k(reads, thread, product, decoded(thread, product.a, product.where), 64, "left");
    } else if (!product.form.a_in_registers) {
        read_along_k(reads, decoded(thread, product.a, product.where), 64);
    }
    reads.begin();
}

// The four warps of a warpgroup issue the same products in the same order.
void log_product(Warp& warp, const Product& product, int columns) {
    const Thread& thread = warp.threads[0];
    Block& block = *thread.block;
    WarpgroupLog& log = block.products[thread.index / 128];
    const int64_t number = warp.products.count++;
    const auto index = static_cast<std::size_t>(number - log.first);
    if (index == log.entries.size()) {
        log.entries.push_back({product.a, product.b, columns, product.form, product.accumulate, product.where});
    } else {
        const WarpgroupLog::Entry& first = log.entries[index];
        if (first.a != product.a || first.b != product.b || first.columns != columns || first.form != product.form ||
            first.accumulate != product.accumulate || first.where.line() != product.where.line()) {
            complain(
                thread, product.where,
                "issues another product than the other warps of its warpgroup at " + place(first.where));
        }
    }
    int64_t least = number + 1;
    for (int i = 0; i < 4; ++i) {
        const std::size_t at = thread.index / 128 * 4 + i;
        if (at >= block.warps.size()) {
            complain(thread, product.where, "issues a product in a warpgroup of fewer than four warps");
        }
        least = std::min(least, block.warps[at].products.count);
    }
    for (; log.first < least; ++log.first) {
        log.entries.pop_front();
    }
}

std::shared_ptr<Accumulators> accumulators_of(Warp& warp, int columns, Where where) {
    const auto d = [&](int lane) { return static_cast<Issued*>(warp.arguments[lane])->operands.d; };
    WarpProducts& products = warp.products;
    for (const auto& held : products.accumulators) {
        if (held->lanes[0] == d(0)) {
            if (held->count != columns / 2 || held->products == 0) {
                complain(
                    warp.threads[0], where,
                    "issues a product to registers of the product issued at " + place(held->where) +
                        (held->products == 0 ? ", which no wgmma_wait has named since"
                                             : ", which is of another shape"));
            }
            return held;
        }
    }
    auto made = std::make_shared<Accumulators>();
    made->count = columns / 2;
    made->where = where;
    for (int lane = 0; lane < 32; ++lane) {
        if (!is_fenced(warp.threads[lane], d(lane), columns / 2 * sizeof(float))) {
            complain(
                warp.threads[lane], where,
                "issues a product to registers that no wgmma_fence has named since they were last touched");
        }
        made->lanes[lane] = d(lane);
        made->values.insert(made->values.end(), d(lane), d(lane) + columns / 2);
        std::fill(d(lane), d(lane) + columns / 2, std::bit_cast<float>(kWaiting));
    }
    products.accumulators.push_back(made);
    return made;
}

void execute_issue(Warp& warp) {
    const auto& [operands, where] = *static_cast<Issued*>(warp.arguments[0]);
    Product product;
    product.form = operands.form;
    product.accumulate = operands.accumulate;
    product.is_bf16 = operands.is_bf16;
    product.a = operands.a;
    product.b = operands.b;
    product.where = where;
    product.done = std::make_shared<AsyncDone>();
    product.done->first_thread = warp.threads[0].index;
    product.done->times.resize(32);
    for (int lane = 0; lane < 32; ++lane) {
        const ProductOperands& mine = static_cast<Issued*>(warp.arguments[lane])->operands;
        const Thread& thread = warp.threads[lane];
        if (mine.a != operands.a || mine.b != operands.b || mine.form != operands.form ||
            mine.accumulate != operands.accumulate) {
            complain(thread, where, "issues another product than the other lanes of its warp");
        }
        if (product.form.a_in_registers) {
            if (!is_fenced(thread, mine.a_registers, 4 * sizeof(uint32_t))) {
                complain(
                    thread, where,
                    "issues a product of registers that no wgmma_fence has named since they were last touched");
            }
            product.lanes[lane] = mine.a_registers;
            product.values.insert(product.values.end(), mine.a_registers, mine.a_registers + 4);
        }
    }
    product.to = accumulators_of(warp, operands.columns, where);
    ++product.to->products;
    log_product(warp, product, operands.columns);
    begin_reads(*current, product, operands.columns);
    warp.products.issued.push_back(std::move(product));
    ++warp.products.uncommitted;
}

template <typename T>
void read_numbers(float (&to)[8], const unsigned char* from) {
    uint32_t words[4];
    std::memcpy(words, from, sizeof words);
    for (int i = 0; i < 4; ++i) {
        const Pair pair = unpack<T>(words[i]);
        to[2 * i] = pair.low;
        to[2 * i + 1] = pair.high;
    }
}

template <typename T>
void compute(Warp& warp, const Product& product) {
    Thread& thread = warp.threads[0];
    SharedMemory& shared = thread.block->shared;
    // This warp's 16 rows of A.
    float a[16][16], numbers[8];
    const int first = 16 * (thread.index / 32 % 4);
    if (product.form.a_in_registers) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int part = 0; part < 4; ++part) {
                const Pair pair = unpack<T>(product.values[4 * lane + part]);
                float* const to = &a[lane / 4 + part % 2 * 8][2 * (lane % 4) + part / 2 * 8];
                to[0] = pair.low;
                to[1] = pair.high;
            }
        }
    } else {
        const Layout at = decoded(thread, product.a, product.where);
        for (int i = 0; i < 32; ++i) {
            if (product.form.a_along_m) {
                const int k = i / 2, row = i % 2 * 8;
                read_numbers<T>(numbers, shared.bytes_at(across_k(at, k, first + row)));
                for (int r = 0; r < 8; ++r) {
                    a[row + r][k] = numbers[r];
                }
            } else {
                const int row = i / 2, k = i % 2 * 8;
                read_numbers<T>(
                    reinterpret_cast<float (&)[8]>(a[row][k]), shared.bytes_at(along_k(at, first + row, k)));
            }
        }
    }
    // B eight columns at a time
    const Layout at = decoded(thread, product.b, product.where);
    Accumulators& to = *product.to;
    for (int n = 0; n < to.count / 4; ++n) {
        float b[16][8];
        for (int i = 0; i < 16; ++i) {
            if (product.form.b_along_n) {
                read_numbers<T>(b[i], shared.bytes_at(across_k(at, i, 8 * n)));
            } else {
                read_numbers<T>(numbers, shared.bytes_at(along_k(at, 8 * n + i / 2, i % 2 * 8)));
                for (int k = 0; k < 8; ++k) {
                    b[i % 2 * 8 + k][i / 2] = numbers[k];
                }
            }
        }
        for (int row = 0; row < 16; ++row) {
            float sums[8] = {};
            for (int k = 0; k < 16; ++k) {
                for (int c = 0; c < 8; ++c) {
                    sums[c] += a[row][k] * b[k][c];
                }
            }
            for (int c = 0; c < 8; ++c) {
                float& d = to.values[(row % 8 * 4 + c / 2) * to.count + 4 * n + row / 8 * 2 + c % 2];
                d = (product.accumulate ? d : 0.0f) + sums[c];
            }
        }
    }
}

void execute_product(Warp& warp, const Product& product) {
    for (int lane = 0; lane < 32 && product.form.a_in_registers; ++lane) {
        if (std::memcmp(product.lanes[lane], &product.values[4 * lane], 4 * sizeof(uint32_t)) != 0) {
            complain(
                warp.threads[lane], product.where,
                "issued a product of registers that were written to before it was waited for");
        }
    }
    product.is_bf16 ? compute<bf16>(warp, product) : compute<fp16>(warp, product);
    --product.to->products;
    product.done->complete = true;
    for (int lane = 0; lane < 32; ++lane) {
        const Thread& thread = warp.threads[lane];
        product.done->times[lane] = thread.clock.empty() ? 0 : thread.clock[thread.index];
    }
}

// The results of complete products go to the registers that a wait names.
void hand_over(Warp& warp, Where where) {
    auto& held = warp.products.accumulators;
    std::erase_if(held, [&](const std::shared_ptr<Accumulators>& accumulators) {
        const auto& named = *static_cast<Named*>(warp.arguments[0]);
        for (int i = 0; i < named.count; ++i) {
            if (named.registers[i].begin != accumulators->lanes[0]) {
                continue;
            }
            if (accumulators->products != 0) {
                complain(
                    warp.threads[0], where,
                    "names registers of the product issued at " + place(accumulators->where) +
                        ", which it does not wait for");
            }
            for (int lane = 0; lane < 32; ++lane) {
                float* const d = accumulators->lanes[lane];
                for (int c = 0; c < accumulators->count; ++c) {
                    if (std::bit_cast<uint32_t>(d[c]) != kWaiting) {
                        complain(
                            warp.threads[lane], where,
                            "waits for the product issued at " + place(accumulators->where) +
                                ", whose registers were written to meanwhile");
                    }
                    d[c] = accumulators->values[lane * accumulators->count + c];
                }
            }
            return true;
        }
        return false;
    });
}

void execute_wait(Warp& warp) {
    const auto& named = *static_cast<Named*>(warp.arguments[0]);
    WarpProducts& products = warp.products;
    while (static_cast<int>(products.groups.size()) > named.pending) {
        for (int i = 0; i < products.groups.front(); ++i) {
            execute_product(warp, products.issued.front());
            products.issued.pop_front();
        }
        products.groups.pop_front();
    }
    hand_over(warp, named.where);
    for (int lane = 0; lane < 32; ++lane) {
        warp.threads[lane].fenced.clear();
    }
}

void execute_fence(Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
        const auto& named = *static_cast<Named*>(warp.arguments[lane]);
        Thread& thread = warp.threads[lane];
        for (int i = 0; i < named.count; ++i) {
            const Registers& registers = named.registers[i];
            std::erase_if(thread.fenced, [&](const FencedRegisters& range) { return range.begin == registers.begin; });
            thread.fenced.push_back({registers.begin, registers.bytes, hash(registers.begin, registers.bytes)});
        }
    }
}

void execute_commit(Warp& warp) {
    warp.products.groups.push_back(warp.products.uncommitted);
    warp.products.uncommitted = 0;
}

constexpr Collective kIssue{"wgmma", execute_issue};
constexpr Collective kFence{"wgmma_fence", execute_fence};
constexpr Collective kCommit{"wgmma_commit", execute_commit};
constexpr Collective kWait{"wgmma_wait", execute_wait};

}  // namespace

void fence_products(const Registers* registers, int count, Where where) {
    Named named{registers, count, 0, where};
    meet(kFence, &named, where);
}

void commit_products(Where where) { meet(kCommit, nullptr, where); }

void wait_for_products(int pending, const Registers* registers, int count, Where where) {
    yield();
    Named named{registers, count, pending, where};
    meet(kWait, &named, where);
}

void issue_product(const ProductOperands& operands, Where where) {
    Issued issued{operands, where};
    meet(kIssue, &issued, where);
}

}  // namespace attnfuse::emulation
