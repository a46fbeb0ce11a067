"""Chat templates: reading them, rendering them in a separate process, and encoding the result."""
