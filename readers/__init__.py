"""One small reader for each format that images come in, each with random access.

A reader looks at a path and gives a `layout.Found` if it knows what lies there, or None. What it
found is opened, decoded and kept by `cache`; `datasets` says which data set knows which layouts.
"""
