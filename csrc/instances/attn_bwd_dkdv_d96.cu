#include "../sm80/attn_bwd_dkdv.cuh"

template void attnfuse::sm80::attn_bwd_dkdv<attnfuse::bf16, 96>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm80::attn_bwd_dkdv<attnfuse::fp16, 96>(const attnfuse::BackwardParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm80::attn_bwd_dkdv_tiles<96>();
