"""What a denoiser should predict, and at which times it is asked."""
