"""Schedulers for the tasks of a build: worker processes, Dask clusters, job arrays."""
