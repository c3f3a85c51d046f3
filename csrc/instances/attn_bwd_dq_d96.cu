#include "../sm80/attn_bwd_dq.cuh"

template void attnfuse::sm80::attn_bwd_dq<attnfuse::bf16, 96>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm80::attn_bwd_dq<attnfuse::fp16, 96>(const attnfuse::BackwardParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm80::attn_bwd_dq_tiles<96>();
