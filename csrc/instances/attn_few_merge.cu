#include "../sm80/attn_bwd_few.cuh"
#include "../sm80/attn_fwd_split.cuh"

template void attnfuse::sm80::attn_fwd_combine<attnfuse::bf16>(const attnfuse::SplitParams&, void*);
template void attnfuse::sm80::attn_fwd_combine<attnfuse::fp16>(const attnfuse::SplitParams&, void*);
template void attnfuse::sm80::attn_bwd_few_reduce<attnfuse::bf16>(const attnfuse::FewParams&, void*);
template void attnfuse::sm80::attn_bwd_few_reduce<attnfuse::fp16>(const attnfuse::FewParams&, void*);
