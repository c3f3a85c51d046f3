#include "../sm80/attn_fwd_split.cuh"

template void attnfuse::sm80::attn_fwd_split<attnfuse::bf16, 128>(const attnfuse::SplitParams&, void*);
template void attnfuse::sm80::attn_fwd_split<attnfuse::fp16, 128>(const attnfuse::SplitParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm80::attn_fwd_split_tiles<128>();
