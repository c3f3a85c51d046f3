"""attnfuse inside other libraries, a module each; importing attnfuse imports none of them, nor their libraries."""
