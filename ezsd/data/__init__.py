"""Datasets: annotations as typed records, the training dataset, the embedded benchmark."""
