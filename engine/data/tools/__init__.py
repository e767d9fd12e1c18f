"""Tools for datasets: inspect, prepare, convert, detect objects, draw demo images."""
