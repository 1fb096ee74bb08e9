"""Helpers that every part of dvae may use. They do not depend on images or models."""
