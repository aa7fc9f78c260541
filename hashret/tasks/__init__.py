"""The tasks of models besides encoding: reconstruct, denoise, upscale, sample."""
