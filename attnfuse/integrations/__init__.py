"""attnfuse where people already are: torch, transformers, diffusers. Nothing here is imported by the core."""
