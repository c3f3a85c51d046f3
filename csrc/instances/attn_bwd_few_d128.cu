#include "../sm80/attn_bwd_few.cuh"

template void attnfuse::sm80::attn_bwd_few<attnfuse::bf16, 128>(const attnfuse::FewParams&, void*);
template void attnfuse::sm80::attn_bwd_few<attnfuse::fp16, 128>(const attnfuse::FewParams&, void*);
template std::vector<attnfuse::TileShape> attnfuse::sm80::attn_bwd_few_tiles<128>();
template std::vector<int> attnfuse::sm80::attn_bwd_few_sum_parts<128>();
