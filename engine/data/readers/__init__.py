"""Caption readers: one file per caption format, and the registry that recognises them."""
