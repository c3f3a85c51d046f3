#include "../sm90/attn_fwd.cuh"

template void attnfuse::sm90::attn_fwd<attnfuse::bf16, 64>(const attnfuse::ForwardParams&, void*);
template void attnfuse::sm90::attn_fwd<attnfuse::fp16, 64>(const attnfuse::ForwardParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm90::attn_fwd_tiles<64>();
