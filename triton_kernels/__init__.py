"""The Triton kernels. Import as `attnfuse.triton_kernels`: the bare name belongs to another package."""
