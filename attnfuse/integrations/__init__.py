"""attnfuse inside other libraries, one module each; importing attnfuse imports none of them, nor their libraries."""
