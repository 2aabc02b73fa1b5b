"""The store: which regions, which embeddings, made how. Sharded Zarr with provenance; no learning library."""

from cache.commit import commit_numbered
from cache.compare import Comparison, compare
from cache.forecast import Forecast, forecast
from cache.inspect import ProductInfo, StoreInfo, info, list_stores
from cache.journal import read_note
from cache.leftovers import Leftovers, collect
from cache.manifest import JSON, Manifest, Origin, canonical_json, differences, images_digest
from cache.plan import forget_block, journaled_bad_images, write_block
from cache.reader import Product, Store, Verify
from cache.records import GroundTruthRows, ProposalRows, RegionRows
from cache.repair import RepairReport, RowSource, repair
from cache.schema import (
    PRODUCTS,
    RAGGED,
    Block,
    EmbeddingType,
    RaggedRows,
    StoreBusy,
    StoreError,
    StoreIncomplete,
    StoreKeyError,
    StoreMismatch,
    StoreUnreadable,
)
from cache.shards import ShardTask, commit_shard
from cache.verify import Damage, verify
from cache.writer import StoreWriter

__all__ = [
    "RowSource",
    "Comparison",
    "Damage",
    "RepairReport",
    "collect",
    "compare",
    "list_stores",
    "repair",
    "PRODUCTS",
    "RAGGED",
    "EmbeddingType",
    "Forecast",
    "Origin",
    "forecast",
    "forget_block",
    "images_digest",
    "JSON",
    "Block",
    "GroundTruthRows",
    "Leftovers",
    "Manifest",
    "Product",
    "ProductInfo",
    "ProposalRows",
    "RaggedRows",
    "RegionRows",
    "ShardTask",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreIncomplete",
    "StoreInfo",
    "StoreKeyError",
    "StoreMismatch",
    "StoreUnreadable",
    "StoreWriter",
    "Verify",
    "canonical_json",
    "differences",
    "commit_numbered",
    "commit_shard",
    "info",
    "journaled_bad_images",
    "verify",
    "read_note",
    "write_block",
]
