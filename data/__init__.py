"""Data sets as batches of pixels: settings, preprocessing, units, arrays and loading.

The file formats are in `readers`; docs/data.md says how to get each data set.
"""
