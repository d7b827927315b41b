"""The task `diffusion`: styles and subjects, learnt from captioned pictures."""
