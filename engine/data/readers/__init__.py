"""Caption formats: the registry, a module for each format or close family, and what they share.

Everything here turns files into `ParsedCaptions`, without opening an image. Only load.py and the registry's users import
it. Tables, JSON records and Parquet files are read alike (records.py), whatever format they turn out to be.
"""
