#include "../sm80/attn_bwd_rows.cuh"

template void attnfuse::sm80::attn_bwd_delta<attnfuse::bf16>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm80::attn_bwd_delta<attnfuse::fp16>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm80::attn_bwd_convert<attnfuse::bf16>(const attnfuse::BackwardParams&, void*);
template void attnfuse::sm80::attn_bwd_convert<attnfuse::fp16>(const attnfuse::BackwardParams&, void*);
