"""What models do besides codes: reconstruct, denoise, upscale, sample."""
