"""What turns images into latents and back."""
