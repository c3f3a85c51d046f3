"""Reading machine code without a GPU: `attnfuse inspect`.

    sass          disassembly
    flow          basic blocks, natural loops, the way through one iteration
    model         clocks by unit, the predicted ceiling
    reading       a compiled kernel as plain data, kept by the hash of what it came from
    triton_code   the Triton kernels, compiled for GPUs that are not here
    cuda_code     the CUDA kernels
    table         the table in the repository, and what makes a kernel worse
    published     figures of published kernels
"""
