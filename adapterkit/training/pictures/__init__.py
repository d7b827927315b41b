"""A folder of captioned pictures as latents and captions: what lies there, what is cut, kept, and drawn of it."""
