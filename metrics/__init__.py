"""Scores of images: features, distances between them, bits/dim, and the report."""
