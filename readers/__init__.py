"""One small reader for each file format of data sets, each with random access to the images.

A reader's `find` returns a `layout.Found` if it can read the files at a path, and None otherwise.
`cache` decodes the images and keeps them; `published` lists the formats of each data set.
"""
