"""Where the tasks of a build run: worker processes, Dask clusters, job arrays."""
