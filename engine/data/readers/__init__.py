"""Caption formats: the registry, a module for each format or close family, and what they share.

Everything here turns files into `ParsedCaptions` without opening an image. Tables, JSON records and Parquet files are
read alike (records.py), whatever format they turn out to be.
"""
