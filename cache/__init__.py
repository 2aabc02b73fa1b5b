"""The store: which regions, which embeddings, made how. Sharded Zarr with provenance; numpy and zarr alone."""

from cache.durable import FAILPOINTS, failpoint
from cache.inspect import ProductInfo, StoreInfo, info, verify
from cache.manifest import JSON, Manifest, canonical_json
from cache.plan import write_block
from cache.reader import GroundTruthRows, Product, ProposalRows, RegionRows, Store
from cache.schema import (
    FORMAT_VERSION,
    Block,
    RaggedRows,
    StoreError,
    StoreIncomplete,
    StoreKeyError,
    StoreMismatch,
)
from cache.shards import ShardTask, commit_shard
from cache.writer import StoreWriter

__all__ = [
    "FAILPOINTS",
    "FORMAT_VERSION",
    "JSON",
    "Block",
    "GroundTruthRows",
    "Manifest",
    "Product",
    "ProductInfo",
    "ProposalRows",
    "RaggedRows",
    "RegionRows",
    "ShardTask",
    "Store",
    "StoreError",
    "StoreIncomplete",
    "StoreInfo",
    "StoreKeyError",
    "StoreMismatch",
    "StoreWriter",
    "canonical_json",
    "commit_shard",
    "failpoint",
    "info",
    "verify",
    "write_block",
]
