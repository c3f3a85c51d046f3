#include "../sm80/attn_bwd_few.cuh"

template void attnfuse::sm80::attn_bwd_few<attnfuse::bf16, 64>(const attnfuse::FewParams&, void*);
template void attnfuse::sm80::attn_bwd_few<attnfuse::fp16, 64>(const attnfuse::FewParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm80::attn_bwd_few_tiles<64>();
template std::vector<int> attnfuse::sm80::attn_bwd_few_sum_parts<64>();
