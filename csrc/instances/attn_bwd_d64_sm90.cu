#include "../sm90/attn_bwd.cuh"

template void attnfuse::sm90::attn_bwd_dkdv<attnfuse::bf16, 64>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm90::attn_bwd_dkdv<attnfuse::fp16, 64>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm90::attn_bwd_convert<attnfuse::bf16, 64>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm90::attn_bwd_convert<attnfuse::fp16, 64>(const attnfuse::BackwardParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm90::attn_bwd_dkdv_tiles<64>();
