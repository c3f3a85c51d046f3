"""attnfuse under torch's own names.

    torch.nn.attention.activate_flash_attention_impl("attnfuse")     flash attention on a GPU; importing this module
                                                                     registers the name and activates nothing
    patch_sdpa()                   F.scaled_dot_product_attention, on any device, within a `with` block
    replace_attention(model)       nn.MultiheadAttention modules, in place
    jagged_attention(q, k, v)      nested tensors of the jagged layout
    context_parallel_attention     a sequence spread over the ranks of a process group
"""

from attnfuse.distributed import context_parallel_attention
from attnfuse.integrations import flash_attention
from attnfuse.integrations.jagged import jagged_attention
from attnfuse.integrations.replace import Replacement, replace_attention
from attnfuse.integrations.sdpa import Patch, patch_sdpa

__all__ = [
    "Patch",
    "Replacement",
    "context_parallel_attention",
    "jagged_attention",
    "patch_sdpa",
    "replace_attention",
]

flash_attention.register()
