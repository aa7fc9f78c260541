"""Inputs: images, vectors and their metadata, from folders, archives, arrays and data sets."""
