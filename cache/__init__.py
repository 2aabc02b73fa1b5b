"""The store: which regions, which embeddings, made how. Sharded Zarr with provenance; no learning library."""

from ezsd.cache.errors import (
    StoreBusy,
    StoreError,
    StoreIncomplete,
    StoreKeyError,
    StoreMismatch,
    StoreUnreadable,
)
from ezsd.cache.format.manifest import (
    JSON,
    Manifest,
    Origin,
    canonical_json,
    differences,
    images_digest,
)
from ezsd.cache.format.records import GroundTruthRows, ProposalRows, RegionRows
from ezsd.cache.format.schema import PER_IMAGE, PER_STORE, PRODUCTS, Block, EmbeddingType, RaggedRows
from ezsd.cache.journal.commit import commit_numbered
from ezsd.cache.journal.disk_room import Forecast, forecast
from ezsd.cache.journal.entries import read_note
from ezsd.cache.journal.plan import forget_block, journaled_bad_images, write_block
from ezsd.cache.journal.shards import ShardTask, commit_shard
from ezsd.cache.reader import Product, Store, Verify
from ezsd.cache.tools.compare import Comparison, compare
from ezsd.cache.tools.inspect import ProductInfo, StoreInfo, info, list_stores
from ezsd.cache.tools.leftovers import Leftovers, collect
from ezsd.cache.tools.repair import RepairReport, RowSource, repair
from ezsd.cache.tools.verify import Damage, verify
from ezsd.cache.writer import StoreWriter

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
    "PER_IMAGE",
    "PER_STORE",
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
