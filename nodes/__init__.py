"""What a graph sees."""
