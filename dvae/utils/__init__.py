"""Small pieces that every part of dvae may use; they know nothing of images or models."""
