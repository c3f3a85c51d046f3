#include "../sm90/attn_bwd_dq.cuh"

template void attnfuse::sm90::attn_bwd_dq<attnfuse::bf16, 64>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm90::attn_bwd_dq<attnfuse::fp16, 64>(const attnfuse::BackwardParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm90::attn_bwd_dq_tiles<64>();
