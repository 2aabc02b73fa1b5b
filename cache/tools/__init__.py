"""Tools for stores: inspect, verify, repair, copy, export."""
