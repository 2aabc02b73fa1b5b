"""What is done to whole stores: inspect, verify, repair, copy, export."""
