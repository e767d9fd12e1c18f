"""Images: where their bytes are, decoding, transforms and the image cache."""
